"""Write README's section on speed and its pictures from the data in benchmarks/results: python benchmarks/report.py

The device whose results README shows is the one in README_DEVICE; every device's folder gets its own pictures.
"""

from __future__ import annotations

from pathlib import Path

from vggfast.bench import plots, report, results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
README_DEVICE = "amd-epyc-zen4-2core"
BEGIN = "<!-- written by python benchmarks/report.py from benchmarks/results; do not edit -->"
END = "<!-- end of what benchmarks/report.py writes -->"
NOTHING = "No results are recorded yet: `python benchmarks/record.py` measures this machine."


def measured_devices() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if path.is_dir()) if RESULTS.is_dir() else []


def section(folder: Path) -> str:
    """README's text for the device of ``folder``, whose pictures are there already; it says so where nothing was recorded."""
    if not folder.is_dir():
        return NOTHING
    data = results.load_folder(folder)
    pictures = {title: (folder / f"{name}.png").relative_to(ROOT).as_posix() for title, name in plots.PICTURES.items()}
    return report.markdown(data, {title: path for title, path in pictures.items() if (ROOT / path).exists()})


def main() -> None:
    for folder in measured_devices():
        for path in plots.draw_all(results.load_folder(folder), folder).values():
            print(path.relative_to(ROOT))
    text = section(RESULTS / README_DEVICE)
    README.write_text(report.splice(README.read_text(), text, BEGIN, END))
    print("README.md")


if __name__ == "__main__":
    main()
