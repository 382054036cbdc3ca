"""Agreement with cityscapesscripts, the official evaluator, which reads files: ours are written for it here."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from segdcn.data.instance_maps import InstanceMaps
from segdcn.evaluation import EvaluationResult, Evaluator, get_protocol
from segdcn.runs.submission import CityscapesSubmission

official_labels = pytest.importorskip(
    "cityscapesscripts.helpers.labels", reason='no cityscapesscripts: pip install -e ".[test]"'
)
official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

EVALUATED = sorted((label for label in official_labels.labels if not label.ignoreInEval), key=lambda one: one.trainId)
CLASS_NAMES = [label.name for label in EVALUATED]
LABEL_IDS = [label.id for label in EVALUATED]
CATEGORIES = {
    category: tuple(label.name for label in labels if not label.ignoreInEval)
    for category, labels in official_labels.category2labels.items()
    if any(not label.ignoreInEval for label in labels)
}
SIZE = (48, 96)
Ids = npt.NDArray[np.int32]


class FirstChannel(nn.Module):
    """Predicts the class that the image's first channel names."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.one_hot(image[:, 0].long(), len(CLASS_NAMES)).movedim(-1, 1).float()


def made_image(rng: np.random.Generator) -> tuple[Ids, Ids, Tensor]:
    """Label ids, instance ids and predicted classes.

    The truth holds every id but motorcycle, which is absent, wall, which is only predicted, and train, which is one
    pixel; -1 (licence plate) is among them. Some objects have no number of their own (a group).
    """
    ids = np.array([label.id for label in official_labels.labels if label.name not in ("motorcycle", "wall", "train")])
    truth = np.kron(rng.choice(ids, (8, 16)), np.ones((6, 6), np.int32))
    truth[rng.random(SIZE) < 0.05] = 26  # cars of one pixel and more
    truth[0, 0] = 31
    number = np.kron(rng.integers(0, 4, (4, 8)), np.ones((12, 12), np.int32))
    has_instances = np.isin(truth, [label.id for label in official_labels.labels if label.hasInstances])
    instances = np.where(has_instances & (number > 0) & (truth > 0), 1000 * truth + number, truth)
    train_id = np.vectorize(lambda id_: official_labels.id2label[id_].trainId)(truth)
    right = (rng.random(SIZE) < 0.6) & (train_id >= 0) & (train_id < 19)
    guess = rng.choice([k for k in range(19) if CLASS_NAMES[k] != "motorcycle"], SIZE)
    return truth, instances, torch.from_numpy(np.where(right, train_id, guess))


@pytest.fixture(params=[0, 1])
def split(request: pytest.FixtureRequest) -> list[tuple[Ids, Ids, Tensor]]:
    rng = np.random.default_rng(request.param)
    return [made_image(rng) for _ in range(3)]


def write_truth(root: Path, split: Sequence[tuple[Ids, Ids, Tensor]]) -> list[str]:
    paths = []
    for n, (truth, instances, _) in enumerate(split):
        path = root / f"aachen_{n:06}_000019_gtFine_labelIds.png"
        # the official label images never show the licence plates' -1, and their reader would stop at it
        Image.fromarray(np.where(truth < 0, 0, truth).astype(np.uint8)).save(path)
        Image.fromarray(np.where(instances < 0, 0, instances).astype(np.uint16)).save(
            str(path).replace("labelIds", "instanceIds")
        )
        paths.append(str(path))
    return paths


def evaluate_ours(split: Sequence[tuple[Ids, Ids, Tensor]], truth_files: list[str], folder: Path) -> EvaluationResult:
    evaluator = Evaluator(
        CLASS_NAMES,
        protocol=get_protocol("cityscapes", 19),
        categories=CATEGORIES,
        label_ids=LABEL_IDS,
        instances=InstanceMaps([Path(file.replace("labelIds", "instanceIds")) for file in truth_files], lowest=1000),
        sink=CityscapesSubmission(folder, LABEL_IDS),
    )
    # as a data set maps ids to classes, for files in which -1 was stored and reads as 255
    table = np.full(256, 255)
    table[LABEL_IDS] = range(19)
    for n, (truth, _, prediction) in enumerate(split):
        batch = {
            "image": prediction.expand(1, 3, -1, -1).float(),
            "label": torch.from_numpy(table[truth.astype(np.uint8)])[None],
            "name": [f"aachen_{n:06}_000019"],
        }
        evaluator.update(FirstChannel(), batch)
    return evaluator.compute()


def evaluate_officially(truth_files: list[str], results: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Their own reader finds the predictions; their in-process use is that of their main()."""
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # they call a name that numpy 2.4 no longer has
    options = copy.copy(official.args)
    options.JSONOutput, options.quiet = False, True
    options.predictionPath, options.predictionWalk = str(results), None
    predictions = [official.getPrediction(options, file) for file in truth_files]
    found: dict[str, Any] = official.evaluateImgLists(predictions, truth_files, options)
    return found


def test_every_figure_is_the_official_one(
    split: list[tuple[Ids, Ids, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth_files = write_truth(tmp_path, split)
    ours = evaluate_ours(split, truth_files, tmp_path / "results").figures
    theirs = evaluate_officially(truth_files, tmp_path / "results", monkeypatch)
    expected = {
        "miou": theirs["averageScoreClasses"],
        "instance_miou": theirs["averageScoreInstClasses"],
        "category_miou": theirs["averageScoreCategories"],
        "category_instance_miou": theirs["averageScoreInstCategories"],
    }
    for name in CLASS_NAMES:
        expected[f"iou/{name}"] = theirs["classScores"][name]
        expected[f"instance_iou/{name}"] = theirs["classInstScores"][name]
    for name in CATEGORIES:
        expected[f"category_iou/{name}"] = theirs["categoryScores"][name]
        expected[f"category_instance_iou/{name}"] = theirs["categoryInstScores"][name]
    assert expected.keys() <= ours.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=0, abs=1e-9, nan_ok=True), key
    assert math.isnan(ours["iou/motorcycle"])
    assert ours["iou/wall"] == 0.0
    assert 0 < ours["iou/train"] < 1


def test_submission_is_read_back_by_the_official_reader(
    split: list[tuple[Ids, Ids, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth_files = write_truth(tmp_path, split)
    for _ in range(2):  # a second run replaces the files: never two for one image
        evaluate_ours(split, truth_files, tmp_path / "results")
    options = copy.copy(official.args)
    options.predictionPath, options.predictionWalk = str(tmp_path / "results"), None
    for file, (_, _, prediction) in zip(truth_files, split, strict=True):
        with Image.open(official.getPrediction(options, file)) as picture:
            assert picture.mode == "L"
            np.testing.assert_array_equal(np.asarray(picture), np.array(LABEL_IDS)[prediction.numpy()])
