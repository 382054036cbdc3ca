"""The example of a data set of one's own in docs/extend.md, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import BARE, call

from segdcn.commands import train
from segdcn.commands.data import main

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def block(language: str, part: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and part in text]
    return found


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with both files of the page, and a few ponds in it."""
    (tmp_path / "ponds.py").write_text(block("python", "class Ponds"))
    (tmp_path / "my_conf" / "dataset").mkdir(parents=True)
    (tmp_path / "my_conf" / "dataset" / "ponds.yaml").write_text(block("yaml", "ponds.Ponds"))
    rng = np.random.default_rng(0)
    root = tmp_path / "PATH"
    for folder in ("photos", "labels"):
        (root / folder).mkdir(parents=True)
    for split, names in {"train": "abcd", "val": "ef"}.items():
        (root / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(root / "photos" / f"{name}.jpg")
            Image.fromarray(rng.integers(0, 5, (48, 64), np.uint8)).save(root / "labels" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # export PYTHONPATH=.
    return root


def commands() -> dict[str, list[str]]:
    lines = block("bash", "dataset=ponds").splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines if line.startswith("segdcn-")}


def test_example_is_checked_and_trained(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, *commands()["segdcn-data"], "workers=0") == 0
    assert "6 images, 0 problem(s)" in capsys.readouterr().out
    settings = ["model=tiny", *(setting for setting in BARE if not setting.startswith("dataset."))]
    settings += ["datamodule.batch_size=2", "datamodule.num_workers=0", "datamodule.eval_batch_size=1"]
    assert call(train.main, *commands()["segdcn-train"], *settings, "trainer.max_epochs=1") == 0
    assert "4 train, 2 val images, 3 classes" in capsys.readouterr().out


def test_example_maps_its_labels(root: Path) -> None:
    from ponds import Ponds  # type: ignore[import-not-found]

    sample = Ponds(str(root)).split("val")[0]
    with Image.open(root / "labels" / "e.png") as image:
        stored = np.asarray(image)
    np.testing.assert_array_equal(sample.label, np.array([255, 0, 1, 1, 2])[stored])
