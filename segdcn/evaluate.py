"""segdcn-evaluate: the same evaluation as in training, from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.utils import instantiate
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
)


def evaluate(config: DictConfig) -> float:
    """Evaluate ``config.checkpoint`` on ``config.split``; returns the mIoU."""
    from segdcn.evaluation.summary import summarize
    from segdcn.run_folder import environment, file_hash, load_checkpoint, shown, write_json

    checkpoint = Path(config.checkpoint)
    state = load_checkpoint(checkpoint)
    saved = OmegaConf.create(state["segdcn"]["config"])
    saved.model.weights = None  # they are in the checkpoint
    for group in ("dataset", "datamodule"):
        for key, value in config[group].items():
            if value is not None:
                saved[group][key] = value
    saved.trainer, saved.callbacks, saved.logger = config.trainer, config.callbacks, None
    saved.output_dir = config.output_dir

    dataset = build_dataset(saved)
    trained = len(state["segdcn"]["class_names"])
    if len(dataset.class_names) != trained:
        raise ValueError(
            f"{checkpoint} was trained with {trained} classes, but the data set has {len(dataset.class_names)}:"
            " give a checkpoint that was trained on it, or the data set's own classes"
        )
    data = build_datamodule(saved, dataset)
    task = build_task(saved, dataset)
    task.load_state_dict(state["state_dict"])
    task.evaluator = build_evaluator(
        config.protocol,
        dataset,
        config.split,
        inference=instantiate(config.inference, _convert_="all"),
        submission=Path(config.output_dir) / "submission" if config.submission else None,
    )
    trainer = build_trainer(saved)
    run = trainer.validate if config.split == "val" else trainer.test
    run(task, datamodule=data, verbose=False)

    result, expected = task.result, len(dataset.split(config.split))
    if result.images != expected:
        raise ValueError(
            f"{result.images} of the {expected} images of split {config.split} were evaluated:"
            f" leave trainer.limit_{config.split}_batches at null"
        )
    folder = Path(config.output_dir)
    if trainer.is_global_zero:
        facts = {
            **task.evaluator.describe(),
            "checkpoint": str(checkpoint),
            "checkpoint_sha256": file_hash(checkpoint),
            "seed": saved.seed,
            "seconds_per_image": result.seconds_per_image,
        }
        summarize(result, config.split, dataset.class_names, facts, folder / "metrics.json")
        write_json(folder / "environment.json", environment(saved.seed))
        print(f"figures and pictures in {shown(folder)}")
    return float(result.figures[f"{config.split}/miou"])


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="evaluate")
@one_line_errors
def main(config: DictConfig) -> float:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    quiet_libraries()
    if config.checkpoint is None:
        raise ValueError("checkpoint must be given: segdcn-evaluate checkpoint=RUN/checkpoints/best.ckpt")
    if config.split not in ("val", "test"):
        raise ValueError(f"split must be val or test, got {config.split!r}")
    return evaluate(config)


if __name__ == "__main__":
    main()
