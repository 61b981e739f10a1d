"""The ways people run a network: training in several processes and threads, checkpointed, offloaded, with changed weights.

Each is done twice, to a network that fuses and to plain torch modules with the same weights, and must give the same.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from reference import normal
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset
from usage_reference import BOUND, assert_same, backward, image, layers, pair

from vggfast import FusedSequential, explain, ops


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_network_of_these_tests_is_fused() -> None:
    assert explain(pair()[0], image()).fused_convolutions == 3


# ---- processes -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(FusedSequential(*layers()).eval(), gradient_as_bucket_view=rank >= 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        x, target = image(step, n=4), torch.arange(4)
        F.cross_entropy(model(x[2 * rank : 2 * rank + 2]), target[2 * rank : 2 * rank + 2]).backward()
        if step == 0:
            torch.save([p.grad.clone() for p in model.parameters()], f"{folder}/gradients{rank}")
        optimizer.step()
    torch.save([p.detach() for p in model.parameters()], f"{folder}/weights{rank}")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path) -> None:
    mp.spawn(train_rank, (free_port(), str(tmp_path)), nprocs=2)
    plain = pair()[1]
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(image(step, n=4)), torch.arange(4)).backward()
        if step == 0:
            gradients = [p.grad.clone() for p in plain.parameters()]
        optimizer.step()
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"gradients{rank}"), gradients)
        assert_same(torch.load(tmp_path / f"weights{rank}"), [p.detach() for p in plain.parameters()])


class Features(Dataset):
    """Runs the network in the worker, as perceptual data pipelines do."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.network(image(i, n=1))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_run_the_network_after_the_parent_did(start: str) -> None:
    torch.set_num_threads(2)  # the parent's thread pool does not survive a fork
    fused, _ = pair()
    expected = fused(image(n=8)), torch.stack([Features(fused)[i] for i in range(6)])
    loader = DataLoader(Features(fused), 3, num_workers=2, multiprocessing_context=start, timeout=300)
    assert torch.equal(torch.cat(list(loader)), expected[1])
    assert torch.equal(fused(image(n=8)), expected[0])


def test_data_parallel_without_a_gpu() -> None:
    fused, plain = pair()
    assert_same(backward(nn.DataParallel(fused)), backward(nn.DataParallel(plain)))


def test_hogwild_threads_of_autograd() -> None:
    """One graph of several networks, whose backward passes are started from several threads."""
    fused, plain = pair()
    results = []
    for network in (fused, plain):
        y = [network(image(seed)).square().sum() for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            results.append(list(pool.map(lambda loss, n=network: torch.autograd.grad(loss, n[0].weight)[0], y)))
    assert_same(*results)


# ---- weights -------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "bfloat16": lambda n: n.bfloat16(),
    "half": lambda n: n.half(),
    "float64": lambda n: n.to(torch.float64),
    "there and back": lambda n: n.double().float(),
    "some frozen": lambda n: n[2].requires_grad_(False),
    "frozen and thawed": lambda n: n.requires_grad_(False).requires_grad_(True),
    "parametrised": lambda n: parametrize.register_parametrization(n[2], "weight", Scaled()),
    "parametrisation removed": lambda n: (
        parametrize.register_parametrization(n[2], "weight", Scaled()),
        parametrize.remove_parametrizations(n[2], "weight"),
    ),
    "old weight norm": lambda n: nn.utils.weight_norm(n[2]),
    "old weight norm removed": lambda n: nn.utils.remove_weight_norm(nn.utils.weight_norm(n[2])),
    "spectral norm": lambda n: nn.utils.parametrizations.spectral_norm(n[2]).eval(),
    "tied": lambda n: setattr(n[6], "weight", nn.Parameter(n[2].weight.detach().transpose(0, 1)[:16].clone())),
    "shared memory": lambda n: [p.share_memory_() for p in n.parameters()],
}


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_after_a_change_of_the_weights(name: str) -> None:
    fused, plain = pair()
    backward(fused)
    for network in (fused, plain):
        torch.manual_seed(1)
        CHANGES[name](network)
    dtype = next(plain.parameters()).dtype
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, BOUND)
    assert_same(backward(fused, x=image().to(dtype)), backward(plain, x=image().to(dtype)), bound)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_weight_changed_before_the_backward_pass_is_noticed(autocast: bool) -> None:
    """Under autocast, too, where torch has a cast copy: README lists it."""
    network = FusedSequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    with torch.autocast("cpu", enabled=autocast):
        loss = network(normal(2, 64)).sum()
    with torch.no_grad():
        network[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_weight_in_two_layers() -> None:
    results = []
    for container in (FusedSequential, nn.Sequential):
        torch.manual_seed(0)
        first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        second.weight = first.weight
        results.append(backward(container(first, nn.ReLU(), second, nn.ReLU(), first, nn.MaxPool2d(2))))
    assert_same(*results)


# ---- tensors of other origins --------------------------------------------------------------------------------------


def test_copy_on_write_tensors_are_read_not_copied() -> None:
    x, weight = torch._lazy_clone(image()), torch._lazy_clone(normal(16, 3, 3, 3))
    assert_same([ops.conv3x3(x, weight)], [F.relu(F.conv2d(image(), normal(16, 3, 3, 3), padding=1))])
    assert torch._C._is_cow_tensor(x)
    assert torch._C._is_cow_tensor(weight)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_memory_of_numpy() -> None:
    array = image().numpy().copy()
    array.flags.writeable = False
    fused, plain = pair()
    assert_same([fused(torch.from_numpy(array)).detach()], [plain(image()).detach()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        fused, plain = pair()
        assert_same(
            backward(fused, x=image().to(dtype)),
            backward(plain, x=image().to(dtype)),
            BOUND if dtype == torch.float64 else 0.05,
        )
        assert_same(backward(fused.float()), backward(plain.float()))
    finally:
        torch.set_default_dtype(torch.float32)


def test_anomaly_mode() -> None:
    fused, plain = pair()
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        ours = backward(fused)
    assert_same(ours, backward(plain))


# ---- autograd's other ways -----------------------------------------------------------------------------------------


def offloaded(network: nn.Module) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        return backward(network)


def packed(network: nn.Module) -> list[Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return backward(network)


def retained(network: nn.Module) -> list[Tensor]:
    x = image().requires_grad_()
    y = network(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    return [x.grad, *(p.grad for p in network.parameters())]


def scaled(network: nn.Module) -> list[Tensor]:
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024), torch.optim.SGD(network.parameters(), 0.01)
    for seed in range(2):
        optimizer.zero_grad()
        scaler.scale(network(image(seed)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1024
    return [p.detach() for p in network.parameters()]


def hooked_backward(network: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    network.register_full_backward_hook(lambda m, into, out: seen.extend((into[0], out[0])))
    network[5].register_full_backward_hook(lambda m, into, out: seen.extend((into[0], out[0])))
    network[6].weight.register_hook(lambda g: seen.append(g))
    network[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    return backward(network) + seen


def from_inference_mode(network: nn.Module) -> list[Tensor]:
    with torch.inference_mode():
        y = network(image())
    assert y.is_inference()
    return [y.clone(), network(y.new_ones(1, 3, 16, 16)).detach()]


class Picture(Tensor):
    """As fastai's TensorImage: what is calculated of one is one, and its methods, `backward` too, run without that rule."""


def checkpointed_subclass(network: nn.Module) -> list[Tensor]:
    def run(x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(network, x.as_subclass(Picture), use_reentrant=False)
        assert type(y) is Picture
        return y

    return [t.as_subclass(Tensor) for t in backward(network, run)]


WAYS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "save_on_cpu": offloaded,
    "saved_tensors_hooks": packed,
    "retain_graph": retained,
    "GradScaler": scaled,
    "backward hooks": hooked_backward,
    "inference_mode": from_inference_mode,
    "deepcopy": lambda n: backward(copy.deepcopy(n)),
    "checkpoint of a subclass": checkpointed_subclass,
    "checkpoint_sequential": lambda n: backward(
        n, lambda x: torch.utils.checkpoint.checkpoint_sequential(n, 3, x, use_reentrant=False)
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_differentiate(name: str) -> None:
    # A full backward hook on the container forbids torch's own in-place ReLU at its input and output.
    fused, plain = pair(inplace=name != "backward hooks")
    assert_same(WAYS[name](fused), WAYS[name](plain))


def test_forward_mode_over_a_backward_pass() -> None:
    """The derivative of a gradient in a direction, where the forward pass knew nothing of it."""
    tangents = []
    for network in pair():
        x = image().requires_grad_()
        y = network(x)
        with torch.autograd.forward_ad.dual_level():
            seed = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.linspace(0, 1, y.numel()).view_as(y))
            tangents.append(
                [
                    torch.autograd.forward_ad.unpack_dual(g).tangent
                    for g in torch.autograd.grad(y, [x, *network.parameters()], seed)
                ]
            )
    assert_same(*tangents)


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.5, inplace=True),
    "Dropout2d": lambda: nn.Dropout2d(0.5, inplace=True),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5, inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
    "SiLU": lambda: nn.SiLU(inplace=True),
    "own module": AddOne,
    "nested": lambda: nn.Sequential(nn.Identity(), AddOne()),
    "behind a view": lambda: nn.Sequential(nn.Flatten(2), AddOne(), nn.Unflatten(2, (8, 8))),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_place_modules_behind_a_pooled_run(name: str, layout: torch.memory_format) -> None:
    """torch's pool does not need its output for the gradient, a pooled run with ReLU does: a module that may write gets a copy."""
    results = []
    for container in (FusedSequential, nn.Sequential):
        network = container(*layers()[:6], IN_PLACE[name](), nn.Conv2d(24, 4, 3, padding=1))
        torch.manual_seed(2)
        network[3].eval()
        results.append(backward(network, x=image().to(memory_format=layout)))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_in_half_precision(dtype: torch.dtype) -> None:
    x, weight = normal(2, 8, 6, 7, dtype=dtype, grad=True), normal(12, 8, 3, 3, dtype=dtype, grad=True)
    raw = torch.ops.vggfast
    for relu, pool in ((False, False), (True, True)):
        torch.library.opcheck(raw.conv3x3.default, (x, weight, None, relu, pool, pool))
    y, argmax = (t.detach() for t in raw.conv3x3(x, weight, None, True, True, True))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(raw.conv3x3_grad_input.default, (y, weight, None, argmax, 6, 7))
    torch.library.opcheck(raw.conv3x3_grad_weight.default, (x, y, None, argmax))
    torch.library.opcheck(raw.conv3x3_grad_weight.default, (x, ops.conv3x3(x, weight), None, None))
    torch.library.opcheck(raw.max_pool2x2.default, (x, True))
    torch.library.opcheck(raw.max_pool2x2_grad.default, (y, argmax, 6, 7))
