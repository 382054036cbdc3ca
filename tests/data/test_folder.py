"""A user's own images and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segdcn.data.folder import ImageFolder

NAMES = ("background", "cat", "dog")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, stems in {"train": "cab", "val": "d"}.items():
        for number, stem in enumerate(stems):
            image = tmp_path / split / "images" / f"{stem}.jpg"
            mask = tmp_path / split / "masks" / f"{stem}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 6 + number, 3), 50, np.uint8)).save(image)
            Image.fromarray(np.full((4, 6 + number), ord(stem) % 3, np.uint8)).save(mask)
    return tmp_path


def test_pairs_by_stem_in_sorted_order(root: Path) -> None:
    (root / "train" / "images" / ".hidden.jpg").write_bytes(b"")
    (root / "train" / "images" / "notes.txt").write_text("no image")
    train = ImageFolder(root, NAMES).split("train")
    assert [sample.name for sample in train] == ["a", "b", "c"]
    for sample in train:
        assert sample.image.shape[:2] == sample.label.shape
        assert (sample.label == ord(sample.name) % 3).all()


def test_default_palette_is_distinct_and_own_palette_is_kept(root: Path) -> None:
    assert len(set(ImageFolder(root, NAMES).palette)) == 3
    own = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
    assert ImageFolder(root, NAMES, own).palette == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("palette", [[[0, 0, 0]], [[0, 0, 0], [1, 1, 1], [2, 2]], [[0, 0, 0], [0, 0, 256], [1, 1, 1]]])
def test_palette_that_does_not_fit_is_refused(root: Path, palette: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="palette"):
        ImageFolder(root, NAMES, palette)


@pytest.mark.parametrize("names", [["one"], ["a", "a"], [str(i) for i in range(256)]])
def test_class_names_that_cannot_be_are_refused(root: Path, names: list[str]) -> None:
    with pytest.raises(ValueError, match="class_names"):
        ImageFolder(root, names)


def test_missing_root_shows_the_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*ROOT/train/images.*dataset\.root=") as error:
        ImageFolder(tmp_path / "nowhere", NAMES)
    assert "\n" not in str(error.value)


def test_missing_split_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test', only train, val"):
        ImageFolder(root, NAMES).split("test")


def test_image_without_mask_and_mask_without_image_are_named(root: Path) -> None:
    dataset = ImageFolder(root, NAMES)
    (root / "train" / "masks" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 file\(s\) \(b\) in .*images without a mask"):
        dataset.split("train")
    (root / "train" / "images" / "b.jpg").unlink()
    (root / "train" / "images" / "c.jpg").unlink()
    with pytest.raises(ValueError, match=r"\(c\) in .*masks without an image"):
        dataset.split("train")


def test_two_images_of_one_name_and_empty_folder_are_refused(root: Path) -> None:
    dataset = ImageFolder(root, NAMES)
    Image.new("RGB", (6, 4)).save(root / "train" / "images" / "a.png")
    with pytest.raises(ValueError, match="same name"):
        dataset.split("train")
    (root / "val" / "images" / "d.jpg").unlink()
    with pytest.raises(ValueError, match="holds no image"):
        dataset.split("val")


def test_label_beyond_the_class_names_is_named(root: Path) -> None:
    Image.fromarray(np.full((4, 6), 3, np.uint8)).save(root / "val" / "masks" / "d.png")
    with pytest.raises(ValueError, match=r"d\.png holds label 3"):
        ImageFolder(root, NAMES).split("val")[0]
