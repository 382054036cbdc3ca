"""segdcn-train: config → data → network → training → figures and pictures in a run folder."""

from __future__ import annotations

import math
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override

from segdcn import UserError
from segdcn.commands.compose import (
    build_datamodule,
    build_dataset,
    build_evaluator,
    build_task,
    build_trainer,
    freely,
    may_change_on_resume,
    quiet_libraries,
    resumed,
)
from segdcn.commands.console import console_script
from segdcn.commands.kinds import check_kinds
from segdcn.drawing.decoration import decoration
from segdcn.runs.files import read_object, shown, typed, write_json, write_text
from segdcn.runs.folder import owned, reporting, run_folder_of
from segdcn.runs.overrides import split_override
from segdcn.training.distributed import die_with_parent, is_first, new_run_folder, restarted


def train(config: DictConfig) -> float:
    """Train what ``config`` describes into ``config.output_dir``; returns the best checkpoint's val mIoU.

    NaN where nothing was validated.
    """
    from pytorch_lightning import seed_everything

    from segdcn.commands.figures import print_figures
    from segdcn.data.labels import labels_before_training
    from segdcn.models.cost import network_cost
    from segdcn.training.figures import FiguresFile
    from segdcn.training.progress import training_seconds

    run = Path(config.output_dir)
    if not (isinstance(config.seed, int) and 0 <= config.seed < 2**32):
        raise UserError(f"seed must be a number from 0 to {2**32 - 1}, got {config.seed}")
    check_kinds(OmegaConf.to_container(config, resolve=True))
    seed_everything(config.seed, workers=True, verbose=False)

    dataset = build_dataset(config)
    data = build_datamodule(config, dataset)
    task = build_task(config, dataset)
    task.evaluator = build_evaluator(config.protocol, dataset, "val")
    facts: dict[str, Any] = {"seed": config.seed}
    trainer = build_trainer(config, FiguresFile(run, facts))
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true works on GPUs only: on CPUs set trainer.sync_batchnorm=false")
    size = _check_network(config, dataset, task, trainer)
    facts |= network_cost(task.network, size) | _images_per_step(config, trainer)

    if trainer.is_global_zero:
        notes = labels_before_training(dataset)
        _introduce(config, dataset, task.network, facts)
        for note in notes:
            print(f"note     {note}", flush=True)
        _leave_provenance(run, config)

    try:
        trainer.fit(task, datamodule=data, ckpt_path=config.resume, weights_only=True)
        if trainer.fast_dev_run:
            print(f"trainer.fast_dev_run: {trainer.max_steps} step(s) trained and validated, nothing is kept")
            return math.nan
        facts["training_seconds"] = training_seconds(trainer)  # before validation reads the best checkpoint's
        checkpoint = _kept_checkpoint(run)
        facts["checkpoint"] = None if checkpoint is None else checkpoint.name
        trainer.validate(task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    except SystemExit as end:  # Lightning's answer to Ctrl-C, and StopOnSignal's: 128 and the signal's number
        if trainer.is_global_zero:
            by = f" by {signal.Signals(end.code - 128).name}" if isinstance(end.code, int) and end.code > 128 else ""
            print(f"stopped{by}; continue with: segdcn-train {typed(run, 'resume')}", flush=True)
        raise

    if trainer.is_global_zero:
        if task.result is None:
            write_json(run / "metrics.json", {"val/miou": None, "split": "val", "images": 0, **facts})
            why = "trainer.limit_val_batches=0" if len(dataset.split("val")) else "val has no image"
            print(f"{why}: nothing was validated, so there are no figures")
        else:
            with decoration("table", f"the figures are in {shown(run)}/metrics.json"):
                print_figures(task.result, "val", dataset.class_names, facts)
        if config.get("paper_miou") is not None:
            print(f"published for this setting: mean IoU {config.paper_miou:.2f}")
        pictures = f", pictures in {shown(run)}/panels" if (run / "panels").is_dir() else ""
        print(f"figures in {shown(run)}/metrics.json{pictures}")
        if config.report and not (run.parent / "sweep.json").exists():
            with decoration("report", f"segdcn-report {typed(run)} tries again"):
                _report(run, dataset)
        if checkpoint is not None:
            print(f"evaluate with: segdcn-evaluate {typed(checkpoint, 'checkpoint')}", flush=True)
    return math.nan if task.result is None else float(task.result.figures["val/miou"])


def _leave_provenance(run: Path, config: DictConfig) -> None:
    """What the run is made by; a resume adds its own command and versions to those that began the run."""
    from segdcn.runs.environment import environment

    now, file = environment(config.seed), run / "environment.json"
    if not config.resume:
        write_text(run / "config.yaml", OmegaConf.to_yaml(config))
        write_json(file, now)
    elif file.is_file():
        begun = read_object(file, "delete it to do without it")
        write_json(file, {**begun, "resumed": [*begun.get("resumed", []), now]})


def _check_network(config: DictConfig, dataset: Any, task: Any, trainer: Any) -> tuple[int, int]:
    """That the network can do with what it is given, before it is; returns the size of what it trains on.

    That is a crop, or one image where training sees whole ones.
    """
    import torch

    from segdcn.models.contract import check_logits

    samples = dataset.split("val")
    height, width = (samples if len(samples) else dataset.split("train"))[0].label.shape
    validated = task.evaluator.protocol.prepare(torch.empty(1, 3, height, width, device="meta")).shape
    trained: tuple[int, int] = tuple(config.datamodule.crop_size or (height, width))
    images = config.datamodule.batch_size * (trainer.world_size if config.trainer.get("sync_batchnorm") else 1)
    evaluated = (validated[2], validated[3])
    device = trainer.strategy.root_device
    check_logits(task.network, len(dataset.class_names), (images, trained), [evaluated], device)
    return trained


def _introduce(config: DictConfig, dataset: Any, network: Any, facts: dict[str, Any]) -> None:
    """What is trained on what, in a few lines."""
    from segdcn.models import deformable_layers

    images = ", ".join(f"{len(dataset.split(split))} {split}" for split in ("train", "val"))
    print(f"data     {config.name}: {images} images, {len(dataset.class_names)} classes")
    print(f"network  {_in_words(config.model)}, {facts['parameters'] / 1e6:.2f} M parameters")
    print(f"         deformable: {', '.join(deformable_layers(network)) or 'no layer'}")
    print(f"batch    {_batch(config, network, facts['images_per_step'])}")
    run = shown(config.output_dir)
    print(f"run      {run}" + (f", resumed from {Path(config.resume).name}" if config.resume else ""), flush=True)


def _in_words(model: DictConfig) -> str:
    """A network of ours by its parts, another one by its class."""
    if str(model._target_).endswith(".build_deeplab"):
        return f"{model.backbone}, {model.head} head, output stride {model.get('output_stride')}"
    return str(model._target_)


def _images_per_step(config: DictConfig, trainer: Any) -> dict[str, Any]:
    """How many images one step of the optimizer sees, and how many the recipe's protocol has."""
    images = config.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    return {"images_per_step": images, "images_per_step_of_recipe": config.images_per_step}


def _batch(config: DictConfig, network: Any, images: int) -> str:
    """What makes a step, how far it goes, and what of the settings is not as it seems."""
    from segdcn.training.optim import parameter_groups

    batch, accumulated = config.datamodule.batch_size, config.trainer.get("accumulate_grad_batches") or 1
    parts = [f"{batch} images"]
    for number, what in ((images // (batch * accumulated), "devices"), (accumulated, "accumulated")):
        if number > 1:
            parts.append(f"{number} {what}")
    total = f" = {images} per step" if len(parts) > 1 else ""
    rate = f", learning rate {config.optimizer.lr:g}" if "lr" in config.optimizer else ""
    roles = {group["name"].removesuffix("_no_decay") for group in parameter_groups(network)}
    factors = {"backbone": config.task.backbone_lr_mult, "offset": config.task.offset_lr_mult}
    told = [
        f"{name} x {factors[role]:g}"
        for role, name in (("backbone", "backbone"), ("offset", "offsets"))
        if factors[role] != 1 and role in roles
    ]
    lines = [" x ".join(parts) + total + rate + (f" ({', '.join(told)})" if told else "")]
    if config.task.backbone_lr_mult != 1 and "backbone" not in roles:
        lines.append("note     task.backbone_lr_mult has no effect: the network has no part backbone that learns")
    if config.images_per_step not in (None, images):
        lines.append(
            f"note     the recipe's protocol has {config.images_per_step} images per step, this run {images}:"
            " trainer.devices x datamodule.batch_size x trainer.accumulate_grad_batches"
        )
    return "\n".join(lines)


def _kept_checkpoint(run: Path) -> Path | None:
    """The one that the figures are of: the best, the last where no epoch was validated; None where none is kept."""
    kept = (run / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    return next((path for path in kept if path.is_file()), None)


def _report(run: Path, dataset: Any) -> None:
    from segdcn.report.contents import report_run

    page = report_run(run, lambda _: dataset, budget=None, trust=True)
    print(f"report in {shown(page)}")


@contextmanager
def _in_run_folder(config: DictConfig) -> Iterator[None]:
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


def _for_a_resume(overrides: list[str]) -> list[str]:
    """A resumed run's config may have keys that the default one, which Hydra composes, has not."""
    resumes = any(split_override(override)[0] == "resume" for override in overrides)
    return freely(may_change_on_resume)(overrides) if resumes else overrides


@console_script("train", _for_a_resume)
def main(config: DictConfig) -> float:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    die_with_parent()
    quiet_libraries()
    if config.resume:
        config = resumed(config, list(HydraConfig.get().overrides.task))
    config.name = str(config.name)  # resolved once: a resumed run no longer knows Hydra's choices
    with _in_run_folder(config):
        return train(config)


if __name__ == "__main__":
    main()
