"""One evaluation of a split: batches → predictions by a chosen inference → figures by a chosen protocol.

Legend: N images, K classes, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from segdcn.errors import UserError
from segdcn.evaluation.bootstrap import bootstrap_miou
from segdcn.evaluation.counts import Counts
from segdcn.evaluation.instances import InstanceIoU
from segdcn.evaluation.metrics import BoundaryIoU, ImageCounts, SegmentationMetrics, count_pairs
from segdcn.evaluation.protocols import NATIVE, EvaluationProtocol
from segdcn.inference.windows import Inference
from segdcn.models.folding import folded

Item = TypeVar("Item")

Sink = Callable[[str, Tensor], None]
"""Takes an image's name and its predicted classes, uint8 (H, W) on the CPU: see submission.py."""


class EvaluationResult(NamedTuple):
    """What an evaluation found.

    figures: fractions in 0..1 and the loss, NaN where there was nothing to count.
    counts: what they were computed from.
    seconds_per_image: mean wall time of inference on this process; loading and counting are not in it.
    """

    figures: dict[str, float]
    counts: Counts
    seconds_per_image: float

    @property
    def images(self) -> int:
        """How many there were, each counted once."""
        return len(self.counts.images)


class Evaluator(nn.Module):
    """All figures of a split, the same for any number of processes and any batch size.

    Args:
        class_names: K names.
        inference: how the network is applied to an image.
        protocol: at which size predictions meet the truth, and the rule for absent classes.
        categories: category → names of its classes, for protocols that report categories.
        instances: the instance map (H, W) of each image of the split, see ``InstanceIoU``.
        label_ids: the id of each class in the instance maps.
        sink: receives each image's prediction, once.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        inference: Inference | None = None,
        protocol: EvaluationProtocol = NATIVE,
        categories: Mapping[str, Sequence[str]] | None = None,
        label_ids: Sequence[int] = (),
        instances: Sequence[NDArray[Any]] | None = None,
        sink: Sink | None = None,
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.inference = inference or Inference()
        self.protocol = protocol
        self.instance_maps = instances
        self.sink = sink
        groups = {name: [self.class_names.index(one) for one in names] for name, names in (categories or {}).items()}
        self.metrics = SegmentationMetrics(
            len(self.class_names), absent_is_zero=protocol.absent_is_zero, categories=groups
        )
        self.boundary = BoundaryIoU(len(self.class_names))
        self.images = ImageCounts()
        self.instances = None
        if instances is not None:
            self.instances = InstanceIoU(self.class_names, label_ids, groups)
        self._names: dict[int, str] = {}  # by place in the split, of this process's images
        self._seen = 0
        self._seconds = 0.0

    def logits(self, network: nn.Module, image: Tensor) -> Tensor:
        """Those (N, K, H, W) of images (N, 3, H, W) by the inference that was chosen."""
        return self.inference(folded(network, image.shape[2:]), image)

    def update(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Evaluate a batch {"image" (N, 3, H, W), "label" (N, H, W), "name", "index"}.

        "index" (N,) is each image's place in the split, -1 for padding; without it images are numbered as they
        come, which is right for one process.

        Returns:
            Logits (N, K, H', W') and the truth at their size, for the loss.
        """
        image, label = batch["image"], batch["label"]
        index = batch["index"].tolist() if "index" in batch else range(self._seen, self._seen + len(image))

        started = time.perf_counter()
        logits = self.logits(network, self.protocol.prepare(image))
        classes = self.protocol.classes(logits, (label.shape[1], label.shape[2]))
        if classes.is_cuda:
            torch.cuda.synchronize(classes.device)
        self._seconds += time.perf_counter() - started
        self._seen += len(image)

        prediction, truth = self.protocol.meet(classes, label)
        for n, place in enumerate(index):
            confusion = count_pairs(prediction[n : n + 1], truth[n : n + 1], len(self.class_names))
            self.metrics.add(confusion)
            self.images.update(place, confusion)
            if place >= 0:
                self._names[place] = batch["name"][n]
            if self.instances is not None and self.instance_maps is not None:
                instances = torch.from_numpy(self.instance_maps[max(place, 0)])
                if instances.shape != truth.shape[1:]:
                    raise UserError(_another_size(batch["name"][n], instances.shape, truth.shape[1:]))
                self.instances.update(place, prediction[n], instances, confusion)
            if self.sink is not None and place >= 0:
                self.sink(batch["name"][n], classes[n].to(torch.uint8).cpu())
        self.boundary.update(prediction, truth)
        return logits, self.protocol.nearest(truth, (logits.shape[2], logits.shape[3]))

    def compute(self) -> EvaluationResult:
        """The figures over all processes.

        Means and accuracies under the names that the metrics give them, "miou_low" and "miou_high" (the 95 %
        bootstrap interval over images), per class "iou/<class>", and where they are defined
        "instance_iou/<class>", "category_iou/<category>", "category_instance_iou/<category>".
        """
        result = self.metrics.compute()
        counts = Counts(self._all_names(), self.class_names, self.images.compute(), result.pop("confusion_matrix"))
        result["boundary_miou"] = self.boundary.compute()["boundary_miou"]
        if self.instances is not None:
            result |= self.instances.compute()
        figures: dict[str, float] = {}
        for key, value in result.items():
            if value.ndim == 0:
                figures[key] = value.item()
            else:
                names = self.metrics.categories if key.startswith("category") else self.class_names
                figures |= {f"{key}/{name}": one for name, one in zip(names, value.tolist(), strict=True)}
        low, high = bootstrap_miou(counts.images, absent_is_zero=self.protocol.absent_is_zero)
        figures |= {"miou_low": low, "miou_high": high}
        return EvaluationResult(figures, counts, self._seconds / max(1, self._seen))

    def _all_names(self) -> list[str]:
        """The images' names in the order of the split, from all processes."""
        return in_order_of_split(self._names)

    def reset(self) -> None:
        """Forget all images."""
        for metric in (self.metrics, self.boundary, self.images, self.instances):
            if metric is not None:
                metric.reset()
        self._names = {}
        self._seen, self._seconds = 0, 0.0

    def describe(self) -> dict[str, Any]:
        """Protocol and inference as flat values for metrics.json; options are as on the command line."""
        return {
            "protocol": self.protocol.name,
            "protocol_rule": self.protocol.rule,
            "inference": str(self.inference),
            **{f"inference.{name}": _flat(value) for name, value in vars(self.inference).items()},
        }


def in_order_of_split(items: dict[int, Item]) -> list[Item]:
    """What all processes hold of a split's images, by their places in it; ``items`` is of this one."""
    parts = [items]
    if distributed.is_available() and distributed.is_initialized():
        parts = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, items)
    found = {place: item for part in parts for place, item in part.items()}
    return [found[place] for place in sorted(found)]


def _another_size(name: str, *shapes: Sequence[int]) -> str:
    got, wanted = ("x".join(map(str, shape)) for shape in shapes)
    return f"the instance map of {name} is {got} pixels (height x width) but the image is {wanted}: unpack it again"


def _flat(value: Any) -> Any:
    return f"[{','.join(map(str, value))}]" if isinstance(value, Sequence) else value
