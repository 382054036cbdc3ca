"""The folder of a training: one that no other run has, or that of the run which goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override

from segdcn.errors import UserError
from segdcn.runs.distributed import is_first, new_run_folder, restarted
from segdcn.runs.environment import environment
from segdcn.runs.files import read_object, shown, write_json, write_text
from segdcn.runs.folder import owned, reporting, run_folder_of


@contextmanager
def in_run_folder(config: DictConfig) -> Iterator[None]:
    """``config.output_dir`` set to the folder of this run, which no other run has.

    The first of its processes makes and locks it. The others that Lightning starts are told it as ``hydra.run.dir``.
    """
    last = Path("checkpoints", "last.ckpt")
    hydra = HydraConfig.get()
    first = is_first()
    with ExitStack() as stack:
        if config.resume:
            folder = run_folder_of(Path(config.resume))
        elif hydra.run.dir != ".":
            folder = Path(hydra.run.dir)
        elif config.trainer.get("fast_dev_run"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segdcn-")))
        elif config.output_dir:
            folder = Path(config.output_dir)
        else:
            folder = new_run_folder(Path("runs", config.name))
        folder = folder.absolute()
        if first:
            stack.enter_context(owned(folder))
        again = bool(config.resume) or restarted()
        if first and not again:
            _check_new(folder)
        if restarted() and not config.resume and (folder / last).exists():  # the same command again: it goes on
            config.resume = str(folder / last)
        with flag_override(cast(DictConfig, hydra), ["readonly", "struct"], False):
            hydra.run.dir = str(folder)
        config.output_dir = str(folder)
        with reporting(folder, first):
            yield


def _check_new(folder: Path) -> None:
    """That no run finished anything in the folder; one that was killed before it did is begun anew."""
    if (folder / "checkpoints" / "last.ckpt").exists():
        raise UserError(
            f"{shown(folder)} holds a run already: continue it with resume={shown(folder)} or choose another output_dir"
        )
    if any(folder.glob("checkpoints/*.ckpt")) or any(folder.glob("metrics.*")):
        raise UserError(
            f"{shown(folder)} holds a run already, without a checkpoints/last.ckpt to continue it from: choose another"
            " output_dir, or delete that folder"
        )


def leave_provenance(run: Path, config: DictConfig) -> None:
    """What the run is made by; a resume adds its own command and versions to those that began the run."""
    now, file = environment(config.seed), run / "environment.json"
    if not config.resume:
        write_text(run / "config.yaml", OmegaConf.to_yaml(config))
        write_json(file, now)
    elif file.is_file():
        begun = read_object(file, "delete it to do without it")
        write_json(file, {**begun, "resumed": [*begun.get("resumed", []), now]})
