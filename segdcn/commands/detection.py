"""What the commands do with boxes; for label maps there is ``segmentation``, with functions of the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from segdcn.commands.build import build_network, build_with, describe_run
from segdcn.commands.figures import counted_images
from segdcn.data.dataset import spread_over
from segdcn.detection.evaluator import DetectionEvaluator, DetectionResult
from segdcn.detection.samples import DetectionDataset
from segdcn.detection.task import DetectionTask
from segdcn.drawing import console
from segdcn.drawing.numbers import percent
from segdcn.errors import UserError
from segdcn.runs.checkpoint import Checkpoint

LOOKED_AT = 20  # images, before a training


def settle(config: DictConfig, dataset: DetectionDataset) -> list[str]:
    """Put values in the place of what a config leaves to the data; one line each of what was found."""
    lines = []
    if "class_names" in config.dataset and config.dataset.class_names is None:
        config.dataset.class_names = [str(name) for name in dataset.class_names]
        lines.append(f"classes  {', '.join(config.dataset.class_names)}")
    return lines


def labels_before_training(dataset: DetectionDataset) -> list[str]:
    """What is odd about the objects of some train images, one line each."""
    samples = dataset.split("train")
    places = spread_over(len(samples), LOOKED_AT)
    if not any((~samples[place].objects.ignored).any() for place in places):
        return [f"none of {len(places)} train images has an object: segdcn-data check looks at all of them"]
    return []


def build_task(config: DictConfig, dataset: DetectionDataset) -> DetectionTask:
    """Network and optimisation as one ``DetectionTask``, with the description its checkpoints carry."""
    task: DetectionTask = build_with(
        config.task,
        network=build_network(config, len(dataset.class_names)),
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        class_names=dataset.class_names,
        description=describe_run(config, dataset),
    )
    return task


def check_network(config: DictConfig, dataset: DetectionDataset, task: DetectionTask, trainer: Any) -> dict[str, Any]:
    """That the network is a detector; returns its parameters, since its operations depend on what it finds."""
    if not isinstance(task.network, GeneralizedRCNN | RetinaNet | FCOS | SSD):
        raise UserError(
            f"the network {type(task.network).__name__} is no detector: choose model=faster_rcnn, rfcn or"
            " class_aware_rpn, or a detector of torchvision's"
        )
    return {"parameters": sum(parameter.numel() for parameter in task.network.parameters()), "flops": None}


def evaluation_task(config: DictConfig, checkpoint: Checkpoint, dataset: DetectionDataset) -> DetectionTask:
    """The task of a checkpoint, which evaluates ``config.split`` as segdcn-evaluate is asked to."""
    refuse_inference(config)
    if config.submission:
        raise UserError("submission=true is of label maps: a detector's results are in found.npz")
    trained = checkpoint.config.get("task")
    trained = trained if isinstance(trained, Mapping) else {}
    protocol = str(trained.get("protocol", "voc07")) if config.protocol == "native" else config.protocol
    means = DetectionEvaluator(dataset.class_names, protocol).means
    judged = str(trained.get("monitor", "")).partition("/")[2]
    monitor = f"val/{judged if judged in means else means[0]}"
    return DetectionTask(checkpoint.module(), dataset.class_names, protocol=protocol, monitor=monitor)


def refuse_inference(config: DictConfig) -> None:
    """Raises: UserError where windows, scales or mirror images are asked for."""
    asked = {key for key, value in config.inference.items() if key != "_target_" and value not in (None, False, [1.0])}
    if asked:
        raise UserError(f"inference.{min(map(str, asked))} is of label maps: a detector sees whole images once")


def print_figures(
    result: DetectionResult, split: str, class_names: Sequence[str], conditions: Mapping[str, Any]
) -> None:
    """Print the table of average precision per class."""
    images = counted_images(result.images, conditions)
    print(f"{split} split, {images}, protocol {conditions['protocol']}: {conditions['protocol_rule']}")
    columns = average_precisions(result.figures, split)
    table = console.table(["class", *columns])
    for name in class_names:
        console.row(table, [name, *(percent(figures.get(name)) for figures in columns.values())])
    table.add_section()
    means = [_mean(result.figures, f"{split}/{column}") for column in columns]
    has_intervals = any("(" in mean for mean in means)
    console.row(table, ["mean, 95 % interval" if has_intervals else "mean", *means], "bold")
    console.show(table)


def average_precisions(figures: Mapping[str, float], split: str) -> dict[str, dict[str, float]]:
    """Those of single classes, by the name of their mean (map50, ...) and of the class."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        kind, _, name = key.removeprefix(f"{split}/").partition("/")
        if name and kind.startswith("ap"):
            found.setdefault(f"m{kind}", {})[name] = value
    return found


def _mean(figures: Mapping[str, float], name: str) -> str:
    low, high = (figures.get(f"{name}_{end}") for end in ("low", "high"))
    mean = percent(figures.get(name))
    return mean if low is None or high is None else f"{mean} ({percent(low)} to {percent(high)})"


def report_training(folder: Path, dataset: DetectionDataset) -> Path:
    """Write the page of a run that has just ended; returns where it is."""
    from segdcn.detection.pages import run_page
    from segdcn.report.images import ImageOptions
    from segdcn.report.page import FILE
    from segdcn.report.runs import read_finished

    return run_page(read_finished(folder), ImageOptions(lambda _: dataset, trust=True)).write(folder / FILE)
