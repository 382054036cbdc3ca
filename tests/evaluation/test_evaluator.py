"""The figures do not depend on how the images arrive; each image counts and is written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch.multiprocessing import spawn

from segdcn.data.batches import EvaluationOrder
from segdcn.data.instance_maps import InstanceMaps
from segdcn.evaluation import EvaluationResult, Evaluator, SegmentationMetrics, get_protocol
from segdcn.inference import Inference

CLASSES = ("road", "sky", "person", "rider", "car")
CATEGORIES = {"flat": ("road", "sky"), "human": ("person", "rider"), "vehicle": ("car",)}
IDS = (7, 23, 24, 25, 26)


class FirstChannel(nn.Module):
    """Predicts the class that the image's first channel names."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.one_hot(image[:, 0].round().long(), len(CLASSES)).movedim(-1, 1).float()


def images(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(count)
    batches = []
    for index in range(count):
        label = torch.randint(0, 5, (1, 8, 9), generator=generator)
        wrong = torch.rand(label.shape, generator=generator) < 0.4
        prediction = label.where(~wrong, torch.randint(0, 5, label.shape, generator=generator))
        label[torch.rand(label.shape, generator=generator) < 0.1] = 255
        image = prediction[:, None].expand(-1, 3, -1, -1).float()
        batches.append({"image": image, "label": label, "name": [f"i{index}"], "index": torch.tensor([index])})
    return batches


def stacked(batches: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "index")}
    return {**tensors, "name": [batch["name"][0] for batch in batches]}


@pytest.fixture
def instance_files(tmp_path: Path) -> list[Path]:
    rng, files = np.random.default_rng(0), []
    for index in range(5):
        files.append(tmp_path / f"{index}.png")
        ids = rng.choice([7, 23, 24, 24001, 24002, 25001, 26001, 26002, 29001], (8, 9))
        Image.fromarray(ids.astype(np.uint16)).save(files[-1])
    return files


def evaluated(batches: list[dict[str, Any]], files: list[Path], **options: Any) -> EvaluationResult:
    evaluator = Evaluator(CLASSES, categories=CATEGORIES, label_ids=IDS, instances=InstanceMaps(files), **options)
    for batch in batches:
        evaluator.update(FirstChannel(), batch)
    result = evaluator.compute()
    evaluator.reset()
    assert evaluator.compute().images == 0
    return result


def test_order_padding_and_batch_size_change_no_figure(instance_files: list[Path]) -> None:
    parts, written = images(5), []
    padding = {**parts[1], "label": torch.full_like(parts[1]["label"], 255), "index": torch.tensor([-1])}
    plain = evaluated(parts, instance_files)
    arrived = [stacked([parts[3], parts[0]]), padding, parts[4], stacked([padding, parts[2], parts[1]])]
    other = evaluated(arrived, instance_files, sink=lambda name, prediction: written.append(name))
    assert other.figures == pytest.approx(plain.figures, rel=0, abs=0, nan_ok=True)
    assert other.images == plain.images == 5
    assert other.counts.names == plain.counts.names == ["i0", "i1", "i2", "i3", "i4"]
    assert torch.equal(other.counts.images, plain.counts.images)
    assert torch.equal(other.counts.confusion, plain.counts.confusion)
    assert torch.equal(plain.counts.images[:, 0].sum(dim=0), plain.counts.confusion.diag())
    assert sorted(written) == ["i0", "i1", "i2", "i3", "i4"]
    metrics = SegmentationMetrics(5)
    for part in parts:
        metrics.update(part["image"][:, 0].long(), part["label"])
    assert plain.figures["miou"] == metrics.compute()["miou"].item()
    assert plain.figures["miou_low"] < plain.figures["miou"] < plain.figures["miou_high"]
    assert {"instance_iou/person", "category_instance_iou/human", "boundary_miou"} <= plain.figures.keys()
    assert np.isnan(plain.figures["instance_iou/road"])


def evaluate_share(rank: int, folder: Path, files: list[Path]) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    parts, share = images(5), []
    for index, padding in EvaluationOrder(5, rank, 2):
        ignored = torch.full_like(parts[index]["label"], 255)
        share.append({**parts[index], "label": ignored, "index": torch.tensor([-1])} if padding else parts[index])
    result = evaluated(share, files)
    torch.save({**result.figures, "names": result.counts.names}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_same_figures_to_the_last_bit(tmp_path: Path, instance_files: list[Path]) -> None:
    spawn(evaluate_share, (tmp_path, instance_files), nprocs=2)
    expected = evaluated(images(5), instance_files).figures
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.pop("names") == ["i0", "i1", "i2", "i3", "i4"]
        assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_batches_without_an_index_are_counted_as_they_come() -> None:
    evaluator = Evaluator(CLASSES)
    for batch in images(3):
        del batch["index"]
        evaluator.update(FirstChannel(), batch)
    assert evaluator.compute().images == 3


def test_loss_gets_the_truth_at_the_size_of_the_logits() -> None:
    evaluator = Evaluator([str(k) for k in range(19)], protocol=get_protocol("paper", 19))
    network = nn.Conv2d(3, 19, 1)
    with torch.no_grad():
        logits, truth = evaluator.update(
            network, {"image": torch.rand(1, 3, 64, 128), "label": torch.zeros(1, 64, 128).long(), "name": ["a"]}
        )
    assert logits.shape[2:] == truth.shape[1:] == (1024, 2048)
    assert evaluator.metrics.confusion_matrix.sum() == 64 * 128


def test_description_has_the_names_of_the_command_line() -> None:
    described = Evaluator(CLASSES, Inference((0.5, 1), flip=True), get_protocol("crop513", 5)).describe()
    assert described["protocol"] == "crop513"
    assert described["inference.scales"] == "[0.5,1]"
    assert described["inference.flip"] is True
    assert described["inference.window"] is None


def test_broken_instance_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((9, 8), np.uint16)).save(tmp_path / "turned.png")
    for name, message in (("broken", "broken.png"), ("missing", "missing.png"), ("turned", "i0 is 9x8 pixels.* 8x9")):
        with pytest.raises(ValueError, match=message):
            evaluated(images(1), [tmp_path / f"{name}.png"])
