"""segdcn-data check: every bad file is named, and the exit status says whether a training would go wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from checking import check, row
from miniatures import make_cityscapes, make_voc, palette_png
from PIL import Image
from rich.console import Console
from running import call, process

from segdcn.commands.data import main
from segdcn.data.check import examples, read_splits
from segdcn.data.folder import ImageFolder
from segdcn.drawing.panels import OUTLINE, class_sheet


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where check.png is drawn."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    return folder


def test_good_data_ends_with_status_0(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path / "data")
    ended = process(
        tmp_path, "-m", "segdcn.commands.data", "check", "dataset=cityscapes", f"dataset.root={root}", "workers=2"
    )
    assert ended.returncode == 0, ended.stderr
    assert row(ended.stdout, "val")[1:3] == ["2", "0"]
    assert ended.stdout.splitlines()[-2:] == ["6 images, 0 problem(s)", "check.png shows each class in an image"]
    assert "train" in ended.stderr  # the progress
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.png", "data"]


def test_broken_data_ends_with_status_1_and_every_bad_file(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "data", train=[f"a_{i}" for i in range(6)], val=["b_0", "b_1"], test=(), unlabelled=())
    images, masks = (root / "VOCdevkit" / "VOC2012" / name for name in ("JPEGImages", "SegmentationClass"))
    (images / "a_1.jpg").write_bytes((images / "a_1.jpg").read_bytes()[:-300])
    palette_png(masks / "a_2.png", np.zeros((5, 64), np.uint8))
    palette_png(masks / "a_3.png", np.full((51, 64), 40, np.uint8))
    Image.new("RGB", (64, 52)).save(masks / "a_4.png")
    shutil.copy(images / "a_0.jpg", images / "b_1.jpg")
    shutil.copy(masks / "a_0.png", masks / "b_1.png")
    (tmp_path / "file").write_text("so that the working folder is not empty")
    ended = process(tmp_path, "-m", "segdcn.commands.data", "check", "dataset=voc", f"dataset.root={root}", "workers=2")
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    for line, part in zip(
        errors,
        [
            "a_1.jpg.*truncated",
            "a_2.png is 5x64",
            "a_3.png holds label 40",
            "a_4.png is RGB",
            "empty|no image",
            "a_0 = b_1",
        ],
        strict=True,
    ):
        assert re.search(part, line), (line, part)
    assert row(ended.stdout, "train")[1:3] == ["6", "4"]
    assert ended.stdout.splitlines()[-2:] == ["8 images, 6 problem(s)", "check.png shows each class in an image"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.png", "data", "file"]


def test_frequencies_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split, labels in {"train": ([0, 1], [1, 255]), "val": ([0, 0],)}.items():
        for number, (left, right) in enumerate(labels):
            mask = np.full((10, 20), left, np.uint8)
            mask[:, 15:] = right
            for folder, array in (("images", rng.integers(0, 256, (10, 20, 3), np.uint8)), ("masks", mask)):
                path = tmp_path / split / folder / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    status, table, errors = check(capsys, "dataset=folder", f"dataset.root={tmp_path}", "dataset.class_names=[a,b]")
    assert (status, errors) == (0, [])
    # train has 150 pixels of a, 50 + 150 of b, 50 ignored
    assert row(table, "train") == ["train", "2", "0", "12.50 %"]
    assert row(table, "a") == ["a", "42.86 %", "1", "100.00 %", "1"]
    assert row(table, "b") == ["b", "57.14 %", "2", "0.00 %", "0"]
    assert "note: val has no pixel of b: seen in none of 1 val image\n" in table
    assert "note: train and val have images of the same name: 1 file(s) (0)" in table


def test_12_bits_in_16_are_said_and_mended_by_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And class names are shown as they are typed: numbers, brackets, what looks like markup."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(3):
            images, masks = (tmp_path / split / part / f"{split}_{number}.png" for part in ("images", "masks"))
            for path in (images, masks):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 4096, (10, 20)).astype(np.uint16)).save(images)
            Image.fromarray(rng.integers(0, 2, (10, 20), np.uint8)).save(masks)
    options = ("dataset=folder", f"dataset.root={tmp_path}", "dataset.class_names=[0,'[red]cat[/red]']")
    status, shown, errors = check(capsys, *options)
    assert (status, errors) == (0, [])
    for line in shown.splitlines()[-4:-2]:
        assert re.fullmatch(
            r"note: (train|val): 3 of 3 images have no pixel above 63 of 255 \(the first: \1_0\), like 12-bit data in"
            " 16-bit files: if they are, train with dataset.bits=12, or save them with pixels up to 65535",
            line,
        )
    assert [row(shown, name)[0] for name in ("0", re.escape("[red]cat[/red]"))] == ["0", "[red]cat[/red]"]
    status, shown, errors = check(capsys, *options, "dataset.bits=12")
    assert (status, errors) == (0, [])
    assert "note:" not in shown
    status, _, errors = check(capsys, *options, "dataset.bits=11")
    assert (status, len(errors)) == (1, 6)
    assert all("beyond the 0..2047 of bits=11" in error for error in errors)


@pytest.mark.parametrize("fault", ["no val", "all ignored", "missing mask"])
def test_what_would_stop_a_training_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    root = make_cityscapes(tmp_path, val=0 if fault == "no val" else 2)
    expected = "split 'val' cannot be used: Cityscapes in .* has no split 'val'"
    if fault == "all ignored":
        for file in root.glob("gtFine/train/*/*_labelIds.png"):
            Image.fromarray(np.full((64, 128), 3, np.uint8)).save(file)
        expected = "split 'train' has no labelled pixel"
    elif fault == "missing mask":
        next(root.glob("gtFine/train/*/*_labelIds.png")).unlink()
        expected = r"split 'train' cannot be used: 1 file\(s\)"
    status, table, (error,) = check(capsys, "dataset=cityscapes", f"dataset.root={root}")
    assert status == 1
    assert re.search(expected, error)
    assert row(table, "test")[1:3] == ["1", "0"]  # the other splits are read all the same


def test_own_data_set_that_breaks_its_contract_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text(
        """
import numpy as np

class Wrong:
    class_names, palette, splits = ("a", "b"), ((0, 0, 0), (9, 9, 9)), ("train", "val")

    def split(self, name):
        image, label = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
        if name == "val":
            return [(image, label, "v")]
        return [(image / 1.0, label, "t0"), (image, label.astype(int), "t1"), (image, label + 2, "t2"), (image,)]
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    status, _, errors = check(capsys, "dataset=shapes", "~dataset", "+dataset._target_=wrong.Wrong")
    assert status == 1
    parts = [
        "t0: the image must be uint8",
        "t1: the label must be uint8",
        "t2 holds label 2: labels are 0..1",
        "sample 3",
    ]
    for error, part in zip(errors, parts, strict=True):
        assert part in error


GREEN, BLUE = (40, 180, 60), (50, 70, 200)


def make_halves(root: Path, shares: dict[str, int], size: tuple[int, int] = (240, 240)) -> Path:
    """Images green on the left and blue on the right, for each name so many columns of blue, which is class 1."""
    for name, columns in shares.items():
        image = np.full((*size, 3), GREEN, np.uint8)
        label = np.zeros(size, np.uint8)
        image[:, size[1] - columns :], label[:, size[1] - columns :] = BLUE, 1
        for folder, array in (("images", image), ("masks", label)):
            path = root / f"{name.replace('/', f'/{folder}/')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (root / "classes.txt").write_text("grass\nwater\n")
    return root


def test_the_picture_shows_each_class_in_colour_within_its_outline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of blue in the image where it covers nearest to a quarter, as of green; all else is grey."""
    root = make_halves(tmp_path, {"train/a": 2, "train/b": 80, "train/c": 200, "val/d": 230})
    assert check(capsys, "dataset=folder", f"dataset.root={root}")[0] == 0
    with Image.open("check.png") as picture:
        pixels = np.array(picture).astype(int)
    grey = np.ptp(pixels, axis=2) == 0
    lit = {
        name: (0.85 * np.array(colour) + 0.15 * np.array(OUTLINE) - pixels).__abs__().max(axis=2) <= 1
        for name, colour in (("grass", GREEN), ("water", BLUE))
    }
    outline = (pixels == OUTLINE).all(axis=2)
    assert (grey | lit["grass"] | lit["water"] | outline).mean() > 0.99  # but for where grey and colour meet
    # 480 pixels high and twice as wide as in the file: 40 of 240 columns of c are grass, 80 of b water
    for name, columns in (("grass", 80), ("water", 160)):
        assert abs(lit[name].sum() - 480 * columns) <= 4 * 480, name
    # an outline of two pixels along the border of each
    assert outline.sum() == 2 * 2 * 480
    before = Path("check.png").read_bytes()
    assert check(capsys, "dataset=folder", f"dataset.root={root}")[0] == 0
    assert Path("check.png").read_bytes() == before


def test_the_picture_shows_what_is_ignored_and_images_of_several_sizes(tmp_path: Path) -> None:
    root = make_halves(tmp_path, {"train/a": 60, "val/b": 50})
    make_halves(tmp_path, {"train/c": 30}, size=(60, 120))
    mask = np.zeros((60, 120), np.uint8)
    mask[:, 90:] = 255
    Image.fromarray(mask).save(root / "train/masks/c.png")
    dataset = ImageFolder(root)
    shown = list(examples(dataset, read_splits(dataset, 0, Console(quiet=True))))
    assert [(one.title, one.source) for one in shown] == [
        ("0 grass", "train: a, 43,200 pixels, 75.0 %"),
        ("1 water", "train: a, 14,400 pixels, 25.0 %"),
        ("255 ignored", "train: c, 1,800 pixels, 25.0 %"),
    ]
    np.testing.assert_array_equal(shown[2].inside, mask == 255)
    sheet = np.array(class_sheet(shown))
    assert ((sheet == OUTLINE).all(axis=2)).sum() == 2 * 2 * 480 + 2 * 240


@pytest.mark.parametrize("problem", [True, False])
def test_a_picture_that_cannot_be_written_costs_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: bool
) -> None:
    root = make_halves(tmp_path / "data", {"train/a": 60, "val/b": 60 if problem else 50})
    (tmp_path / "file").write_text("")
    picture = f"picture={tmp_path}/file/check.png"
    status = call(main, "check", "workers=0", "dataset=folder", f"dataset.root={root}", picture)
    shown = capsys.readouterr()
    assert status == int(problem)
    assert row(shown.out, "water")[2] == "1"
    assert shown.out.splitlines()[-1] == f"2 images, {int(problem)} problem(s)"
    assert shown.err.splitlines()[-1].startswith("warning: no picture of the classes: ")
    assert shown.err.splitlines()[-1].endswith("; picture=FILE.png writes another file, picture=null none")
    assert ("share images of the same content: 1 file(s) (a = b)" in shown.err) == problem


def test_no_picture_and_no_file_for_one(
    tmp_path: Path, in_a_folder_of_its_own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_halves(tmp_path, {"train/a": 60, "val/b": 50})
    options = ("dataset=folder", f"dataset.root={root}")
    assert check(capsys, *options, "picture=null")[0] == 0
    status, out, (error,) = check(capsys, *options, "picture=a.jpg")
    assert (status, out, "picture=a.jpg must be a file that ends in .png, or null" in error) == (1, "", True)
    assert not list(in_a_folder_of_its_own.iterdir())
    assert check(capsys, *options, "picture=pages/a.png")[1].splitlines()[-1].startswith("pages/a.png shows")
    assert (in_a_folder_of_its_own / "pages/a.png").is_file()


def test_wrong_root_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, errors = check(capsys, "dataset=voc", "dataset.root=nowhere")
    assert (status, out, len(errors)) == (1, "", 1)
    assert "no VOC 2012 in nowhere" in errors[0]
    assert call(main) == 0
    shown = capsys.readouterr().out
    assert "segdcn-data check dataset=NAME" in shown
    assert "segdcn-data convert annotations=PATH" in shown
    assert call(main, "chekc") == 2
    assert call(main, "check", "--help") == 0
    shown = capsys.readouterr().out
    names = "ade20k, boxes, camvid, cityscapes, coco_boxes, folder, shapes, voc"
    for part in (f"dataset: {names}", "dataset.sbd_root", "exit status is 1"):
        assert part in shown
