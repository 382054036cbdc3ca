"""Weights for a loss, counted in masks, by the rules' own words and with the real command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from running import BARE, call, one_line

from segdcn.commands.train import main
from segdcn.data import ImageFolder, class_weights
from segdcn.data.dataset import DataError, Sample
from segdcn.data.frequencies import RULES, Rule

NAMES = ("a", "b", "c", "d")


class Labels:
    """A data set of labels alone, which notes what is asked for."""

    class_names, palette = NAMES, [(0, 0, 0)] * 4

    def __init__(self, labels: list[NDArray[np.uint8]]) -> None:
        self.labels = labels
        self.asked: list[int] = []

    def split(self, split: str) -> Labels:
        assert split == "train"
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        label = self.labels[index]
        return Sample(np.zeros((*label.shape, 3), np.uint8), label, str(index))


def expected(labels: list[NDArray[np.uint8]], rule: str) -> list[float]:
    """Pixel by pixel, in plain Python, as the rules say it."""
    values = {}
    for number in range(len(NAMES)):
        showing = [label for label in labels if number in label.ravel().tolist()]
        own = sum(label.ravel().tolist().count(number) for label in labels)
        of = showing if rule == "median_frequency" else labels
        if own:
            values[number] = own / sum(1 for label in of for value in label.ravel().tolist() if value != 255)
    if rule == "median_frequency":
        weights = {number: float(np.median([*values.values()])) / value for number, value in values.items()}
    else:
        inverse = {number: 1 / value**0.5 for number, value in values.items()}
        weights = {number: value / (sum(inverse.values()) / len(inverse)) for number, value in inverse.items()}
    return [weights.get(number, max(weights.values())) for number in range(len(NAMES))]


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 10_000), images=st.integers(1, 5))
def test_weights_by_the_definition(rule: Rule, seed: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    labels = []
    for _ in range(images):
        shown = [*rng.choice(4, rng.integers(1, 4), replace=False), 255]
        labels.append(rng.choice(shown, (rng.integers(1, 6), rng.integers(2, 6))).astype(np.uint8))
    labels[0][0, 0] = rng.integers(4)
    assert class_weights(Labels(labels), rule) == pytest.approx(expected(labels, rule), rel=1e-12)


def test_a_class_without_a_pixel_weighs_as_much_as_the_rarest() -> None:
    label = np.array([[0] * 90 + [1] * 9 + [2]], np.uint8)
    weights = class_weights(Labels([label]), "median_frequency")
    assert weights == pytest.approx([0.1, 1.0, 9.0, 9.0])


def test_of_many_masks_some_are_read_at_equal_distances() -> None:
    dataset = Labels([np.full((1, 1), number % 4, np.uint8) for number in range(3000)])
    class_weights(dataset, "median_frequency")
    assert dataset.asked == list(range(0, 3000, 3))
    dataset.asked = []
    class_weights(dataset, "median_frequency", masks=None)
    assert dataset.asked == list(range(3000))


def test_labels_that_are_all_ignored_and_other_rules_are_one_line() -> None:
    with pytest.raises(DataError, match=r"^median_frequency needs labelled pixels, and the train split has none$"):
        class_weights(Labels([np.full((3, 3), 255, np.uint8)]), "median_frequency")
    with pytest.raises(ValueError, match=r"^a rule for class weights is median_frequency or inverse_sqrt_frequency,"):
        class_weights(Labels([np.zeros((3, 3), np.uint8)]), "median")  # type: ignore[arg-type]


def make_folder(root: Path) -> Path:
    """Three train images; class 1 is rare."""
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            mask = np.zeros((64, 64), np.uint8)
            mask[: number + 1, :32] = 1
            mask[60:] = 255
            for part, array in (("images", np.full((64, 64, 3), 99, np.uint8)), ("masks", mask)):
                (root / split / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / split / part / f"{number}.png")
    return root


def test_a_run_keeps_the_numbers_and_says_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = make_folder(tmp_path / "data"), tmp_path / "run"
    settings = [setting for setting in BARE if not setting.startswith(("dataset.", "datamodule."))]
    data = ("dataset=folder", f"dataset.root={root}", "datamodule.batch_size=2", "datamodule.num_workers=0")
    rule = "loss.class_weights=inverse_sqrt_frequency"
    assert call(main, *settings, *data, "trainer.max_steps=2", rule, f"output_dir={run}") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights ")]
    weights = class_weights(ImageFolder(root, ["a", "b"]), "inverse_sqrt_frequency")
    assert line == f"weights  inverse_sqrt_frequency: {weights[0]:.4g} (class_0) to {weights[1]:.4g} (class_1)"
    kept = OmegaConf.load(run / "config.yaml").loss.class_weights
    assert kept == pytest.approx(weights, rel=1e-3)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["segdcn"]
    assert checkpoint["groups"]["loss"]["class_weights"] == kept

    # whoever goes on keeps them, whatever the masks are by then
    Image.fromarray(np.ones((64, 64), np.uint8)).save(root / "train" / "masks" / "0.png")
    assert call(main, f"resume={run}", "trainer.max_steps=3") == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights ")]
    assert OmegaConf.load(run / "config.yaml").loss.class_weights == kept


def test_a_rule_that_there_is_not_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, *BARE, "loss.class_weights=median", f"output_dir={tmp_path / 'run'}") == 1
    line = one_line(capsys.readouterr().err)
    assert "class_weights must be one number a class, median_frequency, inverse_sqrt_frequency or null" in line
