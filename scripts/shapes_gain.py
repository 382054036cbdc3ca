"""The README's table: plain, dilated and deformable networks on the shapes data set, several seeds each.

    python scripts/shapes_gain.py [--seeds 0 1 2] [--folder runs/shapes_gain] [key=value ...]

Each run is one segdcn-train and one segdcn-evaluate split=test; runs that are finished are not repeated, a run that
was stopped is resumed. Further key=value options are passed to every segdcn-train.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from scipy import stats

NETWORKS = {
    "plain": ["model.deform.layers=0"],
    "dilated": ["model.deform.layers=0", "model.fixed_dilation=2"],
    "deformable": ["model.deform.layers=3"],
}


def run(folder: Path, options: list[str]) -> dict[str, float]:
    """Train and test one network; its mIoU by split."""
    train = [sys.executable, "-m", "segdcn.train"]
    if not (folder / "metrics.json").exists():
        begun = (folder / "checkpoints" / "last.ckpt").exists()
        subprocess.run([*train, *([f"resume={folder}"] if begun else [f"output_dir={folder}", *options])], check=True)
    test = folder / "evaluation" / "best_test" / "metrics.json"
    if not test.exists():
        checkpoint = folder / "checkpoints" / "best.ckpt"
        subprocess.run([sys.executable, "-m", "segdcn.evaluate", f"checkpoint={checkpoint}", "split=test"], check=True)
    return {
        "val": json.loads((folder / "metrics.json").read_text())["val/miou"],
        "test": json.loads(test.read_text())["test/miou"],
    }


def mean_and_interval(values: list[float]) -> str:
    """Mean ± half the width of its 95 % interval (Student's t over the seeds), in points."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    error = 100 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.2f}"


def main() -> None:
    """Run what is missing and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/shapes_gain"))
    arguments, options = parser.parse_known_args()

    figures = {
        name: [
            run(arguments.folder / f"{name}_seed{seed}", [f"seed={seed}", *settings, *options])
            for seed in arguments.seeds
        ]
        for name, settings in NETWORKS.items()
    }
    seeds = " | ".join(f"seed {seed}" for seed in arguments.seeds)
    print(f"\n| split | network | {seeds} | mean | more than plain, paired by seed |")
    print("|---|---|" + "---|" * (len(arguments.seeds) + 2))
    for split in ("val", "test"):
        plain = [one[split] for one in figures["plain"]]
        for name, runs in figures.items():
            values = [one[split] for one in runs]
            gain = [b - a for a, b in zip(plain, values, strict=True)]
            cells = " | ".join(f"{100 * value:.2f}" for value in values)
            compared = "" if name == "plain" else mean_and_interval(gain)
            print(f"| {split} | {name} | {cells} | {mean_and_interval(values)} | {compared} |")


if __name__ == "__main__":
    main()
