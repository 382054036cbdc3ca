"""The study of offsets against a slow loop over cells, and where there is little to study."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from segdcn.analysis import effective_dilation, record
from segdcn.analysis.offset_study import study_offsets
from segdcn.analysis.tables import class_rows, cost_rows, dilation_csv, dilation_rows, length_rows, markdown
from segdcn.data import Sample
from segdcn.data.dataset import voc_palette
from segdcn.data.transforms import EvalTransform
from segdcn.inference.predictor import Predictor
from segdcn.models import Deform, build_deeplab, deformable_layers, plain_twin

NAMES = ("background", "disc", "ring")


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    one = build_deeplab(3, "resnet_tiny", "paper", 8, weights=None, deform=Deform(3, **options), head_channels=8).eval()
    for layer in deformable_layers(one).values():
        nn.init.normal_(layer.offset.weight, std=0.1)
    return one


def sample(size: tuple[int, int], *squares: tuple[int, int, int, int], seed: int = 0) -> Sample:
    """Squares of (class, top, left, side)."""
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    label = np.zeros(size, np.uint8)
    for k, top, left, side in squares:
        label[top : top + side, left : left + side] = k
    return Sample(image, label, f"image{seed}")


def study_of(network: nn.Module, samples: Iterable[Sample], *arguments: Any, **options: Any) -> dict[str, Any]:
    return study_offsets(Predictor(network, NAMES, voc_palette(3), EvalTransform()), samples, *arguments, **options)


SAMPLES = [
    sample((64, 80), (1, 4, 4, 12), (2, 20, 30, 30), (255, 0, 60, 20)),
    sample((50, 91), (1, 2, 2, 44), (2, 30, 50, 20), (2, 0, 60, 3), seed=1),
    sample((40, 40), seed=2),
]


@pytest.mark.parametrize("options", [{}, {"modulated": True, "offset_groups": 2}])
def test_figures_are_those_of_a_slow_loop(options: dict[str, Any]) -> None:
    one, transform = network(**options), EvalTransform()
    study = study_of(one, iter(SAMPLES), ["disc", "ring"], (16, 35))
    assert json.loads(json.dumps(study)) == study
    assert study["images"] == 3
    # the speck of 3 pixels is no object
    assert study["objects"]["counts"] == {"small": 1, "medium": 2, "large": 1}

    boxes = {
        "image0": [("small", 4, 4, 12), ("medium", 20, 30, 30)],
        "image1": [("medium", 30, 50, 20), ("large", 2, 2, 44)],
        "image2": [],
    }
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lengths, outside = defaultdict(list), defaultdict(list)
    for one_sample in SAMPLES:
        height, width = one_sample.label.shape
        for call in record(one, transform.image(one_sample.image)[None]):
            dilation = effective_dilation(call)[0]
            groups, rows, columns = dilation.shape
            lengths[call.name] += call.offset_lengths().flatten().tolist()
            for y, x in call.taps.movedim(3, -1).reshape(-1, 2).tolist():
                there = -1 < y < call.input_size[0] and -1 < x < call.input_size[1]
                outside[call.name].append(not there)
            for g, i, j in np.ndindex(groups, rows, columns):
                y, x = round((i + 0.5) * height / rows - 0.5), round((j + 0.5) * width / columns - 0.5)
                mine = [size for size, t, l, s in boxes[one_sample.name] if t <= y < t + s and l <= x < l + s]  # noqa: E741
                label = int(one_sample.label[y, x])
                value = float(dilation[g, i, j])
                found = values[call.name]
                found["all"].append(value)
                if mine:
                    found[mine[0]].append(value)  # listed from the smallest
                elif label == 0:
                    found["background"].append(value)
                if label != 255:
                    found[NAMES[label] + " class"].append(value)
    assert [layer["name"] for layer in study["layers"]] == list(values)
    for layer in study["layers"]:
        found = values[layer["name"]]
        reported = layer["effective_dilation"] | {f"{name} class": v for name, v in layer["by_class"].items()}
        assert set(found) == set(reported)
        for key, of in found.items():
            expected = {"mean": np.mean(of), "std": np.std(of), "cells": len(of)}
            assert reported[key] == pytest.approx(expected, rel=1e-5, abs=1e-6), key
        length = np.array(lengths[layer["name"]])
        assert layer["length"]["mean"] == pytest.approx(length.mean(), rel=1e-6)
        assert layer["length"]["max"] == length.max()
        assert layer["length"]["p95"] == pytest.approx(np.quantile(length, 0.95), abs=0.011)
        assert layer["outside"] == pytest.approx(np.mean(outside[layer["name"]]))
        assert (layer["dilation"], layer["map_pixel"]) == ([1, 1], 8)
        edges, counts = layer["histogram"]["edges"], layer["histogram"]["counts"]
        assert sum(counts) + layer["histogram"]["beyond"] == len(length)
        for low, high, count in list(zip(edges, edges[1:], counts, strict=False))[::7]:
            assert abs(((length >= low) & (length < high)).sum() - count) <= 2  # float32 at the edges of bins


def test_without_offsets_all_is_the_dilation_and_nothing_varies() -> None:
    one = build_deeplab(3, "resnet18", "paper", 16, weights=None, deform=Deform(2), head_channels=8).eval()
    for tried in (one, plain_twin(one)):
        study = study_of(tried, SAMPLES, ["disc", "ring"])
        for layer in study["layers"]:
            assert layer["dilation"] == [2, 2]
            assert layer["length"] == {"mean": 0, "p95": 0, "max": 0}
            for figures in layer["effective_dilation"].values():
                assert figures["cells"] == 0 or (figures["mean"], figures["std"]) == (2, 0)
            assert layer["histogram"]["counts"][0] == 9 * layer["effective_dilation"]["all"]["cells"]
        assert [layer["deformable"] for layer in study["layers"]] == ([True] * 2 if tried is one else [False] * 3)


def test_thirds_part_the_objects_into_equal_groups() -> None:
    squares = [sample((96, 96), (1, 1, 1, side), seed=side) for side in range(10, 40, 2)]
    study = study_of(network(), squares, ["disc"])
    assert study["objects"]["counts"] == {"small": 5, "medium": 5, "large": 5}
    assert study["objects"]["thresholds"] == [20, 28]
    assert "thirds" in study["objects"]["rule"]


def test_instances_take_the_place_of_pieces() -> None:
    label = sample((40, 40), (1, 0, 0, 40))
    halves = np.ones((40, 40), np.int32)
    halves[:, 20:] = 2
    study = study_of(network(), [label], ["disc"], (30, 39), instances=[halves])
    assert study["objects"]["counts"] == {"small": 2, "medium": 0, "large": 0}
    crowd = study_of(network(), [label], ["disc"], instances=[0 * halves])
    for layer in crowd["layers"]:  # an object that nobody told apart is not the background
        assert layer["effective_dilation"]["background"]["cells"] == 0
        assert layer["effective_dilation"]["all"]["cells"] == 25


def test_images_without_objects_have_a_background() -> None:
    study = study_of(network(), SAMPLES[2:], ["disc"])
    assert study["objects"]["thresholds"] == []
    assert set(study["objects"]["counts"].values()) == {0}
    layer = study["layers"][0]
    assert layer["effective_dilation"]["small"] == {"mean": None, "std": None, "cells": 0}
    assert layer["effective_dilation"]["background"] == layer["effective_dilation"]["all"]
    assert dilation_rows(study)[1][2:5] == ["-", "-", "-"]
    assert class_rows(study)[2] == ["disc", "-", "-", "-"]
    assert ",,,0," in dilation_csv(study)


def test_wrong_use_is_refused() -> None:
    def study(*sizes: float, samples: list[Sample] = SAMPLES, objects: tuple[str, ...] = ("disc",)) -> Any:
        return study_of(network(), samples, objects, sizes or None)

    with pytest.raises(ValueError, match="no class 'car', only background, disc, ring"):
        study(objects=("disc", "car"))
    for sizes in ((96,), (224, 96), (0, 96)):
        with pytest.raises(ValueError, match="object_sizes must be two sides"):
            study(*sizes)
    with pytest.raises(ValueError, match="no image"):
        study(samples=[])
    broken = network()
    next(iter(deformable_layers(broken).values())).offset.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"offsets of layer backbone\.layer3\.0\.conv2 are not finite"):
        study_of(broken, SAMPLES, ["disc"])


def test_tables_have_the_last_layer_first() -> None:
    study = study_of(network(), SAMPLES, ["disc", "ring"], (16, 35))
    rows = dilation_rows(study)
    assert rows[0] == ["layer", "dilation", "small", "medium", "large", "background"]
    assert [row[0] for row in rows[1:]] == ["layer4.0.conv2", "layer4.0.conv1", "layer3.0.conv2"]
    large = study["layers"][-1]["effective_dilation"]["large"]
    assert rows[1][4] == f"{large['mean']:.2f} ± {large['std']:.2f}"
    text = markdown(rows).splitlines()
    assert text[1] == "| --- | --- | --- | --- | --- | --- |"
    assert text[2] == f"| {' | '.join(rows[1])} |"
    assert [row[0] for row in length_rows(study)[1:]] == [row[0] for row in rows[1:]]
    assert [row[0] for row in class_rows(study)[1:]] == list(NAMES)
    figures = {"parameters": 1_500_000, "flops": None, "milliseconds": 3.0, "megabytes": None}
    assert cost_rows({"plain": figures})[1:] == [["plain", "1.500", "-", "3.0", "-"]]
