"""Where callbacks write that were not told."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl


def output_path(trainer: pl.Trainer, given: str | Path | None, *default: str) -> Path:
    """``given``, or else a path in Lightning's folder: that of the first logger, without one ``default_root_dir``.

    To be asked on all processes, which agree on that folder.
    """
    return Path(given) if given is not None else Path(trainer.log_dir or trainer.default_root_dir, *default)
