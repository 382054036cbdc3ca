"""segdcn-train: config → data → network → training → figures and pictures in a run folder."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segdcn.assembly import (
    CONFIG_PATH,
    build_datamodule,
    build_dataset,
    build_evaluator,
    build_task,
    build_trainer,
    one_line_errors,
    quiet_libraries,
    resumed,
)
from segdcn.processes import die_with_parent, restarted


def train(config: DictConfig) -> float:
    """Train what ``config`` describes into ``config.output_dir``; returns the best checkpoint's val mIoU."""
    from pytorch_lightning import seed_everything
    from pytorch_lightning.utilities import rank_zero_only

    from segdcn.callbacks import training_seconds
    from segdcn.evaluation.summary import summarize
    from segdcn.models import deformable_layers
    from segdcn.models.cost import network_cost
    from segdcn.run_folder import environment, find_checkpoint, shown, write_json, write_text

    run = Path(config.output_dir)
    # known from the environment, before there is a Trainer
    first_process = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first_process and not config.resume and not restarted() and (run / "config.yaml").exists():
        raise ValueError(
            f"{shown(run)} holds a run already: continue it with resume={shown(run)} or choose another output_dir"
        )
    seed_everything(config.seed, workers=True, verbose=False)

    dataset = build_dataset(config)
    data = build_datamodule(config, dataset)
    task = build_task(config, dataset)
    task.evaluator = build_evaluator(config.get("protocol", "native"), dataset, "val")  # older runs name none
    trainer = build_trainer(config)
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm=true works on GPUs only: on CPUs set trainer.sync_batchnorm=false")
    # of a crop, or of one image where training sees whole ones
    height, width = config.datamodule.crop_size or dataset.split("val")[0].label.shape
    cost = network_cost(task.network, (height, width))

    if trainer.is_global_zero:
        images = ", ".join(f"{len(dataset.split(split))} {split}" for split in ("train", "val"))
        print(f"data     {config.name}: {images} images, {len(dataset.class_names)} classes")
        print(
            f"network  {config.model.backbone}, {config.model.head} head, output stride {config.model.output_stride}, "
            f"{cost['parameters'] / 1e6:.2f} M parameters"
        )
        print(f"         deformable: {', '.join(deformable_layers(task.network)) or 'no layer'}")
        print(f"batch    {_batch(config, trainer)}")
        print(
            f"run      {shown(run)}" + (f", resumed from {Path(config.resume).name}" if config.resume else ""),
            flush=True,
        )
        if not config.resume:
            write_text(run / "config.yaml", OmegaConf.to_yaml(config))
            write_json(run / "environment.json", environment(config.seed))

    try:
        trainer.fit(task, datamodule=data, ckpt_path=config.resume, weights_only=True)
        cost["training_seconds"] = training_seconds(trainer)  # before validation reads the best checkpoint's
        checkpoint = run / "checkpoints" / "best.ckpt"
        if not checkpoint.exists():  # no epoch of this run was validated
            checkpoint = find_checkpoint(run)
        trainer.validate(task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    except SystemExit as end:  # Lightning's answer to Ctrl-C, and StopOnSignal's: 128 and the signal's number
        if trainer.is_global_zero:
            by = f" by {signal.Signals(end.code - 128).name}" if isinstance(end.code, int) and end.code > 128 else ""
            print(f"stopped{by}; continue with: segdcn-train resume={shown(run)}", flush=True)
        raise

    if trainer.is_global_zero:
        cost["seconds_per_image"] = task.result.seconds_per_image
        facts = {**task.evaluator.describe(), "checkpoint": checkpoint.name, "seed": config.seed, **cost}
        summarize(task.result, "val", dataset.class_names, facts, run / "metrics.json")
        if config.get("paper_miou") is not None:
            print(f"published for this setting: mean IoU {config.paper_miou:.2f}")
        pictures = f", pictures in {shown(run)}/panels" if config.callbacks.panels else ""
        print(f"figures in {shown(run)}/metrics.json{pictures}")
        if config.get("report", True) and not (run.parent / "sweep.json").exists():  # older runs name none
            _report(run, dataset)
        print(f"evaluate with: segdcn-evaluate checkpoint={shown(checkpoint)}", flush=True)
    return float(task.result.figures["val/miou"])


def _report(run: Path, dataset: Any) -> None:
    """report.html in the run folder; whatever goes wrong with it, the training is finished."""
    from segdcn.run_folder import shown

    try:
        from segdcn.report.contents import report_run

        page = report_run(run, lambda _: dataset, budget=None)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: no report: {reason}; segdcn-report {shown(run)} tries again", file=sys.stderr)
    else:
        print(f"report in {shown(page)}")


def _batch(config: DictConfig, trainer: Any) -> str:
    """How many images one step sees, and how far it goes."""
    images = config.datamodule.batch_size
    parts = [f"{images} images"]
    for number, what in ((trainer.world_size, "devices"), (trainer.accumulate_grad_batches, "accumulated")):
        if number > 1:
            parts.append(f"{number} {what}")
            images *= number
    total = f" = {images} per step" if len(parts) > 1 else ""
    rate = f"learning rate {config.optimizer.lr:g}"
    backbone, offsets = config.task.backbone_lr_mult, config.task.offset_lr_mult
    factors = [f"{name} x {factor:g}" for name, factor in (("backbone", backbone), ("offsets", offsets)) if factor != 1]
    return " x ".join(parts) + f"{total}, {rate}" + (f" ({', '.join(factors)})" if factors else "")


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
@one_line_errors
def main(config: DictConfig) -> float:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    die_with_parent()
    quiet_libraries()
    if config.resume:
        config = resumed(config, list(HydraConfig.get().overrides.task))
    config.output_dir = HydraConfig.get().runtime.output_dir
    last = Path(config.output_dir) / "checkpoints" / "last.ckpt"
    if restarted() and not config.resume and last.exists():  # the same command again: it goes on
        config.resume = str(last)
    config.name = str(config.name)  # resolved once: a resumed run no longer knows Hydra's choices
    return train(config)


if __name__ == "__main__":
    main()
