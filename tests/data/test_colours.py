"""Masks that are pictures: which label each pixel gets, and one line for whatever is wrong."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from running import ONE_EPOCH, call, one_line

from segdcn.commands import evaluate, train
from segdcn.commands.data import main as check
from segdcn.data import ImageFolder
from segdcn.data.colours import ColourTable, read_labelmap
from segdcn.data.dataset import DataError, MaskColoursError

Label = NDArray[np.uint8]
COLOURS = {"background": (0, 0, 0), "cat": (128, 0, 0), "a dog": (0, 128, 64), "Void": (255, 255, 255)}
LABELMAP = (
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\n\na dog:0,128,64::\nVoid:255,255,255::\n"
)
LABELS = dict(zip(COLOURS.values(), (0, 1, 2, 255), strict=True))
RGB = np.array(list(COLOURS.values()), np.uint8)
# as Hydra takes it
SETTING = "dataset.colours={background:[0,0,0],cat:[128,0,0],a dog:[0,128,64],Void:[255,255,255]}"
QUICK = ("experiment=finetune", "model=tiny", "datamodule.batch_size=2", "datamodule.crop_size=[48,48]", *ONE_EPOCH)


def label_of(number: int, size: tuple[int, int] = (60, 72)) -> Label:
    """Blocks of the numbers 0 to 3; 3 is the void colour's place in RGB."""
    blocks = np.random.default_rng(number).permutation(20).reshape(4, 5) % 4
    return np.kron(blocks, np.ones((size[0] // 4, -(-size[1] // 5))))[: size[0], : size[1]].astype(np.uint8)


def make(root: Path, save: str = "png") -> Path:
    """Two train images and one of val with masks in COLOURS."""
    for split, numbers in {"train": (0, 1), "val": (2,)}.items():
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for number in numbers:
            noise = np.random.default_rng(number).integers(0, 256, (60, 72, 3), np.uint8)
            Image.fromarray(noise).save(root / split / "images" / f"{number}.png")
            Image.fromarray(RGB[label_of(number)]).save(root / split / "masks" / f"{number}.{save}", quality=90)
    return root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "data")


def expected(number: int) -> Label:
    return np.where(label_of(number) == 3, 255, label_of(number)).astype(np.uint8)


colours = st.tuples(*[st.integers(0, 255)] * 3)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(colours, min_size=1, max_size=12, unique=True), st.sampled_from([0, 1, 30, 255]))
def test_every_pixel_has_the_label_of_its_colour(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, known: list[tuple[int, ...]], tolerance: int
) -> None:
    labels = {colour: data.draw(st.sampled_from([*range(255), 255])) for colour in known}
    mask = np.array([[data.draw(st.sampled_from(known)) for _ in range(4)] for _ in range(3)], np.uint8)
    path = tmp_path_factory.mktemp("mask") / "a.png"
    Image.fromarray(mask).save(path)
    table: ColourTable = pickle.loads(pickle.dumps(ColourTable(labels, "x", tolerance)))  # as a worker gets it
    label = table(path)
    assert label.dtype == np.uint8
    assert label.tolist() == [[labels[tuple(pixel)] for pixel in row] for row in mask.tolist()]


def as_palette(label: Label) -> Image.Image:
    image = Image.fromarray(label)
    image.putpalette(RGB.tobytes())
    return image


def with_alpha(label: Label, alpha: int = 255) -> Image.Image:
    return Image.fromarray(np.dstack([RGB[label], np.full(label.shape, alpha, np.uint8)]))


@pytest.mark.parametrize("of", [as_palette, with_alpha, lambda label: Image.fromarray(RGB[label])])
def test_palettes_and_alpha_are_colours_too(tmp_path: Path, of: object) -> None:
    of(label_of(0)).save(tmp_path / "a.png")  # type: ignore[operator]
    np.testing.assert_array_equal(ColourTable(LABELS, "x")(tmp_path / "a.png"), expected(0))


def test_black_and_white_masks_may_have_one_channel(tmp_path: Path) -> None:
    white = np.array([[0, 255, 255]], np.uint8)
    table = ColourTable({(0, 0, 0): 0, (255, 255, 255): 1}, "dataset.colours")
    for number, image in enumerate((Image.fromarray(white), Image.fromarray(white > 0))):
        image.save(tmp_path / f"{number}.png")
        assert table(tmp_path / f"{number}.png").tolist() == [[0, 1, 1]]


def test_a_colour_without_a_class_is_named_with_its_pixels_and_what_to_do(tmp_path: Path) -> None:
    mask = RGB[label_of(0)]
    mask[0, :7] = (1, 2, 3)
    Image.fromarray(mask).save(tmp_path / "a.png")
    with pytest.raises(MaskColoursError) as error:
        ColourTable(LABELS, "dataset.colours")(tmp_path / "a.png")
    assert str(error.value) == (
        f"{tmp_path / 'a.png'} holds a colour that dataset.colours does not name: 1,2,3 (7 pixels). Name it there (void"
        " is ignored)"
    )
    mask[1, :5] = np.arange(5)[:, None]  # 0 is background
    Image.fromarray(mask).save(tmp_path / "a.png")
    with pytest.raises(
        MaskColoursError,
        match=r"holds 5 colours that .*: 1,2,3 \(7 pixels\); 1,1,1 \(1 pixel\); 2,2,2 \(1 pixel\); \.\.\.\. Name them"
        r" .* without smoothing \(dataset\.colour_tolerance=20 takes the nearest colour\)$",
    ):
        ColourTable(LABELS, "dataset.colours")(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(label_of(0)), "has one channel, with greys that dataset.colours does not name: 1,1,1"),
        (Image.fromarray(label_of(0).astype(np.uint16)), "of 16 bits, no colours of a mask"),
        (with_alpha(label_of(0), 254), "has transparent pixels"),
    ],
)
def test_masks_of_another_kind_are_one_line(tmp_path: Path, image: Image.Image, words: str) -> None:
    path = tmp_path / "a.png"
    image.save(path)
    with pytest.raises(MaskColoursError) as error:
        ColourTable(LABELS, "dataset.colours")(path)
    assert str(error.value).startswith(f"{path} ")
    assert words in str(error.value)


def test_a_damaged_mask_is_that_and_no_matter_of_colours(tmp_path: Path) -> None:
    Image.fromarray(RGB[label_of(0)]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(DataError, match="corrupt or truncated") as error:
        ColourTable(LABELS, "x")(tmp_path / "a.png")
    assert not isinstance(error.value, MaskColoursError)


def test_jpeg_masks_only_with_a_tolerance(tmp_path: Path) -> None:
    Image.fromarray(RGB[label_of(0)]).save(tmp_path / "a.jpg", quality=90)
    with pytest.raises(MaskColoursError, match=r"is a JPEG, .* dataset\.colour_tolerance=20"):
        ColourTable(LABELS, "x")(tmp_path / "a.jpg")
    stored = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    for tolerance in (30, 60):
        label = ColourTable(LABELS, "x", tolerance)(tmp_path / "a.jpg")
        for got, pixel in zip(label.ravel().tolist(), stored.reshape(-1, 3).tolist(), strict=True):
            distances = [max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) for colour in LABELS]
            nearest = {value for value, far in zip(LABELS.values(), distances, strict=True) if far == min(distances)}
            assert got in (nearest if min(distances) <= tolerance else {255})
    assert (label != expected(0)).mean() < 0.05
    with pytest.raises(MaskColoursError, match=r"further than dataset\.colour_tolerance=30 .* more than a tenth"):
        ColourTable({(0, 0, 0): 0, (128, 0, 0): 1}, "x", 30)(tmp_path / "a.jpg")


# --- where the colours are from -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["labelmap.txt", "train/labelmap.txt", "val/masks/labelmap.txt"])
def test_a_label_map_gives_names_colours_and_labels(root: Path, place: str) -> None:
    (root / place).write_text(LABELMAP, encoding="utf-8-sig")
    dataset = ImageFolder(root)
    assert dataset.class_names == ("background", "cat", "a dog")
    assert dataset.palette == [(0, 0, 0), (128, 0, 0), (0, 128, 64)]
    for sample in (*dataset.split("train"), *dataset.split("val")[:]):
        np.testing.assert_array_equal(sample.label, expected(int(sample.name)))


def test_class_names_choose_the_order_and_what_is_no_class_is_ignored(root: Path) -> None:
    (root / "classes.txt").write_text("a dog\nbackground\n")
    dataset = ImageFolder(root, colours=COLOURS)
    assert dataset.palette == [(0, 128, 64), (0, 0, 0)]
    label = dataset.split("train")[0].label
    np.testing.assert_array_equal(label, np.array([1, 255, 0, 255], np.uint8)[label_of(0)])
    (root / "classes.txt").unlink()
    with pytest.raises(
        ValueError, match=r"dataset\.colours has no colour of cow, .* has background, cat, a dog, Void$"
    ):
        ImageFolder(root, ["cow", "cat"], colours=COLOURS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# label:color_rgb:parts:actions\n", "labelmap.txt names no class"),
        ("void:0,0,0::\n", "labelmap.txt names no class"),
        ("cat:0,0,0::\nvoid:1,1,1\n", "labelmap.txt: class_names must be 2 to 255 different names"),
        ("a:0,0,0::\nb:0,0,0::\n", "labelmap.txt line 2: b has the colour 0,0,0 of a"),
        ("a:0,0,0::\n\na:1,0,0::\n", "labelmap.txt line 3 names a again"),
        ("a:0,0,0::\nb:1,0::\n", "labelmap.txt line 2 is 'b:1,0::': expected NAME:RED,GREEN,BLUE"),
        ("a:0,0,0::\nb 1,0,0\n", "labelmap.txt line 2 is 'b 1,0,0': expected"),
        ("a:0,0,0\n:1,0,0\n", "labelmap.txt line 2 is ':1,0,0': expected"),
        ("a:0,0,0\nb:-1,0,0\n", "labelmap.txt line 2 is 'b:-1,0,0': expected"),
        (f"a:0,0,0\nb:{'9' * 5000},0,0\n", "labelmap.txt line 2 is 'b:9999"),
        ("a:0,0,0\0\n", "labelmap.txt is no text in UTF-8"),
        ("a:0,0,0\nb:1,0,256\n", "labelmap.txt line 2: the colour of b must be three numbers 0..255"),
    ],
)
def test_a_label_map_that_cannot_be_is_one_line(root: Path, text: str, words: str) -> None:
    (root / "labelmap.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        ImageFolder(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dataset.colours={a:[0,0,0],b:[0,0,0]}", "dataset.colours: b has the colour 0,0,0 of a"),
        ("dataset.colours={a:[0,0,0],b:[0,0]}", "dataset.colours: b must be a colour [RED,GREEN,BLUE], got [0, 0]"),
        ("dataset.colours={a:[0,0,0],b:red}", "dataset.colours: b must be a colour"),
        ("dataset.colours={a:[0,0,0],b:[0,0,300]}", "the colour of b must be three numbers 0..255"),
        ("dataset.colours=[red]", "dataset.colours must be a mapping"),
        ("dataset.colour_tolerance=20", "dataset.colour_tolerance is of masks in colours"),
    ],
)
def test_settings_that_cannot_be_are_one_line_before_any_training(
    root: Path, capsys: pytest.CaptureFixture[str], setting: str, words: str
) -> None:
    assert call(train.main, "dataset=folder", "dataset.root=data", "dataset.class_names=null", setting, *QUICK) == 1
    line = one_line(capsys.readouterr().err)
    assert words in line
    assert not Path("run").exists()


def test_settings_that_do_not_go_together_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.mapping is of masks that hold numbers"):
        ImageFolder(root, colours=COLOURS, mapping={1: 2})
    with pytest.raises(ValueError, match=r"dataset\.colours names no class"):
        ImageFolder(root, colours={})
    with pytest.raises(ValueError, match="colour_tolerance must be 0 to 255, got -1"):
        ImageFolder(root, colours=COLOURS, colour_tolerance=-1)
    (root / "labelmap.txt").write_text(LABELMAP)
    with pytest.raises(ValueError, match=r"dataset\.colours .*and .*labelmap\.txt name other colours"):
        ImageFolder(root, colours={**COLOURS, "cow": (7, 7, 7)})
    (root / "val" / "labelmap.txt").write_text(LABELMAP.replace("128,0,0", "127,0,0"))
    with pytest.raises(ValueError, match=r"labelmap\.txt and .*val/labelmap\.txt name other colours"):
        ImageFolder(root)


def test_written_colours_are_read_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text(
        "".join(f"{k}: {r}, {g} ,{b}:part:act\n" for k, (r, g, b) in COLOURS.items())
    )
    assert read_labelmap(tmp_path / "labelmap.txt") == COLOURS


# --- by the commands ------------------------------------------------------------------------------------------


def figures(path: str) -> Mapping[str, float]:
    found: Mapping[str, float] = json.loads(Path(path).read_text())
    return found


def test_from_a_label_map_to_an_evaluation_without_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train" / "masks" / "labelmap.txt").write_text(LABELMAP)
    assert call(check, "check", "workers=0", "dataset=folder", "dataset.root=data") == 0
    counted = capsys.readouterr().out
    assert "a dog" in counted
    assert "passed over" not in counted
    assert call(train.main, "dataset=folder", "dataset.root=data", *QUICK) == 0
    said = capsys.readouterr().out
    assert (
        "classes  background, cat, a dog (Void ignored), as data/train/masks/labelmap.txt gives their colours" in said
    )
    config = yaml.safe_load(Path("run/config.yaml").read_text())["dataset"]
    assert config["colours"] == {name: list(colour) for name, colour in COLOURS.items()}
    assert config["class_names"] == ["background", "cat", "a dog"]
    shutil.rmtree(root / "train")  # the label map with it
    again = ("checkpoint=run/checkpoints/best.ckpt", "trainer.accelerator=cpu", "datamodule.num_workers=0")
    assert call(evaluate.main, *again, "callbacks.panels=null") == 0
    assert figures("run/evaluation/best_val/metrics.json")["val/miou"] == figures("run/metrics.json")["val/miou"]
    assert "val/iou/a dog" in figures("run/metrics.json")


@pytest.mark.slow
def test_a_training_by_colours_is_that_by_their_numbers(root: Path) -> None:
    """The same figures to the last digit as from masks that hold the labels."""
    assert call(train.main, "dataset=folder", "dataset.root=data", SETTING, *QUICK) == 0
    by_colours = figures("run/metrics.json")
    for split, numbers in {"train": (0, 1), "val": (2,)}.items():
        for number in numbers:
            Image.fromarray(expected(number)).save(root / split / "masks" / f"{number}.png")
    names = "dataset.class_names=[background,cat,a dog]"
    assert call(train.main, "dataset=folder", "dataset.root=data", names, *QUICK, "output_dir=other") == 0
    by_numbers = figures("other/metrics.json")
    assert {k: v for k, v in by_colours.items() if k != "training_seconds" and "seconds" not in k} == {
        k: v for k, v in by_numbers.items() if k != "training_seconds" and "seconds" not in k
    }


@pytest.mark.parametrize(
    ("settings_", "masks", "words"),
    [
        # what names the classes is not what says which colour they have
        (
            ["dataset.class_names=[a,b,c]"],
            "colours",
            ("is RGB, not one channel (4 colours: ", "dataset.colours={", "labelmap"),
        ),
        ([], "colours", ("is RGB, not one channel", "128,0,0", "dataset.colours={NAME:[RED,GREEN,BLUE],...}")),
        ([SETTING], "numbers", ("has one channel", "1,1,1", "do without dataset.colours")),
        ([SETTING.replace(",Void:[255,255,255]", "")], "colours", ("255,255,255 (", "pixels)", "void is ignored")),
        ([SETTING], "jpeg", ("is a JPEG", "dataset.colour_tolerance=20")),
    ],
)
def test_masks_and_settings_that_do_not_fit_are_one_line_before_any_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings_: list[str],
    masks: str,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make(tmp_path / "data", "jpg" if masks == "jpeg" else "png")
    if masks == "numbers":
        for path in root.glob("*/masks/*.png"):
            Image.fromarray(label_of(int(path.stem))).save(path)
    # weights that cannot be had: the masks are looked at before
    options = ["dataset=folder", "dataset.root=data", *settings_, *QUICK, "model.weights=nowhere.ckpt"]
    assert call(train.main, *options) == 1
    line = one_line(capsys.readouterr().err)
    assert "data/train/masks/" in line
    assert all(word in line for word in words), line


@pytest.mark.slow
def test_jpeg_masks_are_trained_where_a_tolerance_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data", "jpg")
    options = ["dataset=folder", "dataset.root=data", SETTING, "dataset.colour_tolerance=60", *QUICK]
    assert call(train.main, *options) == 0
    assert figures("run/metrics.json")["images"] == 1


def test_the_check_names_every_mask_that_does_not_fit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = RGB[label_of(2)]
    mask[:2, :3] = (9, 9, 9)
    Image.fromarray(mask).save(root / "val" / "masks" / "2.png")
    Image.fromarray(label_of(1)).save(root / "train" / "masks" / "1.png")
    assert call(check, "check", "workers=0", "dataset=folder", "dataset.root=data", SETTING) == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert lines[0].startswith("error: train: data/train/masks/1.png has one channel, with greys")
    assert lines[1].startswith(
        "error: val: data/val/masks/2.png holds a colour that dataset.colours does not name: 9,9,9"
    )
    assert "3 images, 2 problem(s)" in shown.out
