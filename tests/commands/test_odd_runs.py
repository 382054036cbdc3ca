"""segdcn-report and segdcn-analyze on runs and data that lack something: what can be made is made, the rest is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import BARE, call

from segdcn.commands import analyze, train
from segdcn.commands import report as report
from segdcn.data import ImageFolder, Sample

NAMES = ('<b>"grass"</b> & [/x]', "[道路] 草", "it's {}, | ${x}")
FAST = [
    *(setting for setting in BARE if not setting.startswith(("dataset.", "model.head"))),
    "datamodule.batch_size=2",
    "datamodule.eval_batch_size=2",
    "datamodule.num_workers=0",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "+trainer.num_sanity_val_steps=0",
]


class Odd(ImageFolder):
    """A data set of a user's own: ``root/fault`` says what goes wrong in it."""

    def __init__(self, root: str, **settings: Any) -> None:
        self.fault = (Path(root) / "fault").read_text()
        if self.fault == "made":
            raise ZeroDivisionError("no data set\ntoday")
        super().__init__(root, NAMES)

    def split(self, name: str) -> Any:
        if self.fault == "split":
            raise AttributeError("no split")
        return _Samples(super().split(name), self.fault)

    def instances(self, split: str) -> None:
        if self.fault == "instances":
            raise KeyError(split)


class _Samples(Sequence[Sample]):
    def __init__(self, samples: Sequence[Sample], fault: str) -> None:
        self.samples, self.fault = samples, fault

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if self.fault == "image" and index == 0:
            raise RuntimeError("image 0 is <gone>")
        return self.samples[index]


def make_data(root: Path) -> Path:
    """3 classes; of the four val images the second has no label, as the test split has none."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 4), ("test", 2)):
        for number in range(count):
            label = np.kron(rng.integers(0, 3, (2, 3)), np.ones((24, 24))).astype(np.uint8)
            image = (80 * label[..., None] + rng.integers(0, 60, (48, 72, 3))).astype(np.uint8)
            if split == "test" or (split == "val" and number == 1):
                label[:] = 255
            for kind, array in (("images", image), ("masks", label)):
                folder = root / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"画 [{number}] $x.png")
    (root / "fault").write_text("")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and three runs: as usual, shortly validated, not validated."""
    folder = tmp_path_factory.mktemp("odd")
    data = ("dataset=folder", "dataset.class_names=[a,b,c]", "dataset._target_=test_odd_runs.Odd")
    root = make_data(folder / "data")
    for name, more in (
        ("usual", ("report=true",)),
        ("short", ("trainer.limit_val_batches=1",)),
        ("none", ("trainer.limit_val_batches=0",)),
    ):
        assert call(train.main, *data, f"dataset.root={root}", *FAST, f"output_dir={folder / name}", *more) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy, whose data may be broken: its runs name the ones that are given."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def few_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receptive fields are what takes time."""
    monkeypatch.setattr("segdcn.report.viewer.MAX_FIELDS", 6)


class _Page(HTMLParser):
    """The text of a page, and the tags that it opens."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.tags, self._open = "", set[str](), ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open not in ("script", "style"):
            self.text += data


def page_of(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> str:
    page = run / "page.html"  # the run's own, with images, would not be replaced by one without
    assert call(report.main, str(run), "--data", str(data), "--trust", "--output", str(page)) == 0
    assert capsys.readouterr().err == ""
    return _Page(page).text


def test_names_of_any_kind_are_shown_as_they_are(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = _Page(trained / "usual" / "report.html")
    for name in NAMES:
        assert name in page.text
    assert not page.tags & {"x"}
    arguments = ("trust=true", "pictures=2", "repeats=1", "device=cpu", f"output_dir={trained / 'analysed'}")
    assert call(analyze.main, f"checkpoint={trained / 'usual'}/checkpoints/best.ckpt", *arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for name in NAMES:
        assert name in shown.out
    found = json.loads((trained / "analysed" / "analysis.json").read_text())
    assert found["images"] == 4
    assert set(found["layers"][0]["by_class"]) == set(NAMES)
    # one image has no label: pixels of its prediction are drawn
    assert [entry["image"] for entry in found["pictures"]] == ["画 [0] $x", "画 [2] $x"]


def test_an_unlabelled_image_and_a_split_without_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(folder / "usual", folder / "data", capsys)
    assert "4 val images" in page
    arguments = ("trust=true", "repeats=1", "device=cpu", f"dataset.root={folder / 'data'}")
    checkpoint = f"checkpoint={folder / 'usual'}/checkpoints/best.ckpt"
    for split, images in (("val", 4), ("test", 1)):
        assert call(analyze.main, checkpoint, *arguments, f"split={split}", f"pictures={images}") == 0
        assert capsys.readouterr().err == ""
        out = folder / "usual" / ("analysis" if split == "val" else "analysis_test")
        found = json.loads((out / "analysis.json").read_text())
        assert [bool(entry["pixels"]) for entry in found["pictures"]] == [True] * images
        assert sorted(path.name for path in out.glob("receptive_field_*.png")) == [
            f"receptive_field_{number}.png" for number in range(images)
        ]


def test_runs_with_few_or_no_figures_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 of 4 val images" in page_of(folder / "short", folder / "data", capsys)
    page = page_of(folder / "none", folder / "data", capsys)
    assert "The pixel counts of single images were not kept" in page
    assert "Where the kernels reach" in page
    runs = [str(folder / name) for name in ("none", "usual")]
    assert call(report.main, *runs, "--trust", "--output", str(folder / "page.html")) == 0
    assert NAMES[1] in _Page(folder / "page.html").text
    checkpoint = f"checkpoint={folder / 'none'}/checkpoints/last.ckpt"
    arguments = ("trust=true", "repeats=1", "device=cpu", "pictures=0", f"dataset.root={folder / 'data'}")
    assert call(analyze.main, checkpoint, *arguments) == 0
    assert json.loads((folder / "none" / "analysis" / "analysis.json").read_text())["images"] == 4


@pytest.mark.parametrize("fault", ["moved", "made", "split", "image", "instances"])
def test_data_that_fail_leave_the_rest(fault: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "moved": "nowhere",
        "made": "no data set today",
        "split": "no split",
        "image": "image 0 is <gone>",
        "instances": "'val'",
    }[fault]
    (folder / "data" / "fault").write_text(fault)
    data = folder / "nowhere" if fault == "moved" else folder / "data"
    page = page_of(folder / "usual", data, capsys)
    assert words in page
    assert NAMES[1] in page
    assert ("Where the kernels reach" in page) == (fault in ("image", "instances"))

    arguments = ("trust=true", "repeats=1", "device=cpu", "pictures=2", f"dataset.root={data}")
    assert call(analyze.main, f"checkpoint={folder / 'usual'}/checkpoints/best.ckpt", *arguments) == 0
    shown = capsys.readouterr()
    assert re.match(f"warning: no (study|effective|pictures).*{re.escape(words)}", shown.err)
    assert "cost of one image" in shown.out
    found = json.loads((folder / "usual" / "analysis" / "analysis.json").read_text())
    assert found["cost"]["deformable"]["milliseconds"] > 0
    assert "layers" not in found
    assert len(found["pictures"]) == {"image": 1, "instances": 2}.get(fault, 0)


def test_figures_are_there_although_no_picture_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no picture\ntoday")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    arguments = ("trust=true", "repeats=1", "device=cpu", "pictures=1", f"dataset.root={folder / 'data'}")
    assert call(analyze.main, f"checkpoint={folder / 'usual'}/checkpoints/best.ckpt", *arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub("^warning: no |: no picture today; .*", "", line) for line in lines] == [
        "offset_lengths.png",
        "sampling_0.png",
        "receptive_field_0.png",
    ]
    written = {path.name for path in (folder / "usual" / "analysis").iterdir()}
    assert written == {"analysis.json", "effective_dilation.csv", "effective_dilation.md", "sampling_0.json"}
    assert call(report.main, str(folder / "usual"), "--data", str(folder / "data"), "--trust") == 0
    assert "Without charts: no picture today." in _Page(folder / "usual" / "report.html").text


def test_a_page_that_cannot_be_written_does_not_cost_the_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    settings = ("dataset.train_images=2", "dataset.val_images=2", *FAST, "datamodule.crop_size=[96,96]")
    assert call(train.main, *settings, "report=true", f"output_dir={tmp_path / 'run'}") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no report: ")
    assert (tmp_path / "run" / "metrics.json").is_file()
