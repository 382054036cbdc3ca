"""PASCAL VOC 2012 with and without SBD, and the script that prepares both, on miniature copies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import make_sbd, make_voc, palette_png, sbd_mat
from PIL import Image
from running import process

from segdcn.data.dataset import DataError
from segdcn.data.voc import VOC

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_voc.py"
NEW = ["2008_000002", "2008_000003", "2008_000007"]  # in SBD's lists and in neither of VOC's


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_voc(tmp_path)


@pytest.fixture
def sbd(root: Path) -> Path:
    return make_sbd(root, root)


def devkit(root: Path, *parts: str) -> Path:
    return root.joinpath("VOCdevkit", "VOC2012", *parts)


def prepare(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return process(root, str(SCRIPT), str(root), *map(str, arguments), "--workers", "2")


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_splits_in_the_order_of_their_lists(root: Path) -> None:
    dataset = VOC(root)
    assert dataset.splits == ("train", "val", "test")
    train = dataset.split("train")
    assert [sample.name for sample in train] == ["2007_000032", "2007_000039", "2008_000008"]
    assert [sample.label.shape for sample in train] == [(48, 64), (49, 64), (50, 64)]
    with Image.open(devkit(root, "SegmentationClass", "2007_000039.png")) as mask:
        np.testing.assert_array_equal(train[1].label, np.asarray(mask))
    assert 255 in train[1].label
    assert len(dataset.class_names) == len(set(dataset.palette)) == 21
    assert dataset.palette[dataset.class_names.index("tvmonitor")] == (0, 64, 128)


def test_root_may_be_any_of_the_three_folders(root: Path) -> None:
    for folder in (root, root / "VOCdevkit", devkit(root)):
        assert len(VOC(folder).split("val")) == 2


def test_test_images_are_all_ignored(root: Path) -> None:
    (sample,) = VOC(root).split("test")
    assert sample.label.shape == sample.image.shape[:2]
    assert (sample.label == 255).all()
    devkit(root, "ImageSets", "Segmentation", "test.txt").unlink()
    with pytest.raises(ValueError, match="no split 'test', only train, val"):
        VOC(root).split("test")


def test_train_aug_is_the_union_without_val_and_vocs_masks_win(root: Path, sbd: Path) -> None:
    assert prepare(root, "--sbd", sbd).returncode == 0
    train = VOC(root, sbd_root=sbd).split("train")
    assert [sample.name for sample in train] == ["2007_000032", "2007_000039", "2008_000008", *NEW]
    plain = VOC(root).split("train")
    for mine, vocs in zip(train[:3], plain, strict=True):
        np.testing.assert_array_equal(mine.label, vocs.label)
    for sample in train[3:]:
        assert (sample.label[10:20, 5:30] == 20).all()
        assert sorted(np.unique(sample.label)) == [5, 20]
    assert [s.name for s in VOC(root, sbd_root=sbd).split("val")] == [s.name for s in VOC(root).split("val")]


names = st.lists(st.sampled_from([f"2008_{i:06d}" for i in range(12)]), unique=True, max_size=8)


@settings(max_examples=25)
@given(train=names, val=names, sbd_train=names, sbd_val=names)
def test_merge_is_set_arithmetic(
    tmp_path_factory: pytest.TempPathFactory, train: list[str], val: list[str], sbd_train: list[str], sbd_val: list[str]
) -> None:
    root = tmp_path_factory.mktemp("lists")
    for file, listed in {"ImageSets/Segmentation/train": train, "ImageSets/Segmentation/val": val}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{file}.txt").write_text("\n".join(listed))
    (root / "train.txt").write_text("\n".join(sbd_train))
    (root / "val.txt").write_text("\n".join(sbd_val) + "\n")
    found = VOC(root, sbd_root=root).sbd_names()
    assert found == sorted(set(found))
    assert set(found) == (set(sbd_train) | set(sbd_val)) - set(val) - set(train)


def test_photographs_that_voc_lacks_come_from_sbd(root: Path, sbd: Path) -> None:
    assert prepare(root, "--sbd", sbd).returncode == 0
    devkit(root, "JPEGImages", f"{NEW[0]}.jpg").unlink()
    pairs = VOC(root, sbd_root=sbd).split("train").pairs
    assert [pair.image.parent.name for pair in pairs[3:]] == ["img", "JPEGImages", "JPEGImages"]


def test_masks_that_were_not_converted_tell_the_command(root: Path, sbd: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        VOC(root, sbd_root=sbd).split("train")
    message = one_line(error.value)
    assert "3 file(s) (2008_000002.png" in message
    assert f"run python scripts/prepare_voc.py {devkit(root)} --sbd {sbd}" in message


def test_wrong_folders_say_what_is_expected(tmp_path: Path, root: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.*VOCdevkit.*VOCtrainval_11-May-2012.*dataset\.root="
    ) as error:
        VOC(tmp_path / "nowhere")
    one_line(error.value)
    with pytest.raises(FileNotFoundError, match=r"train\.txt does not exist.*benchmark_RELEASE/dataset"):
        VOC(root, sbd_root=tmp_path / "nowhere").split("train")


def test_listed_file_that_is_missing_and_empty_list_are_named(root: Path) -> None:
    devkit(root, "SegmentationClass", "2007_000033.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) \(2007_000033\.png\).*SegmentationClass: unpack"):
        VOC(root).split("val")
    devkit(root, "JPEGImages", "2007_000032.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) \(2007_000032\.jpg\).*JPEGImages: unpack"):
        VOC(root).split("train")
    devkit(root, "ImageSets", "Segmentation", "train.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt names no image"):
        VOC(root).split("train")


@pytest.mark.parametrize("broken", ["truncated", "size", "rgb", "label"])
def test_broken_file_is_named_when_it_is_read(root: Path, broken: str) -> None:
    image, mask = devkit(root, "JPEGImages", "2007_000032.jpg"), devkit(root, "SegmentationClass", "2007_000032.png")
    if broken == "truncated":
        image.write_bytes(image.read_bytes()[:-400])
        pattern = r"2007_000032\.jpg.*truncated"
    elif broken == "size":
        palette_png(mask, np.zeros((64, 48), np.uint8))
        pattern = r"2007_000032\.jpg is 48x64 .*2007_000032\.png is 64x48.*EXIF"
    elif broken == "rgb":
        Image.new("RGB", (64, 48)).save(mask)
        pattern = r"2007_000032\.png is RGB"
    else:
        palette_png(mask, np.full((48, 64), 21, np.uint8))
        pattern = r"2007_000032\.png holds label 21: .*0\.\.20 and 255"
    with pytest.raises(DataError, match=pattern) as error:
        VOC(root).split("train")[0]
    one_line(error.value)


def test_difference_from_the_published_count_is_reported(
    root: Path, sbd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(root, "--sbd", sbd).returncode == 0
    monkeypatch.setattr("segdcn.data.voc.TRAIN_AUG_IMAGES", 7)
    with pytest.warns(UserWarning, match=r"'train' of VOC 2012 in .* has 6 images, the published data set 7"):
        VOC(root, sbd_root=sbd).split("train")


# scripts/prepare_voc.py


def test_preparation_writes_palette_pngs_and_prints_counts(root: Path, sbd: Path) -> None:
    ended = prepare(root, "--sbd", sbd)
    assert ended.returncode == 0, ended.stderr
    assert "train_aug: 6 images\n" in ended.stdout
    assert "-10,576 to the 10,582 of the literature" in ended.stdout
    assert "val: 2 images" in ended.stdout
    folder = devkit(root, "SegmentationClassAug")
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in NEW]
    with (
        Image.open(folder / f"{NEW[0]}.png") as written,
        Image.open(devkit(root, "SegmentationClass", "2007_000032.png")) as vocs,
    ):
        assert written.mode == vocs.mode == "P"
        assert written.getpalette() == vocs.getpalette()


def test_stopped_preparation_goes_on_and_replaces_half_files(root: Path, sbd: Path) -> None:
    assert prepare(root, "--sbd", sbd).returncode == 0
    folder = devkit(root, "SegmentationClassAug")
    masks = {path: path.read_bytes() for path in folder.iterdir()}
    first, second, third = sorted(masks)
    second.unlink()
    third.write_bytes(masks[third][:40])
    (folder / f".{second.stem}.123.partial").write_bytes(masks[second][:30])
    kept = first.stat().st_mtime_ns
    assert prepare(root, "--sbd", sbd).returncode == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == masks
    assert first.stat().st_mtime_ns == kept


def test_every_bad_mat_file_is_named_and_the_others_are_converted(root: Path, sbd: Path) -> None:
    whole = (sbd / "cls" / f"{NEW[0]}.mat").read_bytes()
    (sbd / "cls" / f"{NEW[0]}.mat").write_bytes(whole[: len(whole) // 2])
    sbd_mat(sbd / "cls" / f"{NEW[1]}.mat", np.full((54, 64), 21, np.uint8))
    ended = prepare(root, "--sbd", sbd)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {sbd / 'cls' / name}.mat") for line, name in zip(lines, NEW, strict=False))
    assert "0..20" in lines[1]
    assert [path.stem for path in devkit(root, "SegmentationClassAug").iterdir()] == [NEW[2]]


def test_incomplete_download_is_refused(root: Path) -> None:
    assert prepare(root).returncode == 0
    devkit(root, "JPEGImages", "2007_000032.jpg").unlink()
    devkit(root, "ImageSets", "Segmentation", "val.txt").unlink()
    ended = prepare(root)
    assert ended.returncode == 1
    assert "val.txt does not exist" in ended.stderr
    shutil.rmtree(devkit(root, "ImageSets"))
    ended = process(root, str(SCRIPT), "nowhere")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no VOC 2012 in nowhere")
    assert ended.stderr.count("\n") == 1


def test_script_is_documented() -> None:
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    assert "SegmentationClassAug" in shown
