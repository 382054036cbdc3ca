"""segdcn-train: config → data → network → training → figures and pictures in a run folder."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segdcn.commands.arguments import before_composing
from segdcn.commands.configs import build_dataset
from segdcn.commands.console import console_script
from segdcn.commands.dispatch import kind_of
from segdcn.commands.kinds import check_kinds
from segdcn.commands.recipes import run_name
from segdcn.data.memory import keep_freed_memory
from segdcn.drawing.decoration import decoration
from segdcn.errors import UserError
from segdcn.runs.distributed import die_with_parent, is_first
from segdcn.runs.files import shown, typed, write_json
from segdcn.runs.record import resume_command

if TYPE_CHECKING:
    from segdcn.training.base import Task


@console_script("train", before_composing)
def main(config: DictConfig) -> float:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    from segdcn.commands.build import quiet_libraries
    from segdcn.commands.resume import resumed
    from segdcn.commands.run_folder import in_run_folder

    die_with_parent()
    keep_freed_memory()
    quiet_libraries()
    if config.resume:
        config = resumed(config, list(HydraConfig.get().overrides.task))
    elif config.name is None:
        config.name = run_name(HydraConfig.get().runtime.choices, list(HydraConfig.get().overrides.task))
    with in_run_folder(config):
        return train(config)


def train(config: DictConfig) -> float:
    """Train what ``config`` describes into ``config.output_dir``; returns the figure by which the run is judged.

    That is of the best checkpoint; NaN where nothing was validated.
    """
    from pytorch_lightning import seed_everything

    from segdcn.commands.build import build_datamodule, build_trainer
    from segdcn.commands.introduction import images_per_step, introduce
    from segdcn.commands.run_folder import leave_provenance
    from segdcn.training.figures import FiguresFile
    from segdcn.training.progress import training_seconds

    run = Path(config.output_dir)
    if not (isinstance(config.seed, int) and 0 <= config.seed < 2**32):
        raise UserError(f"seed must be a number from 0 to {2**32 - 1}, got {config.seed}")
    check_kinds(OmegaConf.to_container(config, resolve=True))
    seed_everything(config.seed, workers=True, verbose=False)

    dataset = build_dataset(config)
    kind = kind_of(dataset, config)
    found = kind.settle(config, dataset)
    notes = kind.labels_before_training(dataset) if is_first() else []  # before weights are fetched for what is refused
    data = build_datamodule(config, dataset)
    task = kind.build_task(config, dataset)
    conditions: dict[str, Any] = {"seed": config.seed}  # of the figures
    trainer = build_trainer(config, FiguresFile(run, conditions))
    conditions |= kind.check_network(config, dataset, task, trainer) | images_per_step(config, trainer)
    if trainer.is_global_zero:
        introduce(config, dataset, task, conditions, found, notes)
        leave_provenance(run, config)

    try:
        trainer.fit(task, datamodule=data, ckpt_path=config.resume, weights_only=True)
        if trainer.fast_dev_run:
            print(f"trainer.fast_dev_run: {trainer.max_steps} step(s) trained and validated, nothing is kept")
            return math.nan
        conditions["training_seconds"] = training_seconds(trainer)  # before validation reads the best checkpoint's
        checkpoint = _kept_checkpoint(run)
        conditions["checkpoint"] = None if checkpoint is None else checkpoint.name
        trainer.validate(task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    except SystemExit as end:  # Lightning's answer to Ctrl-C, and StopOnSignal's: 128 and the signal's number
        if trainer.is_global_zero and end.code:  # 0 is of a run that was pruned, which said so
            by = f" by {signal.Signals(end.code - 128).name}" if isinstance(end.code, int) and end.code > 128 else ""
            print(f"stopped{by}; continue with: {resume_command(run)}", flush=True)
        raise

    if trainer.is_global_zero:
        _conclude(config, dataset, task, conditions)
        if checkpoint is not None:
            print(f"evaluate with: segdcn-evaluate {typed(checkpoint, 'checkpoint')}", flush=True)
    return math.nan if task.result is None else float(task.result.figures[task.monitor])


def _kept_checkpoint(run: Path) -> Path | None:
    """The one that the figures are of: the best, the last where no epoch was validated; None where none is kept."""
    kept = (run / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    return next((path for path in kept if path.is_file()), None)


def _conclude(config: DictConfig, dataset: Any, task: Task, conditions: dict[str, Any]) -> None:
    """The figures, which are on the disk already, as a table and a page; none where nothing was validated."""
    kind, run = kind_of(dataset), Path(config.output_dir)
    if task.result is None:
        write_json(run / "metrics.json", {task.monitor: None, "split": "val", "images": 0, **conditions})
        why = "trainer.limit_val_batches=0" if len(dataset.split("val")) else "val has no image"
        print(f"{why}: nothing was validated, so there are no figures")
    else:
        with decoration("table", f"the figures are in {shown(run)}/metrics.json"):
            kind.print_figures(task.result, "val", dataset.class_names, conditions)
    if config.get("paper_miou") is not None:
        print(f"published for this setting: mean IoU {config.paper_miou:.2f}")
    pictures = f", pictures in {shown(run)}/panels" if (run / "panels").is_dir() else ""
    print(f"figures in {shown(run)}/metrics.json{pictures}")
    if config.report and not (run.parent / "sweep.json").exists():
        with decoration("report", f"segdcn-report {typed(run)} tries again"):
            print(f"report in {shown(kind.report_training(run, dataset))}")


if __name__ == "__main__":
    main()
