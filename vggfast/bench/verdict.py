"""Whether an answer is right enough to be timed."""

from __future__ import annotations

from math import isinf
from typing import TYPE_CHECKING, Any

from vggfast.bench.cases import LOSSES

if TYPE_CHECKING:
    from vggfast.bench.measure import Entry


def judge(entry: Entry, errors: dict[str, float], own_errors: dict[str, float], follows_input: bool) -> dict[str, Any]:
    """The record of a check: the error nearest its limit, and ``refused`` with the reason if the contender must not be timed."""
    case = entry.case
    kind = "layer" if case.layer else "gradients" if case.task in ("training", *LOSSES) else "network"
    fixed = TOLERANCES.get((kind, case.products), 0.0)
    limits = {name: max(fixed, 2 * own_errors.get(name, 0.0)) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    error, limit = errors[worst], limits[worst]
    record: dict[str, Any] = {"error": error, "error_of": worst, "tolerance": limit}
    if not error <= limit or isinf(error):  # torch's own may be infinite, too
        record["refused"] = f"relative error of {worst}: expected at most {limit:.1e} against float64, got {error:.2e}"
    elif not follows_input:
        record["refused"] = "expected other outputs for other inputs, got the same: it does not calculate"
    return record


# A layer in float32 may use Winograd's 5e-6; a network adds up its layers. A network's gradients: an activation within rounding of
# zero opens its ReLU in one computation and not in the other, and a tie within rounding sends a pool's gradient elsewhere; one of
# these can be 1e-2 of a bias's gradient. In bfloat16 that is so frequent that a gradient may have twice the error that torch's own
# autocast has. A layer's gradients are checked where no such decision is near: to this, or to twice torch's own error where that is
# larger, as of conv1_1's filters and bias, which torch adds up over 400,000 pixels in float32.
# TF32 has three bits more than bfloat16.
TOLERANCES = {
    ("layer", "fp32"): 5e-6,
    ("layer", "bf16"): 5e-3,
    ("layer", "tf32"): 5e-3 / 8,
    ("network", "fp32"): 5e-5,
    ("network", "bf16"): 5e-2,
    ("network", "tf32"): 5e-2 / 8,
    ("gradients", "fp32"): 5e-2,
    ("gradients", "tf32"): 5e-2,
}
