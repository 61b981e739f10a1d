"""The measured time and memory of losses on features, for docs/features.md, from results."""

from __future__ import annotations

from collections.abc import Iterator

from vggfast.bench.plots import DTYPE_NAMES, TASK_NAMES
from vggfast.bench.report import amount, measured_on
from vggfast.bench.results import Json, contender, group
from vggfast.bench.rows import OURS

CONTENDERS = (OURS, "torch channels_last", "torch NCHW", "torch.compile", "lpips package")
CASES = (("lpips", "fp32", 1), ("lpips", "fp32", 8), ("lpips", "bf16", 8), ("perceptual", "fp32", 8))
NOTHING = (
    "Nothing is recorded yet: `python benchmarks/record.py --part perceptual` and `--part memory` measure this machine."
)


def markdown(data: Json, pictures: dict[str, str]) -> str:
    """The section: a line for each time and each amount of memory, a column for each contender; then pictures (title to path)."""
    lines = [line for case in CASES for line in _lines(data, *case)]
    if not lines:
        return NOTHING
    shown = [name for i, name in enumerate(CONTENDERS) if any(cells[i + 1] for cells in lines)]
    kept = [0, *(i + 1 for i, name in enumerate(CONTENDERS) if name in shown)]
    text = [
        measured_on(data, ("vggfast", "torch", "lpips")),
        "The loss of 224×224 images beside targets with the gradient of the images: the time of a batch, what autograd saves "
        "between forward and backward, and the most that a run takes beyond weights and images.",
        "",
        f"| | {' | '.join(shown)} |",
        "|---|" + "---|" * len(shown),
        *(f"| {' | '.join(cells[i] for i in kept)} |" for cells in lines),
        "",
    ]
    for title, path in pictures.items():
        text += [f"![{title}]({path})", ""]
    return "\n".join(text)


def _lines(data: Json, task: str, dtype: str, batch: int) -> Iterator[list[str]]:
    """What is measured, and each contender's; nothing where vggfast's is not recorded."""
    case = f"vgg16 {task} {dtype} batch {batch}"
    about = f"{TASK_NAMES[task]}, {DTYPE_NAMES[dtype]}{' autocast' if dtype == 'bf16' else ''}, batch {batch}"
    for what, identifier, field in (
        ("time", case, "seconds"),
        ("saved", f"memory: {case}", "saved_bytes"),
        ("peak", f"memory: {case}", "peak_bytes"),
    ):
        cells = []
        for label in CONTENDERS:
            record = contender(group(data, identifier), label)
            value = record[field]["median"] if record and field == "seconds" else record[field] if record else None
            cells.append("" if value is None else amount(value, field))
        if cells[0]:
            yield [f"{about}: {what}", f"**{cells[0]}**", *cells[1:]]
