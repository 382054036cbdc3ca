"""segdcn-predict with a detector: pictures with boxes, one table of all of them, and COCO's file of results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import Progress

from segdcn.commands.detection import refuse_inference
from segdcn.data.dataset import is_dark, read_image
from segdcn.detection.coco_boxes import CocoIds, read_ids
from segdcn.detection.datamodule import as_image
from segdcn.detection.pictures import overlay
from segdcn.detection.samples import Detections
from segdcn.detection.task import as_detections
from segdcn.errors import UserError
from segdcn.runs.checkpoint import Checkpoint
from segdcn.runs.files import write_png, write_text

TABLE, RESULTS = "boxes.csv", "boxes.json"


class BoxWork:
    """Boxes of files; see ``predict.Work``.

    named: a file as the table names it.
    """

    def __init__(
        self,
        config: DictConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        progress: Progress,
        named: Callable[[Path], str],
    ) -> None:
        refuse_inference(config)
        for key in ("probabilities", "areas", "frames"):
            if config[key]:
                raise UserError(f"{key}=true is of label maps: a detector writes boxes")
        if type(config.score) not in (int, float) or not 0 <= config.score <= 1:
            raise UserError(f"score must be a number from 0 to 1, got {config.score}")
        self.config, self.progress, self.device, self.named = config, progress, device, named
        self.network = checkpoint.module().to(device)
        self.class_names, self.palette = checkpoint.class_names, checkpoint.palette
        self.ids = None if config.annotations is None else _ids(Path(config.annotations), self.class_names)
        self.images, self.dark = 0, list[str]()
        self._found: list[tuple[str, Detections]] = []

    def image(self, path: Path, name: str) -> None:
        """NAME_overlay.png, and rows of the tables.

        COCO's boxes lie in the pixels as they are stored, others in the image as it is seen.
        """
        file = self.named(path)
        if self.ids is not None and file not in self.ids.images:
            raise UserError(f"{path} is no image of {self.config.annotations}, which calls none {file}")
        pixels = read_image(path, upright=self.ids is None)
        with torch.inference_mode():
            found = as_detections(self.network([as_image(pixels).to(self.device)])[0])
        self.images += 1
        if is_dark(pixels):
            self.dark.append(file)
        self._found.append((file, found))
        if self.config.overlay:
            picture = overlay(pixels, found.of_score(self.config.score), self.class_names, self.palette)
            write_png(Path(self.config.output) / f"{name}_overlay.png", picture)

    def video(self, path: Path, name: str) -> None:
        """Refused."""
        raise UserError(f"{path} is a video: a detector predicts images")

    def write_tables(self) -> None:
        """boxes.csv: a row for each box; corners in pixels, where (0, 0) is the outer corner of the first one.

        boxes.json, where annotations are given: the boxes of any score by COCO's ids, as its server takes them.
        """
        table, results = io.StringIO(), []
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("file", "class", "score", "x1", "y1", "x2", "y2"))
        for file, found in self._found:
            for box, score, label in zip(*(part.tolist() for part in found), strict=True):
                name, (x1, y1, x2, y2) = self.class_names[label - 1], box
                if score >= self.config.score:
                    writer.writerow((file, name, f"{score:.4f}", *(f"{side:.2f}" for side in box)))
                if self.ids is not None:
                    ids = {"image_id": self.ids.images[file], "category_id": self.ids.categories[name]}
                    results.append({**ids, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
        write_text(Path(self.config.output) / TABLE, table.getvalue())
        if self.ids is not None:
            write_text(Path(self.config.output) / RESULTS, json.dumps(results))


def _ids(file: Path, class_names: Sequence[str]) -> CocoIds:
    """See ``read_ids``; UserError where a class is no category."""
    ids = read_ids(file)
    if missing := [name for name in class_names if name not in ids.categories]:
        raise UserError(
            f"annotations={file} has no category {', '.join(missing)}, but {', '.join(ids.categories)}: give the file"
            " of the data set that the detector was trained on"
        )
    return ids
