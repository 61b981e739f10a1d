"""The measurement code: what is checked before it is timed, who is named where it cannot run, statistics, memory."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import vggfast
from vggfast.bench import BenchError, cases, contenders, measure, memory, networks, stats, suites, verdict
from vggfast.bench.cases import Case
from vggfast.bench.client import Worker
from vggfast.bench.contenders import VGGFAST, Contender, find
from vggfast.bench.layers import VGG16_LAYERS, conv_layers
from vggfast.bench.measure import Effort, Entry, Group, Lab

ONCE = Effort(min_rounds=2, max_rounds=2, seconds=0.1, turn_s=0)
LAYER = Case("conv5_3", "forward", 1)
TINY = Case("bench_contenders:tiny", "inference", 2, size=32)


def planted(name: str) -> Contender:
    return Contender(name, "test", f"bench_contenders:{name}", tasks=("forward",))


def group_of(case: Case, *chosen: Contender) -> Group:
    return Group("layers", case, tuple(Entry(c.name, c, case) for c in chosen))


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [0, 10, 37.5, 50, 90, 100])
def test_percentiles_are_numpys(percent):
    values = torch.rand(17, generator=torch.Generator().manual_seed(0)).tolist()
    assert stats.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentiles_without_values_or_outside_their_range():
    with pytest.raises(ValueError, match="at least one value"):
        stats.percentile([], 50)
    with pytest.raises(ValueError, match="expected 0 … 100, got 101"):
        stats.percentile([1.0], 101)


def test_a_slow_round_cancels_in_the_ratio():
    ours, theirs = [1.0, 1.0, 10.0, 1.0], [2.0, 2.0, 20.0, 2.0]
    assert stats.ratios(theirs, ours) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="got 4 and 3"):
        stats.ratios(theirs, ours[:3])


# ---- what is computed ----------------------------------------------------------------------------------------------


def test_the_table_of_layers():
    assert [len(conv_layers(model)) for model in ("vgg11", "vgg13", "vgg16", "vgg19")] == [8, 10, 13, 16]
    assert [layer.name for layer in VGG16_LAYERS if layer.pool] == [
        "conv1_2",
        "conv2_2",
        "conv3_3",
        "conv4_3",
        "conv5_3",
    ]
    assert VGG16_LAYERS[3] == ("conv2_2", 128, 128, 112, True)
    assert sum(layer.gflop(1) for layer in VGG16_LAYERS) == pytest.approx(30.693, abs=1e-3)  # 15.35 GMAC
    assert VGG16_LAYERS[1].winograd_gflop(8) == pytest.approx(VGG16_LAYERS[1].gflop(8) / 4)
    assert VGG16_LAYERS[12].winograd_gflop(1) == pytest.approx(VGG16_LAYERS[12].gflop(1) / 4 * (16 / 14) ** 2)
    assert VGG16_LAYERS[12].winograd_gflop(1, edges=True) == pytest.approx(
        VGG16_LAYERS[12].gflop(1) / (9 * 14**2) * (9 * 36 + 6 * 24 + 16)
    )
    assert VGG16_LAYERS[1].winograd_gflop(8, edges=True) == VGG16_LAYERS[1].winograd_gflop(8)


def test_operations_of_a_training_step_leave_out_the_images_gradient():
    inference, training = (Case("vgg16", task, 1).gflop() for task in ("inference", "training"))
    assert inference == pytest.approx(30.94, abs=0.01)
    assert training == pytest.approx(3 * inference - VGG16_LAYERS[0].gflop(1))


def test_data_are_the_same_in_every_process_and_others_in_every_buffer():
    first, again, other = cases.layer_data(LAYER, 0), cases.layer_data(LAYER, 0), cases.layer_data(LAYER, 1)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.weight, other.weight)
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("name", ["conv1_1", "conv5_3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_where_decisions_are_near_no_gradient_is_given(name, dtype):
    """So gradients of a layer can be checked to rounding: float32's own decisions give the float64 gradient."""
    case = Case(name, "forward+backward", 1, dtype)
    answer = cases.reference(case)
    given = answer[cases.GIVEN]
    assert 0.9 < (given != 0).double().mean() < 1
    data = cases.layer_data(case, 0).to(torch.float32)
    inputs = cases.differentiated(case, data)
    y = cases.plain_layer(data.x, data.weight, data.bias, case.layer.pool)
    found = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), given.float()), strict=True))
    errors = cases.relative_errors({"y": y, **found}, cases.expected(case, answer))
    assert set(errors) == set(cases.outputs_of(case))
    assert max(errors.values()) < 5e-6


def test_an_error_is_infinite_where_an_output_lacks_is_nan_or_has_another_shape():
    want = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3), "d": torch.ones(3)}
    got = {"a": torch.tensor([1, 1, 1.5]), "b": torch.tensor([1, 1, float("nan")]), "c": torch.ones(1, 3)}
    assert cases.relative_errors(got, want) == {
        "a": pytest.approx(0.5 / 3**0.5),
        "b": float("inf"),
        "c": float("inf"),
        "d": float("inf"),
    }


def test_an_unknown_network_is_refused():
    with pytest.raises(BenchError, match=r"expected vgg11, .*got vgg12"):
        cases.network(Case("vgg12", "inference", 1))


# ---- who competes --------------------------------------------------------------------------------------------------


def test_a_rival_that_is_not_installed_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        find("openvino").missing() == "not installed: openvino, onnx, onnxscript; pip install openvino onnx onnxscript"
    )
    assert VGGFAST.missing() == ""


def test_rivals_by_case():
    names = lambda *a, **k: [c.name for c in contenders.rivals(*a, **k)]  # noqa: E731
    assert names(Case("vgg16", "inference", 1)) == [
        "torch channels_last",
        "torch NCHW",
        "torch.compile",
        "onnxruntime",
        "openvino",
        "ncnn",
    ]
    assert "ncnn" not in names(Case("vgg16", "inference", 8))
    assert names(Case("vgg16", "training", 8, "bf16")) == ["torch channels_last", "torch.compile"]
    assert names(Case("conv3_2", "grad_input", 1)) == ["torch channels_last", "torch NCHW"]
    assert names(Case("conv3_2", "forward", 32, "bf16", "cuda")) == [
        "torch channels_last",
        "torch.compile max-autotune",
        "vggfast sm90patch",
        "cudnn_convolution_relu",
        "jax",
    ]
    assert "vggfast sm90patch" not in names(Case("conv3_2", "grad_weight", 32, "bf16", "cuda"))
    gpu = Case("vgg16", "inference", 32, "bf16", "cuda")
    assert {"torch.compile max-autotune", "torch CUDA graph", "jax"} <= set(names(gpu))
    assert names(Case("vgg16", "inference", 1), ["openvino", "ncnn"]) == ["openvino", "ncnn"]
    with pytest.raises(BenchError, match=r"expected some of torch, .* got tensorflow"):
        contenders.rivals(gpu, ["tensorflow"])
    with pytest.raises(
        BenchError, match="expected some of torch, compile for vgg16 training fp32 batch 8 on cpu, got foo"
    ):
        contenders.rivals(Case("vgg16", "training", 8), ["torch", "foo"])


def test_a_comparison_has_its_control_and_half_precision_beside_float32():
    labels = [entry.label for entry in measure.compare("inference", Case("vgg16", "inference", 1)).entries]
    assert labels[:2] == ["vggfast", "vggfast again"]
    assert labels[-3:] == ["openvino bf16", "ncnn half", "ncnn bf16"]
    quick = measure.compare("inference", Case("vgg16", "inference", 1), full=False).entries
    assert [e.label for e in quick] == labels  # nobody is hidden
    assert {e.label: e.left_out for e in quick if e.left_out}.keys() == {"ncnn", "ncnn half", "ncnn bf16"}
    assert measure.CONTROL not in [e.label for e in measure.compare("memory", Case("vgg16", "training", 1)).entries]


@pytest.mark.parametrize(("threads", "fewer"), [(1, []), (2, [1]), (6, [1, 2, 4])])
def test_threads_are_compared_with_fewer(threads, fewer):
    (group,) = suites.groups("threads", "cpu", threads, full=False)
    assert group.id == "threads: vgg16 inference fp32 batch 1"
    for name in ("vggfast", "torch channels_last"):
        found = {entry.label: entry.case.threads for entry in group.entries if entry.label.startswith(name)}
        assert found == {name: threads, **{f"{name}, {n} thread{'s' if n > 1 else ''}": n for n in fewer}}
        assert all(entry.contender is find(name) for entry in group.entries if entry.label in found)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("full", [False, True])
def test_every_part_has_groups_with_names_of_their_own(device, full):
    names = [group.id for part in suites.PARTS for group in suites.groups(part, device, 2, full)]
    assert len(names) == len(set(names))
    for part in suites.PARTS:
        assert suites.groups(part, device, 2, full) or part in ("compiled", "shapes", "threads")
        assert suites.QUICK[part].seconds <= suites.FULL[part].seconds


# ---- checking and timing -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab():
    with Lab(threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def measured(lab):
    """One group with everything that can happen to a contender."""
    absent = Contender("absent", "test", "no:builder", packages=("no_such_package",))
    names = ["wrong_at_one_place", "not_a_number", "remembers", "chatty", "raises"]
    chosen = [VGGFAST, find("torch channels_last"), *map(planted, names), absent]
    return {c["label"]: c for c in lab.time(group_of(LAYER, *chosen), ONCE)["contenders"]}


@pytest.mark.parametrize(
    ("name", "field", "why"),
    [
        (
            "wrong_at_one_place",
            "refused",
            "relative error of y: expected at most 5.0e-06 against float64, got 1.00e-01",
        ),
        ("not_a_number", "refused", "got inf"),
        ("remembers", "refused", "expected other outputs for other inputs, got the same"),
        ("raises", "failed", "RuntimeError: cannot be set up"),
        ("absent", "missing", "not installed: no_such_package"),
    ],
)
def test_who_is_wrong_or_cannot_run_is_not_timed_but_named(measured, name, field, why):
    assert why in measured[name][field]
    assert "seconds" not in measured[name]


@pytest.mark.parametrize("name", ["vggfast", "torch channels_last", "chatty"])
def test_who_is_right_is_timed_and_its_error_is_kept(lab, measured, name):
    record = measured[name]
    assert 0 < record["seconds"]["p10"] <= record["seconds"]["median"] <= record["seconds"]["p90"]
    assert len(record["rounds"]) == 2
    assert 1e-9 < record["error"] <= record["tolerance"] == 5e-6
    assert record["gflops"] == pytest.approx(LAYER.gflop() / record["seconds"]["median"])
    ceilings = lab.ceilings("cpu")
    bound = max(LAYER.gflop() / ceilings["peak_gflops"]["fp32"], LAYER.gigabytes() / ceilings["dram_gbps"])
    assert record["ceiling_share"] == pytest.approx(bound / record["seconds"]["median"])
    assert ("winograd" in record.get("kernel", "")) == (name == "vggfast")


def test_gradients_of_a_layer_are_checked_to_rounding(lab):
    case = Case("conv5_1", "forward+backward", 1)
    for record in lab.time(group_of(case, VGGFAST, find("torch NCHW")), ONCE)["contenders"]:
        assert record["error"] <= record["tolerance"] == 5e-6
        assert record["seconds"]["median"] > 0


def test_a_layers_gradients_may_have_twice_torchs_own_error_and_no_more(lab):
    """conv1_1's filters and bias at batch 8: torch's own error is above the fixed 5e-6, and torch is no wrong contender."""
    case = Case("conv1_1", "grad_weight", 8)
    wrong = Contender("wrong_bias_gradient", "test", "bench_contenders:wrong_bias_gradient", tasks=("grad_weight",))
    chosen = VGGFAST, find("torch channels_last"), find("torch NCHW"), wrong
    records = {c["label"]: c for c in lab.time(group_of(case, *chosen), ONCE)["contenders"]}
    own = max(records[f"torch {layout}"]["error"] for layout in ("channels_last", "NCHW"))
    assert 5e-6 < own <= records["torch NCHW"]["tolerance"] < 2.1 * own
    assert records["vggfast"]["error"] < own / 4
    assert "relative error of grad of bias: expected at most" in records["wrong_bias_gradient"]["refused"]
    assert "seconds" not in records["wrong_bias_gradient"]


def test_the_output_of_a_layer_has_a_fixed_bound():
    entry = Entry("x", VGGFAST, Case("conv1_1", "forward+backward", 8))
    errors = {"y": 5.1e-6, "grad of bias": 6e-6}
    judged = verdict.judge(entry, errors, {"grad of bias": 6.8e-6}, True)
    assert "relative error of y: expected at most 5.0e-06" in judged["refused"]
    assert "refused" not in verdict.judge(entry, {**errors, "y": 1e-6}, {"grad of bias": 6.8e-6}, True)
    assert (
        "1.4e-05" in verdict.judge(entry, {**errors, "grad of bias": 2e-5}, {"grad of bias": 6.8e-6}, True)["refused"]
    )


@pytest.mark.parametrize("task", ["inference", "training"])
def test_a_network_end_to_end_in_processes_of_their_own(lab, task):
    """With whatever of the extra "bench" is installed; the others are named."""
    case = dataclasses.replace(TINY, task=task)
    runtimes = [find("onnxruntime"), find("openvino")] if task == "inference" else []
    record = lab.time(group_of(case, VGGFAST, find("torch channels_last"), *runtimes), ONCE)
    assert {"idle_workers", "other_programs", "stolen", "seconds"} == set(record["activity"])
    for contender in record["contenders"]:
        installed = not find(contender["label"]).missing()
        assert ("seconds" in contender) == installed, contender
        if not installed:
            assert contender["missing"].startswith("not installed: ")


def test_bfloat16_training_may_have_twice_torchs_own_error(lab):
    case = dataclasses.replace(TINY, task="training", dtype="bf16")
    (record,) = lab.time(group_of(case, VGGFAST), ONCE)["contenders"]
    assert 1e-4 < record["error"] <= record["tolerance"] < 0.5
    judged = verdict.judge(Entry("x", VGGFAST, case), {"a": 0.05, "b": 0.01}, {"a": 0.03, "b": 0.004}, True)
    assert "relative error of b: expected at most 8.0e-03" in judged["refused"]


def test_gradients_that_are_zero_but_for_rounding_are_not_judged():
    """A BatchNorm takes away what the bias before it adds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    exact = cases._training_outputs(TINY, net, net, x)
    kept = cases._without_vanishing(exact)
    assert exact.keys() - kept.keys() == {"grad of 0.bias"}
    assert all(kept[name] is exact[name] for name in kept)


def test_float32_on_a_gpu_is_judged_as_tf32():
    case = Case("conv3_2", "forward", 32, "fp32", "cuda")
    assert "refused" not in verdict.judge(Entry("x", VGGFAST, case), {"y": 4e-4}, {}, True)
    assert "expected at most 6.3e-04" in verdict.judge(Entry("x", VGGFAST, case), {"y": 7e-4}, {}, True)["refused"]
    bits = torch.randn(1, 64, 12, 12), torch.randn(64, 64, 3, 3)
    rounded = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double() for t in bits]
    exact = torch.nn.functional.conv2d(*(t.double() for t in bits))
    error = (torch.nn.functional.conv2d(*rounded) - exact).norm() / exact.norm()
    assert 1e-4 < error < verdict.TOLERANCES["layer", "tf32"] / 2


def test_a_process_that_dies_is_reported_with_its_status():
    with (
        Worker("dies", 1) as worker,
        pytest.raises(BenchError, match="dies: its process ended with status 7 at prepare"),
    ):
        worker.ask("prepare", key="x", builder="bench_contenders:dies", case=LAYER.to_dict(), files={}, options={})


def test_the_next_turn_waits_until_threads_have_stopped_spinning():
    from bench_contenders import SPIN_S

    with Worker("spins", 1) as worker:
        worker.ask("prepare", key="x", builder="bench_contenders:spins", case=LAYER.to_dict(), files={}, options={})
        worker.ask("time", key="x", warmup=0, times=1, start=0)
        before = worker.cpu_seconds()
        worker.settle()
        assert worker.cpu_seconds() - before > SPIN_S / 2


# ---- memory --------------------------------------------------------------------------------------------------------


def test_saved_activations_are_counted_once_and_without_parameters():
    """Eager: the convolution's output, shared with the in-place ReLU; the pool's int64 indices. vggfast: the pooled output, 2 bits."""
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    modules = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    parameters = list(modules[0].parameters())
    pooled = 2 * 16 * 4 * 4
    for network, expected in (
        (nn.Sequential(*modules), 4 * (x.numel() + 2 * 16 * 8 * 8) + 8 * pooled),
        (vgg_like(*modules), 4 * (x.numel() + pooled) + pooled // 4),
    ):
        with memory.Saved(parameters) as saved:
            network(x)
        assert saved.bytes == expected


def test_an_activation_as_large_as_a_parameter_is_counted_and_autocasts_copy_of_a_parameter_is_not():
    convolution, linear = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 12 * 12, 8)
    x = torch.randn(1, 3, 12, 12)
    assert x.numel() == convolution.weight.numel()
    network = nn.Sequential(convolution, nn.Flatten(), linear)
    y_elements = 16 * 12 * 12
    for autocast, itemsize in ((False, 4), (True, 2)):
        with memory.Saved([*network.parameters()]) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            network(x)
        assert saved.bytes == itemsize * (x.numel() + y_elements)


def vgg_like(*modules: nn.Module) -> nn.Module:
    import vggfast

    return vggfast.FusedSequential(*modules)


def test_peak_memory_of_a_run(lab):
    case = dataclasses.replace(TINY, task="training", batch=64)
    group = dataclasses.replace(group_of(case, VGGFAST, find("torch channels_last")), part="memory")
    ours, torchs = lab.measure_memory(group)["contenders"]
    assert 0 < ours["saved_bytes"] < torchs["saved_bytes"] < torchs["peak_bytes"] < 200e6


def test_rivals_do_not_run_this_librarys_kernels():
    case = Case(networks.SMALL, "inference", 1, size=32)
    net = cases.network(case)
    plain = cases.plain_network(net)
    assert [type(child) for child in plain] == [type(child) for child in net]
    assert [p.data_ptr() for p in plain.parameters()] == [p.data_ptr() for p in net.parameters()]
    assert not any(row.fused for row in vggfast.explain(plain, torch.rand(1, 3, 32, 32)).rows)
    with pytest.raises(BenchError, match="rivals would run fused"):
        cases.plain_network(torch.nn.Sequential(net))
