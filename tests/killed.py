"""python killed.py train|validation STEP ARGUMENTS...: segdcn-train, killed after STEP steps, before what is named.

As a scheduler or the kernel does it: SIGKILL, without a chance to save or to tidy up. The task's hook is exchanged
rather than its config, which the checkpoint would bring back when the run is resumed. KILLED_BY names another signal,
KILLED_RANK the one process that gets it instead of all; with KILLED_GROUP it goes to the whole process group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import segdcn.training.task
from segdcn.commands.train import main
from segdcn.runs.distributed import restarted

if "KILLED_AT" not in os.environ:
    # not on the command line, which Lightning repeats for the processes that it starts
    os.environ["KILLED_AT"] = " ".join(sys.argv[1:3])
    sys.argv[1:3] = []
MOMENT, STEP = os.environ["KILLED_AT"].split()
SIGNAL = signal.Signals[os.environ.get("KILLED_BY", "SIGKILL")]
RANK = os.environ.get("KILLED_RANK")


class KilledTask(segdcn.training.task.SegmentationTask):
    """Ends its process at the chosen moment."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._end_at("train")
        super().on_train_batch_start(batch, batch_idx)

    def on_validation_start(self) -> None:
        self._end_at("validation")

    def _end_at(self, moment: str) -> None:
        now = moment == MOMENT and self.trainer.global_step == int(STEP) and not self.trainer.sanity_checking
        if now and RANK in (None, str(self.global_rank)):
            if "KILLED_GROUP" in os.environ:
                subprocess.run(
                    ["kill", "-s", SIGNAL.name[3:], "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True
                )
            else:
                os.kill(os.getpid(), SIGNAL)


if not restarted():
    segdcn.training.task.SegmentationTask = KilledTask
main()
