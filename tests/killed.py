"""python killed.py train|validation STEP ARGUMENTS...: segdcn-train, killed after STEP steps, before what is named.

As a scheduler or the kernel does it: SIGKILL, without a chance to save or to tidy up. The task's hook is exchanged
rather than its config, which the checkpoint would bring back when the run is resumed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import segdcn.task
from segdcn.train import main

MOMENT, STEP = sys.argv[1], int(sys.argv[2])


class KilledTask(segdcn.task.SegmentationTask):
    """Ends its process at the chosen moment."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._end_at("train")
        super().on_train_batch_start(batch, batch_idx)

    def on_validation_start(self) -> None:
        self._end_at("validation")

    def _end_at(self, moment: str) -> None:
        if moment == MOMENT and self.trainer.global_step == STEP and not self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGKILL)


segdcn.task.SegmentationTask = KilledTask
sys.argv[1:3] = []
main()
