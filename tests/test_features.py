"""`vggfast.features`: the taps are what the layers of those names return, beside float64 and torch's own error."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from network_reference import assert_as_good_as_torch, error, float64, steps
from reference import WINOGRAD_BOUND, normal
from small_vgg import SmallLinear, narrow_vgg, needs_torchvision, on_meta, torchvision_models
from torch import Tensor, nn

import vggfast
from vggfast import taps
from vggfast.bench.memory import Saved

BLOCKS = {
    "vgg16": (2, 2, 3, 3, 3),
    "vgg16c": (2, 2, 3, 3, 3),
    "vgg11_bn": (1, 1, 2, 2, 2),
    "vgg11_lrn": (1, 1, 2, 2, 2),
}
SMALL = [8, 8, "M", 16, 16, 16, "M", 24, 24, "M"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "Linear", SmallLinear)
    torch.set_num_threads(1)


def small(batch_norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    network = vggfast.make_layers(SMALL, batch_norm).eval()
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize("name", BLOCKS)
def test_names_are_the_papers(name: str) -> None:
    kinds = ("conv", "bn", "relu") if name.endswith("bn") else ("conv", "relu")
    expected = []
    for block, layers in enumerate(BLOCKS[name], 1):
        expected += [f"{kind}{block}_{index}" for index in range(1, layers + 1) for kind in kinds]
        expected += ["norm1"] * (name.endswith("lrn") and block == 1) + [f"pool{block}"]
    head = ["fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]
    assert list(taps.names(on_meta(getattr(vggfast, name)))) == expected + head


def head_steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    values = [torch.flatten(model.avgpool(x), 1)]
    for child in model.classifier:
        values.append(child(values[-1].clone()))
    return values[1:]


def check_every_tap(model: nn.Module, x: Tensor) -> None:
    """All taps at once, with the layers' own answers, torch's and float64's, one after the other."""
    names = list(taps.names(model))
    ours = vggfast.features(model, names[::-1])(x)
    assert list(ours) == names[::-1]
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        torchs = steps(nn.Sequential(*model.features), x)
        wanted = steps(float64(model.features), x.double())
        torchs, wanted = torchs[1:] + head_steps(model, torchs[-1]), wanted[1:] + head_steps(exact, wanted[-1])
    assert len(names) == len(wanted)
    depth = 0
    for name, by_torch, reference in zip(names, torchs, wanted, strict=True):
        depth += name.startswith("conv")
        assert_as_good_as_torch(ours[name], by_torch, reference, reference, depth, name)
        assert ours[name].stride() == by_torch.stride(), name


@pytest.mark.parametrize("name", BLOCKS)
def test_every_tap_of_every_kind_of_vgg(name: str) -> None:
    torch.manual_seed(0)
    check_every_tap(getattr(vggfast, name)(num_classes=5).eval(), normal(2, 3, 32, 32))


@needs_torchvision
def test_a_torchvision_model_is_tapped_fused_and_left_alone() -> None:
    model = torchvision_models.vgg11_bn(num_classes=5).eval()
    check_every_tap(model, normal(1, 3, 32, 32))
    tapped = vggfast.features(model, "relu5_2")
    assert vggfast.explain(tapped, normal(1, 3, 32, 32)).fused_convolutions == 8
    assert type(model.features) is nn.Sequential
    assert {key: p.data_ptr() for key, p in tapped.state_dict().items()} == {
        key: model.state_dict()[key].data_ptr() for key in tapped.state_dict()
    }


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("torch_layout", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_tap_alone_and_with_its_neighbour(
    batch_norm: bool, torch_layout: bool, layout: torch.memory_format
) -> None:
    """A tap on a convolution stays what it was when the ReLU behind it runs in place, and with gradients too."""
    network, x = small(batch_norm), normal(2, 3, 16, 16).to(memory_format=layout).requires_grad_()
    names = list(taps.names(network))
    reference = dict(zip(names, steps(nn.Sequential(*network), x)[1:], strict=True))
    for first, second in zip(names, [*names[1:], None], strict=True):
        wanted = [name for name in (first, second) if name]
        found = vggfast.features(network, wanted, torch_layout=torch_layout)(x)
        gradient = torch.autograd.grad(sum(t.square().sum() for t in found.values()), x)[0]
        assert torch.isfinite(gradient).all()
        for name in wanted:
            assert error(found[name], reference[name].double()) <= 2 * WINOGRAD_BOUND * 8, name
            if torch_layout:
                assert found[name].stride() == reference[name].stride()
            elif not name.startswith(("bn", "relu")):
                assert found[name].is_contiguous(memory_format=torch.channels_last)


def kernels(network: nn.Module) -> dict[str, str]:
    return {
        row.name.removeprefix("features."): row.layers for row in vggfast.explain(network, normal(1, 3, 16, 16)).rows
    }


def test_taps_behind_relu_and_pool_leave_the_kernels_whole() -> None:
    network = small()
    assert kernels(vggfast.features(network, ["pool1", "relu2_2", "pool3"])) == kernels(network)
    split = kernels(vggfast.features(network, ["conv2_2", "pool3"]))
    assert split.pop("7") == "Conv3x3 16->16"
    assert split.pop("8") == "ReLU"
    assert len(split) == len(kernels(network)) - 1


def test_nothing_behind_the_last_tap_runs_or_is_kept() -> None:
    model = vggfast.vgg11(num_classes=5).eval()
    later = weakref.ref(model.features[9]), weakref.ref(model.classifier)
    tapped = vggfast.features(model, ["relu3_1", "pool1"])
    assert [key for key, _ in tapped.named_parameters()] == [
        f"features.{i}.{what}" for i in (0, 3, 6) for what in ("weight", "bias")
    ]
    del model
    gc.collect()
    assert [ref() for ref in later] == [None, None]
    assert tapped(normal(1, 3, 8, 8))["relu3_1"].shape == (1, 256, 2, 2)


def test_frozen_weights_cost_no_gradient_work() -> None:
    """Kept are the ReLUs' masks, which are the outputs, and the pools' two bits; no kernel for the filters' gradients runs."""
    network = vggfast.features(small().requires_grad_(False), ["relu2_2", "pool3"])
    x = normal(2, 3, 16, 16).requires_grad_()
    with Saved(list(network.parameters())) as saved:
        found = network(x)
    outputs = 2 * 4 * sum(c * s * s for c, s in ((8, 16), (8, 8), (16, 8), (16, 8), (16, 4), (24, 4), (24, 2)))
    bits = 2 * sum(-(-c // 4) * s * s for c, s in ((8, 8), (16, 4), (24, 2)))
    assert saved.bytes <= outputs + bits
    with torch.autograd.profiler.profile() as profile:
        sum(t.sum() for t in found.values()).backward()
    ran = {event.name for event in profile.function_events}
    assert "vggfast::conv3x3_grad_input" in ran
    assert not [name for name in ran if "grad_weight" in name]
    assert x.grad is not None
    with torch.no_grad(), Saved([]) as saved:
        network(x)
    assert saved.bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    network, x = small(), normal(2, 3, 16, 16)
    wanted = ["conv1_2", "relu2_2", "pool3"]
    exact = steps(float64(network), x.double())[1:]
    with torch.autocast("cpu", dtype):
        ours = vggfast.features(network, wanted)(x)
        torchs = dict(zip(taps.names(network), steps(nn.Sequential(*network), x)[1:], strict=True))
    for name in wanted:
        reference = exact[taps.names(network)[name].child]
        assert_as_good_as_torch(ours[name], torchs[name], reference, reference, 7, name)


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = vggfast.vgg11(num_classes=5).eval()
    network = vggfast.features(model, ["conv1_1", "relu2_1", "pool5", "fc6", "fc7"])
    x = normal(2, 3, 32, 32)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for call in (network, compiled):
        network.zero_grad()
        found = call(x)
        sum(t.square().sum() for t in found.values()).backward()
        results.append([*found.values(), *(p.grad.clone() for p in network.parameters())])
    assert list(found) == list(network.taps)
    for wrapped in (
        torch.compile(small()),
        torch.compile(nn.DataParallel(small())),
        nn.DataParallel(torch.compile(small())),
    ):
        assert list(taps.names(wrapped)) == list(taps.names(small()))
    assert all(error(a, b.double()) <= WINOGRAD_BOUND for a, b in zip(*results, strict=True))


def test_frozen_classifiers_taps_are_captured_in_one_graph() -> None:
    """Without gradients nothing but the taps themselves keeps the classifier's layers from writing over them."""
    torch._dynamo.reset()
    x = normal(2, 3, 32, 32)
    network = vggfast.features(narrow_vgg(), ["relu1_1", "relu6"]).requires_grad_(False)
    captured = (
        torch.compile(network, fullgraph=True, backend="aot_eager"),
        torch.export.export(network, (x,), strict=True).module(),
    )
    for call in captured:
        for name, tap in call(x).items():
            torch.testing.assert_close(tap, network(x)[name])


def test_no_tap_is_overwritten_where_torch_fx_traces() -> None:
    network, x = vggfast.features(narrow_vgg(), ["conv1_1", "relu1_1", "fc6", "relu6"]), normal(2, 3, 32, 32)
    traced, found = torch.fx.symbolic_trace(network)(x), network(x)
    assert all(error(traced[name], tap.double()) <= WINOGRAD_BOUND * 10 for name, tap in found.items())


def test_distributed(tmp_path) -> None:
    """Every parameter gets a gradient, since nothing is held that does not run."""
    network = vggfast.features(small(), ["conv1_1", "relu2_1"])
    x = normal(2, 3, 16, 16)
    sum(t.sum() for t in network(x).values()).backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(network)
        sum(t.sum() for t in parallel(x).values()).backward()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), expected, strict=True))
    assert list(taps.names(parallel)) == list(taps.names(network))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied) -> None:
    network, x = vggfast.features(small(True), ["conv2_1", "relu2_1"]), normal(1, 3, 16, 16)
    again = copied(network)
    assert all(torch.equal(a, b) for a, b in zip(again(x).values(), network(x).values(), strict=True))
    assert {id(p) for p in again.parameters()}.isdisjoint(map(id, network.parameters()))


def test_a_dense_model_gives_maps_of_the_classifiers_layers() -> None:
    model = vggfast.vgg11(num_classes=5).eval()
    x = normal(1, 3, 224, 256)
    maps = vggfast.features(vggfast.to_dense(model), ["fc6", "relu7", "fc8"])(x)
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "fc6": (1, 64, 1, 2), "relu7": (1, 64, 1, 2), "fc8": (1, 5, 1, 2),
    }  # fmt: skip
    assert maps["fc6"].min() < 0 <= maps["relu7"].min()
    assert torch.equal(maps["fc8"], vggfast.to_dense(model)(x))


def test_modes_and_slices_are_the_models() -> None:
    model = vggfast.vgg11_bn(num_classes=5).train()
    tapped = vggfast.features(model, "bn1_1")
    assert tapped.training
    assert not tapped.eval().features[1].training
    assert not model.features[1].training
    evaluated = vggfast.features(model.eval(), ["bn1_1", "fc6"])
    assert not any(module.training for module in evaluated.modules())
    frozen = taps.frozen(tapped)
    assert [b.data_ptr() for b in frozen.buffers()] == [b.data_ptr() for b in tapped.buffers()]
    x = normal(1, 3, 16, 16)
    part = vggfast.features(small()[:4], "relu1_2")(x)["relu1_2"]
    assert torch.equal(part, small()[:4](x))


def test_gradients_of_the_classifiers_taps_reach_the_images() -> None:
    model = narrow_vgg()
    found = []
    for run in (
        lambda x: vggfast.features(model, ["pool5", "relu6"])(x)["relu6"],
        lambda x: model.classifier[:2](model.avgpool(model.features(x)).flatten(1)),
    ):
        x = normal(2, 3, 32, 32).requires_grad_()
        found.append(torch.autograd.grad(run(x).square().sum(), [x, model.classifier[0].weight]))
    torch.testing.assert_close(*found)


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def test_errors_name_what_there_is() -> None:
    network = small()
    with pytest.raises(ValueError, match=r"got 'relu9_9'; it has conv1_1, relu1_1, .*, pool3$"):
        vggfast.features(network, ["relu1_1", "relu9_9"])
    with pytest.raises(ValueError, match="at least one name, each once, got \\['pool1', 'pool1'\\]"):
        vggfast.features(network, ["pool1", "pool1"])
    with pytest.raises(ValueError, match="at least one name"):
        vggfast.features(network, [])
    with pytest.raises(TypeError, match="without convolutions"):
        vggfast.features(nn.Sequential(nn.ReLU()), ["relu1_1"])
    with pytest.raises(TypeError, match=r"expected a VGG whose `features` are an nn.Sequential.*got SmallLinear"):
        vggfast.features(nn.Linear(2, 2), ["fc6"])
    replaced = copy.deepcopy(network)
    replaced.forward = lambda x: x
    for own in (Doubled(*network), replaced):
        with pytest.raises(TypeError, match=r"one after the other, got (FusedSequential|Doubled) with an own forward"):
            vggfast.features(own, ["relu1_1"])
    with pytest.raises(TypeError, match="got str"):
        vggfast.features("vgg16", ["fc6"])


def test_a_tap_that_average_pooling_hands_on_is_not_overwritten() -> None:
    torch.manual_seed(0)
    model = vggfast.vgg11(num_classes=10)
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(
        nn.Dropout(0.5, inplace=True), nn.Linear(512, 64), nn.ReLU(True), nn.Linear(64, 10)
    )
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        alone = vggfast.features(model, ["pool5"])(x)["pool5"]
        beside = vggfast.features(model, ["pool5", "fc6"]).train()(x)["pool5"]
    assert torch.equal(alone, beside)
