"""ADE20K on a miniature copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from miniatures import make_ade20k
from PIL import Image

from segdcn.data import ADE20K


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_ade20k(tmp_path / "ADEChallengeData2016")


def test_labels_count_from_one_and_the_rest_is_ignored(root: Path) -> None:
    dataset = ADE20K(root.parent)
    assert dataset.splits == ("train", "val")
    train = dataset.split("train")
    assert [sample.name for sample in train] == ["ADE_train_00000001", "ADE_train_00000002"]
    assert train[0].label[0, ::8].tolist() == [255, 0, 149, 12]
    assert train[0].image.shape == (24, 32, 3)
    assert len(dataset.class_names) == len(set(dataset.class_names)) == len(dataset.palette) == 150
    names = [dataset.class_names[number] for number in (0, 7, 12, 44, 149)]
    assert names == ["wall", "bed", "person", "chest of drawers", "flag"]
    assert (dataset.palette[0], dataset.palette[12]) == ((120, 120, 120), (150, 5, 61))


def test_what_is_missing_is_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no ADE20K in .*nowhere: expected ADEChallengeData2016 with images/"):
        ADE20K(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no split 'test', only train, val"):
        ADE20K(root).split("test")
    (root / "annotations" / "validation" / "ADE_val_00000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ADE_val_00000001\) of validation in .* without its mask"):
        ADE20K(root).split("val")


def test_a_number_beyond_the_classes_is_refused(root: Path) -> None:
    Image.fromarray(np.full((24, 32), 151, np.uint8)).save(root / "annotations" / "validation" / "ADE_val_00000001.png")
    with pytest.raises(ValueError, match="151"):
        ADE20K(root).split("val")[0]
