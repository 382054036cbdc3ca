"""A user's own images and masks."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import BARE, call

import segdcn
from segdcn.commands import evaluate, train
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


@pytest.mark.parametrize("names", ["cat", [True, False], [None, "cat"], ["", "cat"], ["1", 1], [["a"], "b"]])
def test_class_names_that_are_no_names_are_refused(root: Path, names: object) -> None:
    with pytest.raises(ValueError, match=r"class_names must be 2 to 255 different names.*got "):
        ImageFolder(root, names)  # type: ignore[arg-type]


def test_numbers_are_names_as_they_are_typed(root: Path) -> None:
    assert ImageFolder(root, [0, 1.5, " a [b] "]).class_names == ("0", "1.5", " a [b] ")


@pytest.mark.parametrize(
    "mapping", [{"255": 1}, {255: 3}, {255: "cat"}, {-1: 0}, {70_000: 0}, {True: 1}, [255, 1], "{255:1}"]
)
def test_mapping_that_cannot_be_is_refused(root: Path, mapping: object) -> None:
    with pytest.raises(
        ValueError, match=r"mapping must give numbers of the masks \(0\.\.65535\) their labels \(0\.\.2"
    ):
        ImageFolder(root, NAMES, mapping=mapping)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [0, 17, True, "12", 8.0])
def test_bits_that_cannot_be_are_refused(root: Path, bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 16"):
        ImageFolder(root, NAMES, bits=bits)  # type: ignore[arg-type]


def test_numbers_of_the_masks_are_mapped(root: Path) -> None:
    wide = np.array([[0, 1, 255, 300, 40_000, 2]], np.uint16)
    Image.fromarray(wide).save(root / "val" / "masks" / "d.png")
    Image.new("RGB", (6, 1)).save(root / "val" / "images" / "d.jpg")
    mapping = {255: 1, 300: 2, 40_000: 255, 2: 0}
    val = ImageFolder(root, NAMES, mapping=mapping).split("val")
    assert val[0].label.tolist() == val[:1][0].label.tolist() == [[0, 1, 1, 2, 255, 0]]
    Image.fromarray(np.minimum(wide, 301)).save(root / "val" / "masks" / "d.png")
    with pytest.raises(ValueError, match=r"d\.png holds label 301: .* 0\.\.2 and 255 and 300 and 40000$"):
        val[0]


def test_bits_are_those_of_the_images(root: Path) -> None:
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 6) * 178  # up to 4094
    (root / "val" / "images" / "d.jpg").unlink()
    Image.fromarray(pixels).save(root / "val" / "images" / "d.png")
    val = ImageFolder(root, NAMES, bits=12).split("val")
    expected = pixels.astype(int) * 255 // 4095
    for samples in (val, val[:1]):
        np.testing.assert_array_equal(samples[0].image, np.repeat(expected[..., None], 3, axis=2))


def test_what_is_not_read_is_said(root: Path) -> None:
    for name in ("notes.txt", "a.HEIC", "b.heic", "README", ".DS_Store"):
        (root / "train" / "images" / name).write_text("")
    (root / "train" / "masks" / "more.png").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(ImageFolder(root, NAMES).split("train")) == 3
    said = [str(warning.message).removeprefix(str(root / "train")) for warning in caught]
    assert said == [
        "/images: 4 files passed over: .heic (2), .txt (1), no suffix (1)"
        " (read are .png .jpg .jpeg .bmp .tif .tiff .webp)",
        "/masks: 1 folder(s) within it, which are not looked into",
    ]


def test_masks_of_another_kind_are_named_where_they_are_missed(root: Path) -> None:
    for path in (root / "train" / "masks").iterdir():
        path.rename(path.with_suffix(".tif"))
    with pytest.raises(
        ValueError, match=r"3 file\(s\) \(a, b, c\) in .* without a mask .*: 3 files passed over: \.tif"
    ):
        ImageFolder(root, NAMES).split("train")


def test_linked_folders_and_files_are_read_and_a_dangling_link_is_named(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (root / "train" / "images").rename(elsewhere)
    (root / "train" / "images").symlink_to(elsewhere)
    (elsewhere / "b.jpg").rename(tmp_path / "other.jpg")
    (elsewhere / "b.jpg").symlink_to(tmp_path / "other.jpg")
    assert [sample.name for sample in ImageFolder(root, NAMES).split("train")] == ["a", "b", "c"]
    (tmp_path / "other.jpg").unlink()
    with pytest.raises(ValueError, match=r"b\.jpg is a link to nothing$"):
        ImageFolder(root, NAMES).split("train")[1]


def test_a_name_that_is_not_utf_8_is_written_in_escapes(root: Path) -> None:
    for part, suffix in (("images", ".jpg"), ("masks", ".png")):
        path = os.fsencode(root / "val" / part / "d") + suffix.encode()
        os.rename(path, path.replace(b"d.", b"caf\xe9."))
    val = ImageFolder(root, NAMES).split("val")
    assert val[0].name == r"caf\udce9"
    val.pairs[0].image.unlink()
    with pytest.raises(ValueError, match=r"/caf\\udce9\.jpg does not exist$"):
        val[0]


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


def test_white_objects_in_12_bit_scans_are_trained_and_predicted_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, number in {"train": 2, "val": 1}.items():
        for part in ("images", "masks"):
            (tmp_path / "data" / split / part).mkdir(parents=True)
        for name in range(number):
            scan, mask = rng.integers(0, 4096, (48, 64)).astype(np.uint16), 255 * rng.integers(0, 2, (48, 64), np.uint8)
            Image.fromarray(scan).save(tmp_path / "data" / split / "images" / f"{name}.png")
            Image.fromarray(mask).save(tmp_path / "data" / split / "masks" / f"{name}.png")
    options = ["dataset=folder", "dataset.root=data", "dataset.class_names=[0,1]", "dataset.mapping={255:1}"]
    settings = [setting for setting in BARE if not setting.startswith("dataset.")]
    settings += ["datamodule.batch_size=2", "datamodule.num_workers=0", "datamodule.eval_batch_size=1"]
    assert call(train.main, *options, "dataset.bits=12", *settings, "trainer.max_epochs=1", "output_dir=run") == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert call(evaluate.main, f"checkpoint={checkpoint}", "callbacks.panels=null", "trainer.accelerator=cpu") == 0
    figures = json.loads((tmp_path / "run" / "evaluation" / "best_val" / "metrics.json").read_text())
    assert {"val/iou/0", "val/iou/1"} <= figures.keys()
    predictor = segdcn.load(checkpoint, device="cpu")
    assert predictor.class_names == ["0", "1"]
    seen = predictor(tmp_path / "data" / "val" / "images" / "0.png").image
    np.testing.assert_array_equal(seen, ImageFolder("data", [0, 1], mapping={255: 1}, bits=12).split("val")[0].image)
    assert seen.max() > 250
