"""segdcn-analyze checkpoint=PATH: what the offsets of a trained network do, in figures and in pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from segdcn import UserError
from segdcn.commands.compose import freely, plain
from segdcn.commands.entry import console_script
from segdcn.runs.folder import make_folder, run_folder_of, shown, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from segdcn.data import Sample
    from segdcn.predictor import Predictor


def analyze(config: DictConfig) -> dict[str, Any]:
    """Analyse ``config.checkpoint``; returns what analysis.json holds."""
    for key, lowest in (("images", 0), ("pictures", 0), ("repeats", 1)):
        if config[key] is not None and config[key] < lowest:
            raise UserError(f"{key} must be at least {lowest}, got {config[key]}")
    pixels = OmegaConf.to_container(config.pixels) if config.pixels is not None else []
    if not isinstance(pixels, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pixels):
        raise UserError(f"pixels must be pairs of a row and a column, such as [[120,200],[40,60]], got {pixels}")
    import segdcn.predictor
    from segdcn.analysis.cost import compare_cost
    from segdcn.analysis.pictures import length_picture
    from segdcn.analysis.tables import class_rows, cost_rows, dilation_csv, dilation_rows, length_rows, markdown
    from segdcn.runs.checkpoint import file_hash, read_checkpoint
    from segdcn.runs.environment import environment

    checkpoint = read_checkpoint(Path(config.checkpoint), config.trust)
    predictor = segdcn.predictor.from_checkpoint(checkpoint, segdcn.predictor.find_device(config.device))
    folder = Path(config.output_dir or _default_folder(config, checkpoint.path))
    make_folder(folder, "output_dir=DIR")
    split: Sequence[Sample] = ()
    dataset: Any = None
    if config.images != 0 or config.image is None:
        dataset = checkpoint.dataset(plain(config.dataset))
        split = dataset.split(config.split)
    if config.image is not None:
        drawn = [_own_image(config.image, predictor)]
    else:
        drawn = [split[place] for place in _places(len(split), config.pictures)]
    facts = {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": file_hash(checkpoint.path),
        "split": config.split if config.images != 0 else None,
    }
    study: dict[str, Any] = {}
    if config.images != 0:
        study = _study(config, predictor, dataset, split)
        write_text(folder / "effective_dilation.csv", dilation_csv(study))
        write_text(folder / "effective_dilation.md", markdown(dilation_rows(study)))
        write_bytes(folder / "offset_lengths.png", length_picture(study))
        parted = " and ".join(f"{side:.0f}" for side in study["objects"]["thresholds"])
        counts = ", ".join(f"{count} {name}" for name, count in study["objects"]["counts"].items())
        print(f"{config.split} split, {study['images']} images; objects by the side of their boxes: {counts}", end="")
        print(f" (from {parted} pixels)" if parted else "")
        _print("effective dilation by object size, in pixels of the layer's map", dilation_rows(study))
        _print("effective dilation by class", class_rows(study))
        _print("length of the offsets, in pixels of the layer's map", length_rows(study))
    pictures = [_draw(config, predictor, sample, number, folder) for number, sample in enumerate(drawn)]
    image = (drawn[0] if drawn else split[0]).image
    cost = compare_cost(predictor.network, predictor.batch(image), config.repeats)
    height, width = cost["size"]
    _print(f"cost of one image of {width}x{height} pixels, {cost['threads']} thread(s)", cost_rows(cost))
    result = {**facts, **study, "cost": cost, "pictures": pictures, "environment": environment(checkpoint.seed)}
    write_json(folder / "analysis.json", result)
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


def _study(config: DictConfig, predictor: Predictor, dataset: Any, split: Sequence[Sample]) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import track

    from segdcn.analysis.offset_study import study_offsets

    objects = config.objects
    if objects is None:
        others = [name for name in predictor.class_names if name != "background"]
        objects = getattr(dataset, "object_classes", others)
    find_instances = getattr(dataset, "instances", None)
    maps = find_instances(config.split) if find_instances else None
    places = _places(len(split), config.images)
    samples = (split[place] for place in places)  # one at a time
    # the bar is for a person who waits: a log file gets none
    bar = Console(stderr=True, quiet=not sys.stderr.isatty())
    return study_offsets(
        predictor.network,
        track(samples, "images", len(places), console=bar, transient=True),
        predictor.transform,
        predictor.class_names,
        list(objects),
        config.object_sizes,
        predictor.device,
        None if maps is None else (maps[place] for place in places),
    )


def _draw(config: DictConfig, predictor: Predictor, sample: Sample, number: int, folder: Path) -> dict[str, Any]:
    """sampling_N.png, sampling_N.json and receptive_field_N.png of one image; returns what they are of."""
    from segdcn.analysis import effective_receptive_field, record, trace
    from segdcn.analysis.pictures import field_picture, sampling_picture
    from segdcn.panels import central_pixels

    image = predictor.batch(sample.image)
    size = (image.shape[2], image.shape[3])
    pixels = [(int(row), int(column)) for row, column in config.pixels or ()] or central_pixels(sample.label)
    if not pixels:  # a benchmark's test split has no labels
        pixels = central_pixels(predictor(sample.image).labels)
    calls = record(predictor.network, image)[-3:]
    learned = [trace(calls, pixel, size) for pixel in pixels]
    regular: list[Any] = []
    if any(call.deformable for call in calls):
        undeformed = [call.undeformed() for call in calls]
        regular = [trace(undeformed, pixel, size)[-1].numpy() for pixel in pixels]
    fields = effective_receptive_field(predictor.network, image, pixels).numpy()

    arrays = [[points.numpy() for points in depths] for depths in learned]
    write_bytes(folder / f"sampling_{number}.png", sampling_picture(sample.image, pixels, arrays, regular, sample.name))
    last = [depths[-1] for depths in arrays]
    write_bytes(
        folder / f"receptive_field_{number}.png", field_picture(sample.image, pixels, fields, last, sample.name)
    )
    facts = {"image": sample.name, "size": list(size), "layers": [call.name for call in reversed(calls)]}
    points = [
        {"pixel": list(pixel), "points": [[[round(y, 3), round(x, 3)] for y, x in d.tolist()] for d in depths]}
        for pixel, depths in zip(pixels, learned, strict=True)
    ]
    write_text(folder / f"sampling_{number}.json", json.dumps({**facts, "pixels": points}) + "\n")
    return {**facts, "pixels": [list(pixel) for pixel in pixels]}


def _own_image(path: str, predictor: Predictor) -> Sample:
    """A photograph has no labels: pixels are chosen by what the network sees in it."""
    from segdcn.data import Sample

    result = predictor(path)
    return Sample(result.image, result.labels, Path(path).name)


def _places(total: int, count: int | None) -> list[int]:
    """``count`` of ``total`` places (None: all) at equal distances."""
    count = total if count is None else min(count, total)
    return [number * total // count for number in range(count)]


def _print(title: str, rows: list[list[str]]) -> None:
    from segdcn.drawing import console

    table = console.table(rows[0], title)
    for row in rows[1:]:
        console.row(table, row)
    console.show(table)


@console_script("analyze", freely(lambda key: key.startswith("dataset.")))
def main(config: DictConfig) -> None:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    analyze(config)


if __name__ == "__main__":
    main()
