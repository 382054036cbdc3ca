"""segdcn-evaluate: the same evaluation as in training, from a checkpoint alone."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segdcn import UserError
from segdcn.commands.compose import build_evaluator, build_trainer, freely, plain, quiet_libraries
from segdcn.commands.entry import console_script
from segdcn.commands.kinds import check_kinds
from segdcn.drawing.decoration import decoration
from segdcn.processes import is_first
from segdcn.runs.folder import file_hash, make_folder, reporting, run_folder_of, shown, write_json


def evaluate(config: DictConfig) -> float:
    """Evaluate ``config.checkpoint`` on ``config.split`` into ``config.output_dir``; returns the mIoU."""
    from segdcn.callbacks import FiguresFile
    from segdcn.drawing.figures import print_figures
    from segdcn.runs.checkpoint import read_checkpoint
    from segdcn.runs.environment import environment
    from segdcn.task import SegmentationTask

    for group in ("trainer", "callbacks"):
        check_kinds(OmegaConf.to_container(config[group] or {}, resolve=True), group)
    checkpoint = read_checkpoint(Path(config.checkpoint), config.trust)
    dataset = checkpoint.dataset(plain(config.dataset))
    data = checkpoint.datamodule(dataset, plain(config.datamodule))
    task = SegmentationTask(checkpoint.network(), checkpoint.loss(), dataset.class_names)
    folder = Path(config.output_dir)
    task.evaluator = build_evaluator(
        config.protocol,
        dataset,
        config.split,
        inference=instantiate(config.inference, _convert_="all"),
        submission=folder / "submission" if config.submission else None,
    )
    facts = {
        "seed": checkpoint.seed,
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": file_hash(checkpoint.path),
    }
    trainer = build_trainer(config, FiguresFile(folder, facts))
    run = trainer.validate if config.split == "val" else trainer.test
    run(task, datamodule=data, verbose=False)
    assert task.result is not None
    if trainer.is_global_zero:
        write_json(folder / "environment.json", environment(checkpoint.seed))
        with decoration("table", f"the figures are in {shown(folder)}/metrics.json"):
            print_figures(task.result, config.split, dataset.class_names, facts)
        print(f"figures and pictures in {shown(folder)}")
    return float(task.result.figures[f"{config.split}/miou"])


def evaluation_folder(config: DictConfig) -> Path:
    """RUN/evaluation/<checkpoint>_<split>..., so that no evaluation overwrites the figures of another kind."""
    parts = [Path(config.checkpoint).stem, config.split]
    if config.protocol != "native":
        parts.append(config.protocol)
    for name, default in (("scales", [1.0]), ("flip", False), ("window", None), ("stride", None)):
        if config.inference[name] != default:
            numbers = re.findall(r"[\d.]+", str(config.inference[name]))  # whatever was typed: it is checked later
            parts.append(name + "-".join(numbers))
    return run_folder_of(Path(config.checkpoint)) / "evaluation" / "_".join(parts)


@console_script("evaluate", freely(lambda key: key.startswith("dataset.")))
def main(config: DictConfig) -> float:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    quiet_libraries()
    if config.split not in ("val", "test"):
        raise UserError(f"split must be val or test, got {config.split!r}")
    limit = f"limit_{config.split}_batches"
    if config.trainer.get(limit) is not None:
        raise UserError(f"trainer.{limit} would leave images of split {config.split} out: leave it at null")
    if not Path(config.checkpoint).is_file():
        raise UserError(f"no checkpoint file at {config.checkpoint}: give one such as RUN/checkpoints/best.ckpt")
    config.output_dir = str(config.output_dir or evaluation_folder(config))
    folder, first = Path(config.output_dir), is_first()
    if first:
        make_folder(folder, "output_dir=DIR")
    with reporting(folder, first):
        return evaluate(config)


if __name__ == "__main__":
    main()
