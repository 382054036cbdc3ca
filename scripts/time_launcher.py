"""What the launcher adds to a job: the same small trainings one after the other, by hand and as a sweep.

    python scripts/time_launcher.py [--jobs 6] [--repeats 3]

Both start every training as a process of its own; by hand the next one is started when the last one has ended. The
sweep's own start (Python, Hydra, the plan) is there once, whatever the number of jobs, and is told apart: it is the
time of the same command when all its jobs are finished.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = (
    "dataset.train_images=16",
    "dataset.val_images=4",
    "datamodule.batch_size=8",
    "datamodule.eval_batch_size=4",
    "trainer.max_epochs=1",
    "callbacks.panels=null",
    "logger=none",
)


def seconds(folder: Path, *arguments: str) -> float:
    """Wall time of one segdcn-train."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "segdcn.commands.train", *arguments, *SETTINGS]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Print the medians over the repeats, which alternate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    by_hand, swept, started = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds(folder, "output_dir=warm")
        for repeat in range(options.repeats):
            by_hand.append(sum(seconds(folder, f"seed={n}", f"output_dir={repeat}_{n}") for n in range(options.jobs)))
            sweep = ("-m", f"seed=range({options.jobs})", f"sweep.name={repeat}", "launcher.slots=1")
            swept.append(seconds(folder, *sweep))
            started.append(seconds(folder, *sweep))
    hand, sweep_seconds, start = (statistics.median(values) for values in (by_hand, swept, started))
    print(
        f"{options.jobs} jobs by hand {hand:.1f} s, as a sweep {sweep_seconds:.1f} s, its start and table {start:.1f} s"
    )
    print(f"more per job: {(sweep_seconds - start - hand) / options.jobs:.2f} s")


if __name__ == "__main__":
    main()
