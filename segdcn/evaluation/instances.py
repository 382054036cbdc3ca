"""Instance-weighted IoU by Cityscapes' rule. Legend: K classes, H x W pixels, M instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from segdcn.evaluation.metrics import SegmentationMetrics

# Mean pixels of an instance of each class that has instances (args.avgClassSize of the official evaluator)
MEAN_SIZE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}


class InstanceIoU(Metric):
    """iIoU: IoU in which each instance's pixels weigh (mean size of its class) / (its own size).

    So small instances count as much as large ones. False positives belong to no instance and weigh 1. Only classes
    in ``MEAN_SIZE`` have an iIoU, and categories of such classes alone; all others are NaN.
    Source: getInstanceIouScoreForLabel and ...ForCategory of cityscapesscripts' evalPixelLevelSemanticLabeling.py.

    State: integers only, so that sums over processes are exact: one row per instance, and false positives.

    Args:
        class_names: K names.
        label_ids: the id of each class in the instance maps.
        categories: groups of classes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    instances: list[Tensor]
    class_false: Tensor
    category_false: Tensor

    def __init__(
        self, class_names: Sequence[str], label_ids: Sequence[int], categories: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(compute_with_cache=False)
        self.mean_sizes = torch.tensor([MEAN_SIZE.get(name, 0.0) for name in class_names], dtype=torch.float64)
        self.class_of_id = {id_: k for k, id_ in enumerate(label_ids) if class_names[k] in MEAN_SIZE}
        self.categories = {
            name: list(classes) if all(class_names[k] in MEAN_SIZE for k in classes) else []
            for name, classes in categories.items()
        }
        # rows of (image, class, pixels, pixels of the right class, pixels of the right category)
        self.add_state("instances", [], dist_reduce_fx="cat")
        self.add_state("class_false", torch.zeros(len(class_names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("category_false", torch.zeros(len(categories), dtype=torch.int64), dist_reduce_fx="sum")

    update_called = SegmentationMetrics.update_called

    def update(self, index: int, prediction: Tensor, instances: Tensor, confusion: Tensor) -> None:
        """Add one image.

        Args:
            index: the image's place in the split, below 0 for padding.
            prediction: predicted classes, integers (H, W).
            instances: integers (H, W) as in Cityscapes' instanceIds files: 1000 · class id + number; lower ones are no
                instance.
            confusion: the image's confusion matrix (K, K).
        """
        rows = torch.empty(0, 5, dtype=torch.int64)
        if index >= 0:
            self.class_false += confusion.sum(dim=0) - confusion.diag()
            for number, classes in enumerate(self.categories.values()):
                inside = confusion[:, classes].sum()
                self.category_false[number] += inside - confusion[classes][:, classes].sum()
            rows = self._rows(index, prediction.flatten().cpu(), instances.flatten().cpu())
        self.instances.append(rows.to(confusion.device))

    def _rows(self, index: int, prediction: Tensor, instances: Tensor) -> Tensor:
        marked = instances > 1000
        instances, prediction = instances[marked], prediction[marked]
        ids, place = torch.unique(instances, return_inverse=True)
        # pixels of each instance by predicted class: one count for all instances
        classes = len(self.mean_sizes)
        counts = torch.bincount(place * classes + prediction, minlength=len(ids) * classes).view(-1, classes)
        rows = []
        for id_, count in zip(ids.tolist(), counts, strict=True):
            k = self.class_of_id.get(id_ // 1000)
            if k is not None:
                alike = next((group for group in self.categories.values() if k in group), [])
                rows.append([index, k, int(count.sum()), int(count[k]), int(count[alike].sum())])
        return torch.tensor(rows, dtype=torch.int64).view(-1, 5)

    def compute(self) -> dict[str, Tensor]:
        """Float64 on the CPU: "instance_iou" (K,), "category_instance_iou" (categories,) and their means "..._miou"."""
        rows = dim_zero_cat(self.instances).cpu() if len(self.instances) else torch.empty(0, 5, dtype=torch.int64)
        rows = rows[rows[:, 0].argsort(stable=True)]  # one order, and so one rounding, for any number of processes
        _, class_of, size, class_hit, category_hit = rows.unbind(dim=1)
        weight = self.mean_sizes[class_of] / size

        def iou(mine: Tensor, hit: Tensor, false: Tensor) -> Tensor:
            true_positive = (weight * hit)[mine].sum()
            false_negative = (weight * (size - hit))[mine].sum()
            return true_positive / (true_positive + false_negative + false)

        classes = [iou(class_of == k, class_hit, false) for k, false in enumerate(self.class_false.cpu())]
        groups = [torch.tensor(group, dtype=torch.int64) for group in self.categories.values()]
        categories = [
            iou(torch.isin(class_of, group), category_hit, false) if len(group) else torch.tensor(torch.nan).double()
            for group, false in zip(groups, self.category_false.cpu(), strict=True)
        ]
        instance_iou = torch.stack(classes).where(self.mean_sizes > 0, torch.nan)
        category_iou = torch.stack(categories)
        return {
            "instance_iou": instance_iou,
            "instance_miou": instance_iou.nanmean(),
            "category_instance_iou": category_iou,
            "category_instance_miou": category_iou.nanmean(),
        }
