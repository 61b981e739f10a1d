"""`vggfast.distances` by themselves: in pieces, where all features are zero, and what they keep for the gradient."""

from __future__ import annotations

import pytest
import torch
from reference import normal

from vggfast import distances
from vggfast.bench.memory import Saved

RULES = {
    "l1": distances.Absolute(),
    "l2": distances.Squared(),
    "huber": distances.Huber(0.3),
    "unit": distances.Unit(),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_distances_in_pieces(name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients, and gradients of gradients, calculated in pieces of images and of rows, against autograd on the whole."""
    rule = RULES[name]
    weights = (torch.rand(5, dtype=torch.float64),) if name == "unit" else ()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a, b = (normal(3, 5, 4, 3, seed=s).double().to(memory_format=layout).requires_grad_() for s in (0, 1))
    grad = normal(3, 4, 3, seed=2).double()
    expected = rule.value(a, b, *weights)
    gradients = torch.autograd.grad(expected, (a, b), grad)
    for piece in (1, 40, 130, 1 << 19):
        monkeypatch.setattr(distances, "PIECE", piece)
        found = distances.rows(rule, a, b, *weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(found, (a, b), grad), gradients, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda a, b: distances.rows(rule, a, b, *weights), (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_where_all_features_are_zero(dtype: torch.dtype) -> None:
    a, b, head = (
        torch.zeros(1, 8, 2, 2, dtype=dtype, requires_grad=True),
        normal(1, 8, 2, 2, dtype=dtype),
        torch.rand(8),
    )
    assert not torch.autograd.grad(distances.rows(distances.Unit(), a, b, head).sum(), a)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_keep_the_two_maps_only(dtype: torch.dtype) -> None:
    a, b = normal(2, 8, 16, 16, dtype=dtype, grad=True), normal(2, 8, 16, 16, dtype=dtype, seed=1)
    head = torch.rand(8)
    for name, rule in RULES.items():
        with Saved([head]) as saved:
            distances.rows(rule, a, b, *([head] if name == "unit" else []))
        assert saved.bytes == 2 * a.numel() * a.element_size()
