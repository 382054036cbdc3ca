"""The README's table: plain against deformable on the shapes data set, several seeds each, on val and test.

    python scripts/shapes_gain.py [--seeds 0 1 2] [--folder runs/shapes_gain] [key=value ...]

Each run is one segdcn-train and one segdcn-evaluate split=test; runs that are finished are not repeated, a run that
was stopped is resumed. Further key=value options are passed to every segdcn-train.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

NETWORKS = {"plain": 0, "deformable": 3}


def run(folder: Path, layers: int, seed: int, options: list[str]) -> dict[str, float]:
    """Train and test one network; its figures by split."""
    train = [sys.executable, "-m", "segdcn.train"]
    if not (folder / "metrics.json").exists():
        if (folder / "checkpoints" / "last.ckpt").exists():
            subprocess.run([*train, f"resume={folder}"], check=True)
        else:
            settings = [f"model.deform.layers={layers}", f"seed={seed}", f"output_dir={folder}", *options]
            subprocess.run([*train, *settings], check=True)
    test = folder / "evaluation" / "best_test" / "metrics.json"
    if not test.exists():
        checkpoint = folder / "checkpoints" / "best.ckpt"
        subprocess.run([sys.executable, "-m", "segdcn.evaluate", f"checkpoint={checkpoint}", "split=test"], check=True)
    return {
        "val": json.loads((folder / "metrics.json").read_text())["val/miou"],
        "test": json.loads(test.read_text())["test/miou"],
    }


def main() -> None:
    """Run what is missing and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/shapes_gain"))
    arguments, options = parser.parse_known_args()

    figures = {
        name: [run(arguments.folder / f"{name}_seed{seed}", layers, seed, options) for seed in arguments.seeds]
        for name, layers in NETWORKS.items()
    }
    print("\n| split | network | " + " | ".join(f"seed {seed}" for seed in arguments.seeds) + " | mean |")
    print("|---|---|" + "---|" * (len(arguments.seeds) + 1))
    for split in ("val", "test"):
        rows = {name: [one[split] for one in runs] for name, runs in figures.items()}
        rows["difference"] = [b - a for a, b in zip(rows["plain"], rows["deformable"], strict=True)]
        for name, values in rows.items():
            cells = " | ".join(f"{value:.4f}" for value in [*values, statistics.mean(values)])
            print(f"| {split} | {name} | {cells} |")


if __name__ == "__main__":
    main()
