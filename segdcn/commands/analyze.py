"""segdcn-analyze checkpoint=PATH: what the offsets of a trained network do, in figures and in pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from segdcn.commands.arguments import freely
from segdcn.commands.configs import plain
from segdcn.commands.console import console_script
from segdcn.drawing.decoration import decoration
from segdcn.errors import UserError
from segdcn.runs.files import file_hash, shown, write_json, write_text
from segdcn.runs.folder import check_checkpoint, make_folder, reporting, run_folder_of

if TYPE_CHECKING:
    from segdcn.analysis.views import Pixel
    from segdcn.data import Sample
    from segdcn.inference.predictor import Predictor
    from segdcn.runs.checkpoint import Checkpoint


@console_script("analyze", freely(lambda key: key.startswith("dataset.")))
def main(config: DictConfig) -> None:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    analyze(config)


def analyze(config: DictConfig) -> dict[str, Any]:
    """Analyse ``config.checkpoint``; returns what analysis.json holds.

    What the network or the data do not allow is left out, with a line that says why.

    Raises: UserError, one line: an option that cannot be followed, a checkpoint that cannot be used.
    """
    for key, lowest in (("images", 0), ("pictures", 0), ("repeats", 1)):
        value = config[key]
        if (value is None and key == "repeats") or (value is not None and not (_is_whole(value) and value >= lowest)):
            raise UserError(f"{key} must be at least {lowest} and a whole number, got {value}")
    pixels = plain(config)["pixels"] or []
    if not isinstance(pixels, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_whole, pair)) for pair in pixels
    ):
        raise UserError(f"pixels must be pairs of a row and a column, such as [[120,200],[40,60]], got {pixels}")
    checkpoint = Path(config.checkpoint)
    check_checkpoint(checkpoint)
    folder = Path(config.output_dir or _default_folder(config, checkpoint))
    make_folder(folder, "output_dir=DIR")
    with reporting(folder):
        return _analyze(config, [(row, column) for row, column in pixels], folder)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _analyze(config: DictConfig, pixels: Sequence[Pixel], folder: Path) -> dict[str, Any]:
    """Figures first, each part by itself, then pictures and tables, which cannot cost them."""
    from segdcn.analysis import last_layers
    from segdcn.analysis.offset_study import check_objects
    from segdcn.analysis.tables import dilation_csv, dilation_rows, markdown
    from segdcn.analysis.views import view
    from segdcn.commands.analysis_output import print_tables, write_pictures
    from segdcn.inference.devices import find_device
    from segdcn.runs.checkpoint import read_checkpoint
    from segdcn.runs.environment import environment

    checkpoint = read_checkpoint(Path(config.checkpoint), config.trust)
    predictor = checkpoint.predictor(find_device(config.device))
    check_objects(predictor.class_names, config.objects or (), config.object_sizes)
    dataset, split = _open(config, checkpoint)
    drawn = _drawn(config, predictor, split)
    for sample in drawn:
        _check_pixels(pixels, sample)

    result: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": file_hash(checkpoint.path),
        "split": config.split if config.images != 0 else None,
    }
    if not last_layers(predictor.network):
        print(
            "note: no effective dilation and no sampling points, since the network has no 3x3 convolution whose"
            " sampling can be followed"
        )
    elif config.images != 0 and len(split):
        with decoration("effective dilation and offset lengths", "the rest is there"):
            result |= _study(config, predictor, dataset, split)
            write_text(folder / "effective_dilation.csv", dilation_csv(result))
            write_text(folder / "effective_dilation.md", markdown(dilation_rows(result)))
    views = []
    for sample in drawn:
        with decoration(f"pictures of {sample.name}", "those of other images are there"):
            views.append(view(predictor, sample, pixels))
    for number, one in enumerate(views):
        with decoration(f"sampling_{number}.json", "the rest is there"):  # of points that are no numbers
            write_text(folder / f"sampling_{number}.json", json.dumps(one.described(), allow_nan=False) + "\n")
    with decoration("cost", "the rest is there"):
        result["cost"] = _cost(predictor, checkpoint, drawn, split, config.repeats)
    result["pictures"] = [one.summary() for one in views]
    result["environment"] = environment(checkpoint.seed)
    write_json(folder / "analysis.json", result)

    write_pictures(predictor.network, result, views, folder)
    print_tables(result)
    print(f"figures and pictures in {shown(folder)}")
    return result


def _default_folder(config: DictConfig, checkpoint: Path) -> Path:
    """RUN/analysis for the val split; other names for what must not replace its figures and pictures."""
    parts = ["analysis"]
    if config.images == 0:
        parts.append("pictures")
    elif config.split != "val":
        parts.append(config.split)
    if config.image is not None:
        parts.append(Path(config.image).stem)
    return run_folder_of(checkpoint) / "_".join(parts)


def _open(config: DictConfig, checkpoint: Checkpoint) -> tuple[Any, Sequence[Sample]]:
    """The data set and its split; nothing of either where they are not asked for or not at hand.

    Raises: UserError for a data set that is not trusted, and for a split that it does not have.
    """
    if config.images == 0 and config.image is not None:
        return None, ()
    changes = plain(config.dataset)
    checkpoint.dataset_settings(changes)
    dataset: Any = None
    split: Sequence[Sample] = ()
    with decoration("study and pictures of the data set", "dataset.root=PATH tells where one that was moved is"):
        dataset = checkpoint.dataset(changes)
    if dataset is not None and config.split not in dataset.splits:
        raise UserError(f"split={config.split}: the data set has the splits {', '.join(dataset.splits)}")
    if dataset is not None:
        with decoration("study and pictures of the data set", "segdcn-data check says more"):
            split = dataset.split(config.split)
    return dataset, split


def _drawn(config: DictConfig, predictor: Predictor, split: Sequence[Sample]) -> list[Sample]:
    """The images to draw, those that can be read."""
    from segdcn.data.dataset import Sample, spread_over

    if config.image is not None:  # a photograph has no labels: pixels are chosen by what the network sees in it
        result = predictor(config.image)
        return [Sample(result.image, result.labels, Path(config.image).name)]
    found = []
    for place in spread_over(len(split), config.pictures):
        with decoration(f"pictures of image {place} of split {config.split}", "those of other images are there"):
            found.append(split[place])
    return found


def _check_pixels(pixels: Sequence[Pixel], sample: Sample) -> None:
    height, width = sample.image.shape[:2]
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"pixels: row {row}, column {column} lies outside {sample.name} of {height} x {width} pixels"
            )


def _study(config: DictConfig, predictor: Predictor, dataset: Any, split: Sequence[Sample]) -> dict[str, Any]:
    from rich.progress import track

    from segdcn.analysis.offset_study import study_split
    from segdcn.data.dataset import spread_over
    from segdcn.drawing.console import for_progress

    places = spread_over(len(split), config.images)
    return study_split(
        predictor,
        dataset,
        config.split,
        split,
        places,
        config.objects,
        config.object_sizes,
        lambda images: track(images, "images", len(places), console=for_progress(), transient=True),
    )


def _cost(
    predictor: Predictor, checkpoint: Checkpoint, drawn: Sequence[Sample], split: Sequence[Sample], repeats: int
) -> dict[str, Any]:
    """Of one image: the first that is drawn, else one of the split, else an empty one of the training's size."""
    import numpy as np

    from segdcn.benchmarks.networks import compare_cost

    image = np.zeros((*(checkpoint.groups["datamodule"].get("crop_size") or (512, 512)), 3), np.uint8)
    with contextlib.suppress(Exception):  # of a data set that cannot be read, which is said elsewhere
        image = (drawn[0] if drawn else split[0]).image
    return compare_cost(predictor.network, predictor.batch(image), repeats)


if __name__ == "__main__":
    main()
