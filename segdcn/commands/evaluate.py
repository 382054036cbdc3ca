"""segdcn-evaluate: the same evaluation as in training, from a checkpoint alone."""

from __future__ import annotations

import hashlib
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segdcn.commands.arguments import freely
from segdcn.commands.configs import plain
from segdcn.commands.console import console_script
from segdcn.commands.dispatch import kind_of
from segdcn.commands.kinds import check_kinds
from segdcn.data.memory import keep_freed_memory
from segdcn.drawing.decoration import decoration
from segdcn.errors import UserError
from segdcn.runs.distributed import is_first
from segdcn.runs.files import file_hash, shown, write_json
from segdcn.runs.folder import check_checkpoint, owned, reporting, run_folder_of
from segdcn.runs.overrides import is_of_the_place


@console_script("evaluate", freely(lambda key: key.startswith("dataset.")))
def main(config: DictConfig) -> float:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    keep_freed_memory()
    if config.split not in ("val", "test"):
        raise UserError(f"split must be val or test, got {config.split!r}")
    for limit, whole in ((f"limit_{config.split}_batches", None), ("fast_dev_run", False), ("overfit_batches", 0)):
        if config.trainer.get(limit) not in (None, whole):
            raise UserError(f"trainer.{limit} would leave images of split {config.split} out: do without it")
    check_checkpoint(Path(config.checkpoint))
    config.output_dir = str(config.output_dir or evaluation_folder(config))
    folder, first = Path(config.output_dir), is_first()
    with ExitStack() as stack:
        if first:
            stack.enter_context(owned(folder))
        stack.enter_context(reporting(folder, first))
        return evaluate(config)


def evaluate(config: DictConfig) -> float:
    """Evaluate ``config.checkpoint`` on ``config.split`` into ``config.output_dir``.

    Returns the figure by which a run is judged.
    """
    from segdcn.commands.build import build_trainer, quiet_libraries
    from segdcn.runs.checkpoint import read_checkpoint
    from segdcn.runs.environment import environment
    from segdcn.training.figures import FiguresFile

    quiet_libraries()
    for group in ("trainer", "callbacks"):
        check_kinds(OmegaConf.to_container(config[group] or {}, resolve=True), group)
    checkpoint = read_checkpoint(Path(config.checkpoint), config.trust)
    dataset = checkpoint.dataset(plain(config.dataset))
    data = checkpoint.datamodule(dataset, plain(config.datamodule))
    kind, folder = kind_of(dataset), Path(config.output_dir)
    task = kind.evaluation_task(config, checkpoint, dataset)
    conditions = {
        "seed": checkpoint.seed,
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": file_hash(checkpoint.path),
        **other_data(config),
    }
    trainer = build_trainer(config, FiguresFile(folder, conditions))
    run = trainer.validate if config.split == "val" else trainer.test
    run(task, datamodule=data, verbose=False)
    assert task.result is not None
    if trainer.is_global_zero:
        write_json(folder / "environment.json", environment(checkpoint.seed))
        with decoration("table", f"the figures are in {shown(folder)}/metrics.json"):
            kind.print_figures(task.result, config.split, dataset.class_names, conditions)
        print(f"figures and pictures in {shown(folder)}")
    judged = f"{config.split}/{task.monitor.partition('/')[2]}"
    return float(task.result.figures[judged])


def evaluation_folder(config: DictConfig) -> Path:
    """RUN/evaluation/<checkpoint>_<split>..., so that no evaluation overwrites the figures of another kind."""
    parts = [Path(config.checkpoint).stem, config.split]
    if config.protocol != "native":
        parts.append(config.protocol)
    for name, default in (("scales", [1.0]), ("flip", False), ("window", None), ("stride", None)):
        if config.inference[name] != default:
            numbers = re.findall(r"[\d.]+", str(config.inference[name]))  # whatever was typed: it is checked later
            parts.append(name + "-".join(numbers))
    for key, value in sorted(other_data(config).items()):
        text = "-".join(re.findall(r"[\w.+-]+", str(value)))
        if len(text) > 40:  # a list of classes, say: a file's name has room for 255 bytes
            text = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts.append(key.removeprefix("dataset.") + text)
    return run_folder_of(Path(config.checkpoint)) / "evaluation" / "_".join(parts)


def other_data(config: DictConfig) -> dict[str, Any]:
    """Settings by which the data are not those of the training, such as ``dataset.seed``; where they lie is none."""
    given = {f"dataset.{key}": value for key, value in plain(config.dataset).items() if value is not None}
    return {key: value for key, value in given.items() if not is_of_the_place(key)}


if __name__ == "__main__":
    main()
