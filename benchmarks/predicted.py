"""Predicted against measured, for each layer of a GPU's results: python benchmarks/predicted.py benchmarks/results/<device>

Prints the table, and writes it as data into the folder of that name in the device's: predicted/layers.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vggfast.bench import predicted, results


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="a device's folder of results, with layers.json")
    folder = options.parse_args().folder
    data = results.load(folder / "layers.json")
    rows, ceilings = predicted.rows(data), predicted.ceilings_of(data)
    target = folder / "predicted" / "layers.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(predicted.to_dict(rows, ceilings), indent=1) + "\n")
    print(predicted.table(rows, ceilings))
    print(target)


if __name__ == "__main__":
    main()
