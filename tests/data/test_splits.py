"""Which images of a folder are train, val and test: by lists, or divided so that no source is on both sides."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from running import ONE_EPOCH, call, one_line

from segdcn.commands import evaluate, predict, train
from segdcn.commands.data import main as check
from segdcn.data import ImageFolder
from segdcn.data.dataset import ImageMaskPair
from segdcn.data.splits import divided, source_name

QUICK = ("experiment=finetune", "model=tiny", "datamodule.batch_size=2", "datamodule.crop_size=[32,32]", *ONE_EPOCH)
ONE_LINE = ("dataset=folder", "dataset.root=data", *QUICK)
NAMES = ("a", "b", "c", "d", "e", "f")


def make(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """FOLDER/images and FOLDER/masks of two classes."""
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        for part, array in (
            ("images", rng.integers(0, 256, (32, 40, 3), np.uint8)),
            ("masks", np.kron(rng.permutation(20).reshape(4, 5) % 2, np.ones((8, 8))).astype(np.uint8)),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / f"{name}.png")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "data")


def names_of(dataset: ImageFolder) -> dict[str, list[str]]:
    return {split: [pair.name for pair in dataset.split(split).pairs] for split in dataset.splits}


# --- lists ----------------------------------------------------------------------------------------------------

LISTED = {"train": ["e", "a", "c"], "val": ["b"], "test": ["f", "d"]}


@pytest.mark.parametrize(
    "files",
    [
        {"train.txt": "e\na\n\nc\n", "val.txt": "\ufeffb", "test.txt": "f\r\nd\r\n"},
        # paths of another machine, with suffixes, with masks beside them
        {
            "train.txt": "data/images/e.png\n./a.jpg\nC:\\x\\c.png\n",
            "val.txt": "images/b.jpg masks/b.png\n",
            "test.txt": "f.png f.png\nd",
        },
        {"splits.yaml": "train: [e, a, c]\nval: [images/b.png]\ntest:\n- f\n- d\n"},
        {"splits.csv": "split,note,image\ntrain,x,e\nval,,b.png\ntrain,,a\ntest,,f\ntest,,d\n\ntrain,,images/c.png\n"},
    ],
)
def test_lists_of_each_kind_say_what_each_split_holds(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).write_text(text, newline="")
    dataset = ImageFolder(root)
    assert names_of(dataset) == LISTED
    assert dataset.split_found is None
    for split in dataset.splits:
        for sample in dataset.split(split):
            np.testing.assert_array_equal(sample.image, np.asarray(Image.open(root / "images" / f"{sample.name}.png")))
            np.testing.assert_array_equal(sample.label, np.asarray(Image.open(root / "masks" / f"{sample.name}.png")))


def test_names_that_look_like_numbers_or_hold_blanks_are_names(tmp_path: Path) -> None:
    root = make(tmp_path, ("0012", "1e3", "my cat", "x.y"))
    (root / "splits.yaml").write_text("train: [0012, 1e3]\nval: [my cat, x.y]\n")
    assert names_of(ImageFolder(root)) == {"train": ["0012", "1e3"], "val": ["my cat", "x.y"]}
    (root / "splits.yaml").unlink()
    (root / "train.txt").write_text("0012\nmy cat.png\n")
    (root / "val.txt").write_text("x.y\n1e3\n")
    assert names_of(ImageFolder(root)) == {"train": ["0012", "my cat"], "val": ["x.y", "1e3"]}


def test_images_that_no_list_names_are_left_out_and_said(root: Path) -> None:
    (root / "splits.csv").write_text("image,split\na,train\nb,val\n")
    (root / "masks" / "c.png").unlink()  # of an image that is not asked for
    with pytest.warns(UserWarning, match=r"images: 4 file\(s\) \(c, d, e, \.\.\.\) in no split of .*splits\.csv$"):
        assert names_of(ImageFolder(root)) == {"train": ["a"], "val": ["b"]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train.txt": "a\nz\n", "val.txt": "b"}, "data/train.txt line 2: there is no image z in data/images"),
        ({"train.txt": "a\n\na.png\n", "val.txt": "b"}, "data/train.txt line 3: a is in train already"),
        ({"train.txt": "a\nb\n", "val.txt": "c\nb"}, "data/val.txt line 2: b is in train already"),
        ({"train.txt": "a\n", "val.txt": "\n"}, "data/val.txt names no image"),
        ({"train.txt": "a\n", "splits.csv": "image,split\na,train\n"}, "holds splits.csv, train.txt, which all say"),
        ({"splits.yaml": "train: [a", "val.txt": "b"}, "keep one of them"),
        ({"splits.yaml": "train: [a\n"}, "splits.yaml is no YAML: "),
        ({"splits.yaml": "- a\n- b\n"}, "splits.yaml must list images by split"),
        ({"splits.yaml": "train: a\nval: [b]\n"}, "splits.yaml must list images by split"),
        ({"splits.yaml": "train: [a]\nval: []\n"}, "splits.yaml names no image of val"),
        (
            {"splits.yaml": "train: [a]\nvalid: [b]\n"},
            "splits.yaml, valid: 'valid' is no split: they are train, val, test",
        ),
        ({"splits.yaml": "train: [a, z]\nval: [b]\n"}, "splits.yaml, train: there is no image z"),
        ({"splits.csv": "name,split\na,train\n"}, "splits.csv must have the columns image and split"),
        ({"splits.csv": ""}, "splits.csv must have the columns image and split"),
        ({"splits.csv": "image,split\na,train\nb\n"}, "splits.csv line 3: '' is no split"),
        (
            {"splits.csv": "image;split\na;train\n"},
            "in its first line, once each, as in image,split; it is 'image;split'",
        ),
        ({"splits.csv": "image,split,split\na,train,val\n"}, "it is 'image,split,split'"),
        ({"splits.csv": "image,split\n"}, "splits.csv names no image: list what is train and val"),
        ({"splits.csv": "image,split\n,train\n"}, "splits.csv line 2 names no image of train"),
        ({"splits.csv": 'image,split\n"a,train\nb,val\n'}, "splits.csv line 1 is no CSV: unexpected end of data"),
        ({"splits.csv": f"image,split\n{'x' * 200_000},train\n"}, "splits.csv line 1 is no CSV: field larger than"),
        ({"splits.yaml": "{}"}, "splits.yaml names no image: list what is train and val"),
        ({"splits.yaml": "train: [a]\ntrain: [c]\nval: [b]\n"}, "splits.yaml lists train twice"),
        ({"splits.yaml": f"train: {'[' * 3000}"}, "splits.yaml is no YAML: "),
        ({"splits.yml": "train: [a, z]\nval: [b]\n"}, "splits.yml, train: there is no image z"),
        (
            {"train.txt": "y\na\nz\n", "val.txt": "b"},
            "no image y in data/images (1 more that are listed are not there)",
        ),
        (
            {"train.txt": "images/A.PNG\n", "val.txt": "b"},
            "no image images/A.PNG in data/images, but a: list it as that",
        ),
        ({"train.txt": "a\0\n", "val.txt": "b"}, "data/train.txt is no text in UTF-8"),
        ({"val.txt": "b"}, "data has no split 'train', only val: data/val.txt lists no other"),
    ],
)
def test_lists_that_cannot_be_are_one_line(root: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (root / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        ImageFolder("data", ["a", "b"]).split("train")
    assert "\n" not in str(error.value)


def test_numbers_that_lost_their_zeros_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path, ["001", "002", "010"])
    (root / "classes.txt").write_text("a\nb\n")
    (root / "splits.yaml").write_text("train: [1, 10]\nval: [2]\n")
    assert call(check, "check", "workers=0", "dataset=folder", f"dataset.root={root}", "picture=null") == 1
    line = one_line(capsys.readouterr().err)
    assert "error: splits 'train' and 'val' cannot be used: " in line
    assert line.endswith(
        f"no image 1 in {root}/images, but 001: list it as that (2 more that are listed are not there)"
    )


def test_rows_and_files_that_say_nothing(root: Path) -> None:
    (root / "splits.csv").write_text("image,split\n,\n\na,train\n,\nb,val\n")
    with pytest.warns(UserWarning, match=r"in no split"):
        assert names_of(ImageFolder(root)) == {"train": ["a"], "val": ["b"]}
    (root / "splits.csv").write_bytes("image,split\na,train\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"splits\.csv is no text in UTF-8 \(perhaps UTF-16\): save it as UTF-8"):
        ImageFolder(root)


@pytest.mark.parametrize("name", ["valid.txt", "validation.txt"])
def test_a_list_of_val_under_another_name_is_not_passed_over(root: Path, name: str) -> None:
    (root / "train.txt").write_text("a\nb\nc\n")
    (root / name).write_text("d\n")
    dataset = ImageFolder(root, ["a", "b"])
    with pytest.raises(ValueError, match=rf"no split 'val'.*{name} is not read as it is"):
        dataset.split("val")


def test_a_list_that_cannot_be_is_told_before_any_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train.txt").write_text("a\nz\n")
    assert call(train.main, *ONE_LINE, "dataset.class_names=[a,b]") == 1
    assert "data/train.txt line 2: there is no image z in data/images" in one_line(capsys.readouterr().err)
    assert not Path("run").exists()


def test_a_file_elsewhere_lists_the_splits(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "splits.csv").write_text("image,split\na,train\nb,val\n")
    Path("other (1).csv").write_text("image,split\nc,train\nd,train\ne,val\nf,val\nb,val\n")
    options = ("dataset=folder", "dataset.root=data", "dataset.splits_file=other (1).csv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert call(check, "check", "workers=0", *options) == 0
    assert "\n5 images, 0 problem(s)" in capsys.readouterr().out
    for given_, words in (
        ("none.csv", "there is no file none.csv"),
        ("data/images/a.png", "must end in .yaml or .csv"),
    ):
        with pytest.raises(ValueError, match=words):
            ImageFolder("data", splits_file=given_)


# --- divided by a seed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "pattern", "source"),
    [
        ("a", None, "a"),
        ("IMG_1_jpg.rf.0a1B2c3d", None, "IMG_1"),
        ("IMG_1_JPEG.rf.77", None, "IMG_1"),
        ("IMG_1.rf.77", None, "IMG_1"),
        ("IMG_20240101_120000", None, "IMG_20240101_120000"),
        ("scan_7_0_512", r"(.+)_\d+_\d+", "scan_7"),
        ("scan_7_0_512_png.rf.9f", r"(.+)_\d+_\d+", "scan_7"),
        ("other", r"(.+)_\d+_\d+", "other"),
        ("clip3-frame0001", r"clip\d+", "clip3"),
        ("b2_x", r"(a\d)?b\d", "b2"),
    ],
)
def test_sources_by_name(stem: str, pattern: str | None, source: str) -> None:
    assert source_name(stem, None if pattern is None else re.compile(pattern)) == source


stems = st.from_regex(r"[a-e]{1,2}(_(jpg|png)\.rf\.[0-9a-f]{2}|_[01]_[01])?", fullmatch=True)
folders = st.dictionaries(stems, st.binary(min_size=1, max_size=2), min_size=1, max_size=24)
shares = st.sampled_from([0.1, 0.2, 0.5, 0.9])
TILES = re.compile(r"(.+)_\d_\d")


def written(folder: Path, contents: dict[str, bytes]) -> list[ImageMaskPair]:
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    return [ImageMaskPair(folder / f"{name}.png", None, name) for name in contents]


def sources(contents: dict[str, bytes], tiles: bool) -> list[set[str]]:
    """By an oracle of its own: sets are joined until no two share a name or a content."""
    keys = {}
    for name, content in contents.items():
        short = re.sub(r"(_(jpg|png))?\.rf\..*", "", name)
        keys[name] = {("name", re.sub(r"_\d_\d$", "", short) if tiles else short), ("content", content)}
    joined = [({name}, set(key)) for name, key in keys.items()]
    merged = True
    while merged:
        merged = False
        for one in range(len(joined)):
            for other in range(one + 1, len(joined)):
                if joined[one][1] & joined[other][1]:
                    names, key = joined.pop(other)
                    joined[one][0].update(names)
                    joined[one][1].update(key)
                    merged = True
                    break
            if merged:
                break
    return [names for names, _ in joined]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=folders, share=shares, seed=st.integers(0, 3), tiles=st.booleans(), order=st.randoms())
def test_no_source_is_on_both_sides_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, bytes],
    share: float,
    seed: int,
    tiles: bool,
    order: object,
) -> None:
    pairs = written(tmp_path_factory.mktemp("images"), contents)
    groups = sources(contents, tiles)
    if len(groups) == 1:
        assert divided(pairs, share, seed, TILES if tiles else None) == (pairs, [])
        return
    train_, val = divided(pairs, share, seed, TILES if tiles else None)
    names, others = ({pair.name for pair in side} for side in (train_, val))
    assert names
    assert others
    assert len(train_) + len(val) == len(pairs)
    assert names | others == contents.keys()
    largest = max(len(group) for group in groups)
    assert len(val) >= share / 2 * len(pairs) or len(train_) <= largest  # or one source alone is left to learn from
    for group in groups:
        assert group <= names or group <= others
    shuffled = list(pairs)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    again = divided(shuffled, share, seed, TILES if tiles else None)
    assert [{pair.name for pair in side} for side in again] == [names, others]


@settings(max_examples=30, deadline=None)
@given(
    old=st.sets(st.integers(0, 999), min_size=30, max_size=60),
    new=st.sets(st.integers(1000, 1999), min_size=1, max_size=60),
    seed=st.integers(0, 9),
)
def test_images_that_come_later_move_none_that_are_there(
    tmp_path_factory: pytest.TempPathFactory, old: set[int], new: set[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("images")
    before = written(folder, {str(number): str(number).encode() for number in old})
    more = written(folder, {str(number): str(number).encode() for number in new})
    train_before, val_before = divided(before, 0.5, seed)
    train_after, val_after = divided([*more, *before], 0.5, seed)
    assume(len(val_before) > len(before) / 4 + 1)  # by chance, not so that there are some
    assume(len(val_after) > (len(before) + len(more)) / 4 + 1)
    assert set(train_before) <= set(train_after)
    assert set(val_before) <= set(val_after)


def test_the_share_is_about_what_was_asked_for_and_the_seed_makes_another(tmp_path: Path) -> None:
    pairs = written(tmp_path, {f"{number:04d}": str(number).encode() for number in range(800)})
    for share in (0.05, 0.2, 0.5):
        vals = [{pair.name for pair in divided(pairs, share, seed)[1]} for seed in range(3)]
        for val in vals:
            assert abs(len(val) - 800 * share) < 4 * (800 * share * (1 - share)) ** 0.5  # four deviations
        assert len({frozenset(val) for val in vals}) == 3


# --- by the commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["data", pytest.param("data/train", marks=pytest.mark.slow)])
def test_a_folder_without_val_is_trained_evaluated_and_predicted_by_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / layout, [f"{name}_png.rf.{copy}" for name in "abcdefgh" for copy in "12"])
    assert call(check, "check", "workers=0", "dataset=folder", "dataset.root=data") == 0
    noted = next(line for line in capsys.readouterr().out.splitlines() if "are val" in line)
    assert call(train.main, *ONE_LINE) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("split    "))
    found = re.fullmatch(
        r"split    (\d+) of 16 images are val, since data has none: dataset\.val_share=0\.2 and dataset\.split_seed=0"
        r" chose them, copies of an image together",
        line,
    )
    assert found
    assert noted == line.replace("split    ", "note: ")
    count = int(found[1])
    assert count % 2 == 0
    assert f"ImageFolder: {16 - count} train, {count} val images" in said
    config = yaml.safe_load(Path("run/config.yaml").read_text())["dataset"]
    assert (config["val_share"], config["split_seed"], config["group_by"]) == (0.2, 0, None)
    trained = json.loads(Path("run/metrics.json").read_text())
    assert trained["images"] == count

    # the same images are evaluated, elsewhere too, and where there are others beside them
    shutil.move(tmp_path / "data", tmp_path / "moved")
    again = ("checkpoint=run/checkpoints/best.ckpt", "trainer.accelerator=cpu", "datamodule.num_workers=0")
    assert call(evaluate.main, *again, "callbacks.panels=null", "dataset.root=moved") == 0
    evaluated = json.loads(Path("run/evaluation/best_val/metrics.json").read_text())
    assert evaluated["val/miou"] == trained["val/miou"]
    assert evaluated["images"] == count
    images = tmp_path / "moved" / folder.relative_to(tmp_path / "data") / "images"
    assert (
        call(predict.main, "checkpoint=run/checkpoints/best.ckpt", f"input={images}", "output=out", "device=cpu") == 0
    )


@pytest.mark.slow
def test_what_a_run_settled_is_held_against_what_is_there_later(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train.main, *ONE_LINE) == 0
    assert "split    " in capsys.readouterr().out
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("c\n")
    again = ("checkpoint=run/checkpoints/best.ckpt", "trainer.accelerator=cpu", "datamodule.num_workers=0")
    assert call(evaluate.main, *again, "callbacks.panels=null") == 1
    line = one_line(capsys.readouterr().err)
    assert "dataset.val_share=0.2 (given now, or when the run began)" in line
    assert "dataset.val_share=0 takes that" in line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert call(evaluate.main, *again, "callbacks.panels=null", "dataset.val_share=0", "output_dir=listed") == 0
    assert json.loads(Path("listed/metrics.json").read_text())["images"] == 1

    # and a run whose val was there never makes one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert call(train.main, *ONE_LINE, "output_dir=lists") == 0
    (root / "val.txt").unlink()
    (root / "train.txt").unlink()
    again = ("checkpoint=lists/checkpoints/best.ckpt", *again[1:])
    capsys.readouterr()
    assert call(evaluate.main, *again, "callbacks.panels=null") == 1
    assert "has no split 'val', only train" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"val_share": 1.0}, "dataset.val_share must be 0 (none) or a share below 1"),
        ({"val_share": -0.1}, "dataset.val_share must be 0 (none) or a share below 1"),
        ({"val_share": 0}, "has no split 'val', only train: expected ROOT/train/images"),
        ({"group_by": "(a"}, "dataset.group_by must be a regular expression, got '(a'"),
        ({"group_by": "[a-f]*()"}, "6 image(s) of one source cannot be divided"),
        ({"group_by": "(.)", "val_share": 0}, "dataset.group_by is of how train is divided, which it is not, since no"),
    ],
)
def test_settings_that_cannot_be_are_refused(root: Path, setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ImageFolder(root, **setting).split("val")


def test_settings_of_the_division_are_refused_where_val_is_there(root: Path) -> None:
    (root / "val.txt").write_text("b")
    (root / "train.txt").write_text("a")
    words = r"dataset\.split_seed is of how train is divided, which it is not, since .*val\.txt says what is val"
    with pytest.raises(ValueError, match=words):
        ImageFolder(root, split_seed=1)


def test_a_list_beside_folders_of_splits_is_told_of(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make(tmp_path / split)
    (tmp_path / "val.txt").write_text("a")
    with pytest.warns(UserWarning, match=r"val\.txt is not read: the folders train, val say what is in each split$"):
        dataset = ImageFolder(tmp_path, ["x", "y"])
    assert len(dataset.split("val")) == len(NAMES)


def test_one_image_is_train_and_a_training_says_that_it_lacks_val(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = ImageFolder(make(tmp_path / "data", ["a"]))
    assert [sample.name for sample in dataset.split("train")] == ["a"]
    assert dataset.split_found is None
    assert call(train.main, *ONE_LINE) == 1
    line = one_line(capsys.readouterr().err)
    assert "data has no val, and 1 image(s) of one source cannot be divided" in line


def test_settings_of_another_kind_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train.main, *ONE_LINE, "dataset.val_share=half") == 1
    assert "dataset.val_share must be a number or null, got 'half'" in one_line(capsys.readouterr().err)
    assert not Path("run").exists()


def test_a_pattern_on_the_command_line_keeps_tiles_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data", [f"s{scan}_{y}_{x}" for scan in range(6) for y in (0, 512) for x in (0, 512)])
    options = ("check", "workers=0", "dataset=folder", f"dataset.root={tmp_path / 'data'}", "dataset.val_share=0.5")
    assert call(check, *options, r'dataset.group_by="(.+)_\d+_\d+"') == 0
    said = capsys.readouterr().out
    count = int(re.search(r"(\d+) of 24 images are val", said)[1])  # type: ignore[index]
    assert count % 4 == 0
    dataset = ImageFolder(tmp_path / "data", val_share=0.5, group_by=r"(.+)_\d+_\d+")
    sides = [{name.partition("_")[0] for name in names} for names in names_of(dataset).values()]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 6
    assert "does not match" not in said
    found = ImageFolder(tmp_path / "data", group_by=r"(s[0-4])_\d+_\d+").split_found
    assert found is not None
    assert found.endswith("(but dataset.group_by does not match 4 file(s) (s5_0_0, s5_0_512, s5_512_0, ...))")


@pytest.mark.filterwarnings("ignore:.*is not read")
@pytest.mark.parametrize("other", ["val/pictures", "valid/images", "validation/images", "splits.csv", "val.txt"])
def test_train_is_not_divided_where_something_else_is_meant_to_be_val(tmp_path: Path, other: str) -> None:
    make(tmp_path / "train")
    if other.endswith("s"):
        (tmp_path / other).mkdir(parents=True)
    else:
        (tmp_path / other).write_text("image,split\n")
    dataset = ImageFolder(tmp_path)
    assert dataset.splits == ["train"]
    with pytest.raises(
        ValueError, match=rf"no split 'val', only train: .*\(.*/{other.partition('/')[0]} is not read"
    ) as error:
        dataset.split("val")
    assert str(error.value).endswith("dataset.val_share=0.2 makes a fifth of train val")
    assert ImageFolder(tmp_path, val_share=0.2).splits == ["train", "val"]


def test_a_share_beside_a_val_is_refused_and_test_is_left_as_it_is(tmp_path: Path) -> None:
    for split, names in {"train": NAMES, "test": ["x", "y"]}.items():
        make(tmp_path / split, names)
    dataset = ImageFolder(tmp_path)
    found = names_of(dataset)
    assert list(found) == ["train", "val", "test"]
    assert found["test"] == ["x", "y"]
    assert sorted(found["train"] + found["val"]) == list(NAMES)
    make(tmp_path / "val", ["z"])
    assert names_of(ImageFolder(tmp_path))["val"] == ["z"]
    with pytest.raises(ValueError, match=r"dataset\.val_share=0\.3 .* divides train, but val is there, by .*/val: "):
        ImageFolder(tmp_path, val_share=0.3)
