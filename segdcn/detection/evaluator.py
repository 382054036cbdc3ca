"""One evaluation of a detector on a split: its detections and the truth → figures by a chosen protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from segdcn.detection.average_precision import MEANS, RULES, coco_figures, import_pycocotools, voc_figures
from segdcn.detection.found import Found
from segdcn.detection.samples import Detections, Objects
from segdcn.errors import UserError
from segdcn.evaluation.evaluator import in_order_of_split


class DetectionResult(NamedTuple):
    """What an evaluation found.

    figures: fractions in 0..1, NaN where there was nothing to count.
    found: what they were computed from.
    seconds_per_image: mean wall time of the detector on this process; NaN where it was not told.
    """

    figures: dict[str, float]
    found: Found
    seconds_per_image: float

    @property
    def images(self) -> int:
        """How many there were, each counted once."""
        return len(self.found.names)


class DetectionEvaluator:
    """All figures of a split, the same for any number of processes and any batch size.

    Args:
        class_names: C names.
        protocol: "voc07" (11 recalls), "voc" (area) or "coco"; see ``RULES``.

    Raises:
        ValueError: an unknown protocol, or pycocotools is missing.
    """

    def __init__(self, class_names: Sequence[str], protocol: str = "voc07") -> None:
        if protocol not in RULES:
            raise UserError(f"unknown protocol {protocol}: choose {', '.join(RULES)}")
        if protocol == "coco":
            import_pycocotools()  # said before anything is detected
        self.class_names = list(class_names)
        self.protocol = protocol
        self.reset()

    @property
    def means(self) -> list[str]:
        """The names of the figures over all classes, of which more is better."""
        return MEANS[self.protocol]

    def reset(self) -> None:
        """Forget all images."""
        self._images: dict[int, tuple[str, Detections, Objects]] = {}  # by place in the split, of this process
        self._seen = 0
        self._seconds = 0.0

    def update(
        self,
        places: Iterable[int],
        names: Sequence[str],
        detections: Sequence[Detections],
        objects: Sequence[Objects],
        seconds: float = math.nan,
    ) -> None:
        """Add a batch of images.

        places: of each image in the split; -1 for padding, which does not count.
        seconds: that the detector took for the batch, padding too.
        """
        for place, name, one, truth in zip(places, names, detections, objects, strict=True):
            if place >= 0:
                self._images[int(place)] = (name, one, truth)
        self._seen += len(names)
        self._seconds += seconds

    def compute(self) -> DetectionResult:
        """The figures over all processes, named as ``voc_figures`` or ``coco_figures`` name them."""
        every = in_order_of_split(self._images)  # of all processes
        names, detections, objects = zip(*every, strict=True) if every else ([], [], [])
        found = Found(names, self.class_names, detections, objects)
        figures = coco_figures(found) if self.protocol == "coco" else voc_figures(found, self.protocol)
        return DetectionResult(figures, found, self._seconds / max(1, self._seen))

    def describe(self) -> dict[str, Any]:
        """Protocol as flat values for metrics.json."""
        return {"protocol": self.protocol, "protocol_rule": RULES[self.protocol]}
