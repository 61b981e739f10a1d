"""Write README's section on speed, that of losses in docs/features.md, that of other layers in docs/numerics.md and the pictures
from the data in benchmarks/results:

    python benchmarks/report.py

The device whose results the pages show is the one in README_DEVICE; README has a column for every other one, and each folder gets
its own pictures.
"""

from __future__ import annotations

from os.path import relpath
from pathlib import Path

from vggfast.bench import elsewhere, loss_report, plots, report, results, shape_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
FEATURES = ROOT / "docs/features.md"
NUMERICS = ROOT / "docs/numerics.md"
README_DEVICE = "amd-epyc-zen4-2core"
BEGIN = "<!-- written by python benchmarks/report.py from benchmarks/results; do not edit -->"
END = "<!-- end of what benchmarks/report.py writes -->"
NOTHING = "No results are recorded yet: `python benchmarks/record.py` measures this machine."


def measured_devices() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if path.is_dir()) if RESULTS.is_dir() else []


def pictures(folder: Path, names: dict[str, str], page: Path) -> dict[str, str]:
    """Titles and paths, as seen from ``page``, of those pictures that are there."""
    paths = {title: folder / f"{name}.png" for title, name in names.items()}
    return {title: Path(relpath(path, page.parent)).as_posix() for title, path in paths.items() if path.exists()}


def section(folder: Path) -> str:
    """README's text for the device of ``folder``, whose pictures are there already; it says so where nothing was recorded."""
    if not folder.is_dir():
        return NOTHING
    own = report.markdown(results.load_folder(folder), pictures(folder, plots.PICTURES, README))
    others = [(results.load_folder(other), relpath(other, ROOT)) for other in measured_devices() if other != folder]
    return f"{own.rstrip()}\n\n{elsewhere.tables(others)}\n"


def losses_section(folder: Path) -> str:
    """The same of docs/features.md."""
    if not folder.is_dir():
        return loss_report.NOTHING
    return loss_report.markdown(results.load_folder(folder), pictures(folder, plots.LOSS_PICTURES, FEATURES))


def shapes_section(folder: Path) -> str:
    """The same of docs/numerics.md."""
    path = folder / "shapes.json"
    return shape_report.markdown(results.load(path)) if path.exists() else shape_report.NOTHING


def pages(folder: Path) -> dict[Path, str]:
    """Each page with its section replaced by that of the device of ``folder``."""
    return {
        page: report.splice(page.read_text(), text, BEGIN, END)
        for page, text in (
            (README, section(folder)),
            (FEATURES, losses_section(folder)),
            (NUMERICS, shapes_section(folder)),
        )
    }


def main() -> None:
    for folder in measured_devices():
        for path in plots.draw_all(results.load_folder(folder), folder).values():
            print(path.relative_to(ROOT))
    for page, text in pages(RESULTS / README_DEVICE).items():
        page.write_text(text)
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
