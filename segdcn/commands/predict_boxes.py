"""segdcn-predict with a detector: pictures with boxes, and one table of all of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import Progress

from segdcn.commands.detection import refuse_inference
from segdcn.data.dataset import is_dark
from segdcn.detection.datamodule import as_image
from segdcn.detection.pictures import overlay
from segdcn.detection.samples import Detections
from segdcn.detection.task import as_detections
from segdcn.errors import UserError
from segdcn.inference.photographs import read_photo
from segdcn.runs.checkpoint import Checkpoint
from segdcn.runs.files import write_png, write_text

TABLE = "boxes.csv"


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
        self.images, self.dark = 0, list[str]()
        self._found: list[tuple[str, Detections]] = []

    def image(self, path: Path, name: str) -> None:
        """NAME_overlay.png, and rows of the table."""
        pixels = read_photo(path)
        with torch.inference_mode():
            found = as_detections(self.network([as_image(pixels).to(self.device)])[0]).of_score(self.config.score)
        file = self.named(path)
        self.images += 1
        if is_dark(pixels):
            self.dark.append(file)
        self._found.append((file, found))
        if self.config.overlay:
            picture = overlay(pixels, found, self.class_names, self.palette)
            write_png(Path(self.config.output) / f"{name}_overlay.png", picture)

    def video(self, path: Path, name: str) -> None:
        """Refused."""
        raise UserError(f"{path} is a video: a detector predicts images")

    def write_tables(self) -> None:
        """boxes.csv: a row for each box; corners in pixels, where (0, 0) is the outer corner of the first one."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("file", "class", "score", "x1", "y1", "x2", "y2"))
        for file, found in self._found:
            for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels, strict=True):
                writer.writerow((file, self.class_names[label - 1], f"{score:.4f}", *(f"{side:.2f}" for side in box)))
        write_text(Path(self.config.output) / TABLE, table.getvalue())
