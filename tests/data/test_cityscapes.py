"""Cityscapes' layout and label table, on miniature copies."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from miniatures import CITYSCAPES_LABELS, make_cityscapes
from PIL import Image

from segdcn.data.cityscapes import Cityscapes
from segdcn.data.dataset import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_cityscapes(tmp_path)


def mask(root: Path, kind: str = "labelIds", split: str = "train", index: int = 0) -> Path:
    return sorted(root.glob(f"gt*/{split}/*/*_{kind}.png"))[index]


def test_splits_are_read_by_city_and_name(root: Path) -> None:
    dataset = Cityscapes(root)
    assert dataset.splits == ("train", "val", "test")
    assert [len(dataset.split(name)) for name in dataset.splits] == [3, 2, 1]
    sample = dataset.split("train")[1]
    assert sample.name == "aachen_000001_000020"
    assert sample.image.shape == (64, 128, 3)
    with Image.open(root / "leftImg8bit" / "train" / "aachen" / f"{sample.name}_leftImg8bit.png") as image:
        np.testing.assert_array_equal(sample.image, np.asarray(image))


def test_every_label_id_becomes_its_train_id(root: Path) -> None:
    stored = np.arange(64 * 128).reshape(64, 128) % 35
    stored[stored == 34] = 255  # -1, the licence plate, in 8 bits
    Image.fromarray(stored.astype(np.uint8)).save(mask(root))
    label = Cityscapes(root).split("train")[0].label
    for label_id, (_, train_id) in CITYSCAPES_LABELS.items():
        assert (label[stored == label_id] == train_id).all()
    assert (label[stored == 255] == 255).all()


def test_class_table_is_the_published_one() -> None:
    names = {train_id: (name, label_id) for label_id, (name, train_id) in CITYSCAPES_LABELS.items() if train_id < 19}
    assert [(name, k) for name, k in zip(Cityscapes.class_names, Cityscapes.label_ids, strict=True)] == [
        names[train_id] for train_id in range(19)
    ]
    assert len(set(Cityscapes.palette)) == 19
    assert Cityscapes.palette[13] == (0, 0, 142)
    assert list(Cityscapes.categories) == ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    assert sum(Cityscapes.categories.values(), ()) == Cityscapes.class_names
    assert Cityscapes.categories["human"] == ("person", "rider")


def test_label_files_of_both_kinds_give_the_same_labels(tmp_path: Path) -> None:
    with_both = make_cityscapes(tmp_path / "both", train_ids=True)
    from_label_ids = [sample.label for sample in Cityscapes(with_both).split("train")]
    for file in with_both.glob("gtFine/*/*/*_labelIds.png"):
        file.unlink()
    from_train_ids = [sample.label for sample in Cityscapes(with_both).split("train")]
    np.testing.assert_array_equal(from_label_ids, from_train_ids)
    assert len(np.unique(from_label_ids)) > 4


def test_test_split_is_all_ignored_with_and_without_label_files(root: Path) -> None:
    (with_files,) = Cityscapes(root).split("test")
    shutil.rmtree(root / "gtFine" / "test")
    (without,) = Cityscapes(root).split("test")
    assert (with_files.label == 255).all()
    assert with_files.label.shape == (64, 128)
    np.testing.assert_array_equal(without.label, with_files.label)


def test_coarse_labels_are_further_training_images(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path, train_extra=2)
    plain, coarse = Cityscapes(root), Cityscapes(root, coarse=True)
    assert plain.splits == ("train", "val", "test", "train_extra")
    assert coarse.splits == ("train", "val", "test")
    names = [sample.name for sample in coarse.split("train")]
    assert names[:3] == [sample.name for sample in plain.split("train")]
    assert names[3:] == [sample.name for sample in plain.split("train_extra")]
    assert names[3] == "augsburg_000000_000019"
    with pytest.raises(FileNotFoundError, match=r"coarse=true needs leftImg8bit/train_extra.*gtCoarse\.zip"):
        Cityscapes(make_cityscapes(tmp_path / "fine"), coarse=True)


def test_instance_maps_are_in_the_order_of_the_split(root: Path) -> None:
    dataset = Cityscapes(root)
    maps = dataset.instances("val")
    assert maps is not None
    for sample, instances, file in zip(dataset.split("val"), maps, maps.files, strict=True):
        assert file.name == f"{sample.name}_gtFine_instanceIds.png"
        cars = sample.label == 13
        assert (instances[cars] // 1000 == 26).all()
        assert not (instances[~cars] // 1000 == 26).any()
    maps.files[1].unlink()
    assert dataset.instances("val") is None


def test_missing_root_says_what_is_expected_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*gtFine/train.*cityscapes-dataset\.com.*dataset\.root=") as e:
        Cityscapes(tmp_path / "nowhere")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no split 'test', only train, val"):
        Cityscapes(make_cityscapes(tmp_path, test=0)).split("test")


def test_missing_file_of_a_pair_is_named(root: Path) -> None:
    mask(root, index=1).unlink()
    with pytest.raises(FileNotFoundError, match=r"\(aachen_000001_000020\).*without.*labelIds\.png.*unpack gtFine"):
        Cityscapes(root).split("train")
    next(root.glob("leftImg8bit/val/*/*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) \(munster.*without an image.*unpack leftImg8bit"):
        Cityscapes(root).split("val")


def test_empty_split_is_refused(root: Path) -> None:
    for file in root.glob("leftImg8bit/val/*/*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit/val holds no CITY"):
        Cityscapes(root).split("val")


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.full((64, 128), 34, np.uint8), r"holds label 34: .*0\.\.33 and 255"),
        (np.zeros((32, 64), np.uint8), r"is 32x64: make the mask at the size"),
        (np.zeros((64, 128, 3), np.uint8), r"is RGB, not one channel"),
    ],
)
def test_wrong_mask_is_named(root: Path, array: np.ndarray, part: str) -> None:
    Image.fromarray(array).save(mask(root))
    with pytest.raises(DataError, match=rf"aachen_000000_000019_gtFine_labelIds\.png.*{part}"):
        Cityscapes(root).split("train")[0]


def test_incomplete_download_is_reported_and_a_miniature_is_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cityscapes(root).split("train")
    monkeypatch.setattr("segdcn.data.cityscapes.IMAGES", {"train": 4, "val": 2, "test": 1})
    with pytest.warns(UserWarning, match=r"'train' of Cityscapes in .* has 3 images, the published data set 4"):
        Cityscapes(root).split("train")
