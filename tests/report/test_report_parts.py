"""What a page says, before it is a page: choices, figures in words, JSON, charts, what a run folder holds."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FirstRun
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segdcn.drawing import numbers
from segdcn.evaluation.counts import Counts
from segdcn.models import Deform, build_deeplab
from segdcn.models.internimage import InternImage, Variant
from segdcn.report import comparison, curves, images, pictures, tables
from segdcn.report.charts import Series, line_chart
from segdcn.report.page import PARTS, Page, json_for_script
from segdcn.report.runs import PageRun, page_run, read_finished, unique_names
from segdcn.report.viewer import fields_per_image, pixel_grid, view
from segdcn.runs.figures import write_counts
from segdcn.runs.record import STATES, read_run

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028'\""


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=12))
def test_best_median_and_worst_by_a_slow_search(miou: list[float]) -> None:
    found = images.best_median_worst(miou)
    known = [index for index, value in enumerate(miou) if value == value]
    assert len(found) == min(3, len(known)) == len(set(found.values()))
    if known:
        assert all(miou[index] <= miou[found["best"]] for index in known)
    if "worst" in found:
        assert all(miou[index] >= miou[found["worst"]] for index in known)
    if "median" in found:
        middle = miou[found["median"]]
        assert sum(miou[index] < middle for index in known) <= (len(known) - 1) // 2
        assert sum(miou[index] > middle for index in known) <= len(known) // 2


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=10), st.integers(0, 4))
def test_images_that_differ_most(pairs: list[tuple[float, float]], count: int) -> None:
    found = images.most_different([a for a, _ in pairs], [b for _, b in pairs], count)
    assert len(set(found)) == len(found) == min(count, len(pairs))
    differences = [abs(a - b) for a, b in pairs]
    assert [differences[index] for index in found] == sorted(differences, reverse=True)[:count]


def test_an_image_without_a_figure_in_one_run_is_not_compared() -> None:
    assert images.most_different([0.1, math.nan, 0.5], [0.2, 0.9, 0.5], 3) == [0, 2]


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 50))
def test_grid_of_pixels_lies_within_the_image(height: int, width: int, count: int) -> None:
    pixels = pixel_grid((height, width), count)
    assert 1 <= len(pixels) <= count
    assert len(set(pixels)) == len(pixels)
    assert all(0 <= row < height and 0 <= column < width for row, column in pixels)


def test_receptive_fields_are_left_out_where_they_cost_too_much() -> None:
    network = build_deeplab(3, "resnet_tiny", "paper", weights=None, deform=Deform(0)).eval()
    assert fields_per_image(network, (96, 96), maps=2, budget=1e15) == 49
    few = fields_per_image(network, (96, 96), maps=2, budget=2e10)
    assert 6 <= few < 49
    assert fields_per_image(network, (96, 96), maps=4, budget=2e10) == few // 2
    assert fields_per_image(network, (2048, 1024), maps=2, budget=2e10) == 0

    class Undecided(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image if image.sum() > 0 else -image

    assert fields_per_image(Undecided(), (8, 8), maps=1, budget=1e15) == 0


def test_field_atlas_holds_each_field_at_its_place() -> None:
    fields = np.zeros((3, 20, 40), np.float32)
    fields[0, 5, 10], fields[1, 15, 30] = 2.0, 0.001  # each is scaled by its own maximum; the third is empty
    atlas = pictures.field_atlas(fields)
    assert atlas["columns"] == 2
    assert atlas["tile"] == [20, 40]
    shown = _decoded(atlas["url"])
    assert shown.shape == (40, 80)
    assert shown[5, 10] == 255
    assert shown[15, 40 + 30] == 255
    assert not shown[20:, :].any()
    assert shown[5, 12] < 128
    assert shown[5, 20] == 0


def test_label_pictures_have_the_palettes_colours() -> None:
    label = np.array([[0, 1], [2, 255]], np.uint8)
    palette = [(1, 2, 3), (250, 0, 7), (9, 9, 9)]
    shown = _decoded(pictures.labels(label, palette), "RGB")
    assert [tuple(shown[place]) for place in ((0, 0), (0, 1), (1, 0))] == palette
    assert tuple(shown[1, 1]) not in palette
    wrong = _decoded(pictures.error_map(np.array([[0, 2], [2, 0]], np.uint8), label), "RGB")
    assert [tuple(wrong[place]) for place in ((0, 0), (0, 1), (1, 1))] == [
        pictures.RIGHT,
        pictures.WRONG,
        pictures.IGNORED,
    ]


def _decoded(url: str, mode: str = "L") -> np.ndarray:
    import base64
    import io

    from PIL import Image

    content = base64.b64decode(url.partition(";base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


@given(st.recursive(st.text() | st.just(HOSTILE) | st.integers(), lambda one: st.lists(one, max_size=3), max_leaves=6))
def test_json_within_a_script_is_the_same_json_and_no_markup(values: object) -> None:
    text = str(json_for_script(values))
    assert json.loads(text) == values
    assert not re.search("[<>&\u2028\u2029]", text)


def test_hostile_texts_are_escaped_wherever_a_page_shows_them() -> None:
    chart = line_chart(HOSTILE, [Series(HOSTILE, [1, 2], [1, 2], 0)])
    row = tables.ClassRow(HOSTILE, (1, 2, 3), 0.5, 0.4, 0.6, 0.1)
    page = Page(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        [HOSTILE],
        {
            "charts": [chart],
            "classes": {"figure": HOSTILE, "rows": [row], "intervals": True},
            "confusion": tables.Confusion([HOSTILE], [[1.0]], [HOSTILE]),
            "comparison": {"lead": HOSTILE, "head": [HOSTILE], "rows": [[HOSTILE, HOSTILE]], "notes": [HOSTILE]},
            "provenance": [(HOSTILE, [(HOSTILE, HOSTILE)])],
        },
    ).html()
    assert "<img" not in page
    assert page.count("</script>") == 1
    assert page.count("&lt;img") > 12


def test_a_page_of_nothing_but_a_title_renders() -> None:
    page = Page("t", "k").html()
    assert "<h1>t</h1>" in page
    assert not any(f'id="{section[0]}"' in page for section in PARTS.values() if section)


def test_a_part_that_fails_is_a_note() -> None:
    page = Page("t", "k")
    page.add(epoch_tables=lambda: 1 / 0, confusion=lambda: None)
    assert page.notes == ["Without epoch tables: division by zero."]
    assert "Without epoch tables: division by zero." in page.html()


@pytest.mark.parametrize("values", [[0.5], [math.nan, 0.5], [0.1, 0.2, math.nan, 0.4]])
def test_charts_are_svg_that_names_itself_and_takes_the_pages_colours(values: list[float]) -> None:
    series = [Series("val", range(len(values)), values, 1), Series("nothing", [0], [math.nan], 2)]
    chart = line_chart("Loss <of> a run", series)
    assert chart is not None
    assert [one.label for one in chart.series] == ["val"]
    root = ElementTree.fromstring(str(chart.svg))
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert root.findtext(f"{space}title") == "Loss <of> a run"
    assert f"{values[-1]:.4g}" in str(root.findtext(f"{space}desc"))
    assert "var(--s1)" in chart.svg
    assert not re.search("#fe00|DejaVu|http://(?!www.w3.org)", chart.svg)
    assert "epoch" in [text.text for text in root.iter(f"{space}text")]


def test_the_viewer_shows_where_an_aggregation_samples_and_its_grid() -> None:
    torch.manual_seed(0)
    network = InternImage(Variant(16, (1, 1, 1, 3), (1, 2, 4, 8), 0.0), 32)
    for name, parameter in network.named_parameters():
        if "offset" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    network.eval()
    image = torch.randn(1, 3, 64, 64)
    learned, regular = (view(network, image, 0, (0, 0), regular)["layers"] for regular in (False, True))
    assert [layer["name"] for layer in learned] == [f"levels.3.blocks.{block}.dcn" for block in (2, 1, 0)]
    assert all(layer["taps"] for layer in learned)
    assert not any(layer["taps"] for layer in regular)
    assert [layer["input"] for layer in learned] == [layer["input"] for layer in regular]


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", [Series("a", [1, 2], [math.nan, math.nan], 0)]) is None
    assert curves.run_charts({}, "val") == []
    assert curves.epoch_table({}, "val") == []


def test_curves_of_a_run_are_its_columns() -> None:
    epochs = {
        "epoch": [0.0, 1.0],
        "train/loss": [2.0, 1.0],
        "val/loss": [math.nan, 1.5],
        "val/miou": [math.nan, 0.25],
        "lr/head": [0.1, 0.05],
        "lr/head_no_decay": [0.1, 0.05],
        "offset/backbone.a/mean": [0.0, 0.5],
        "offset/backbone.a/p95": [0.0, 1.5],
    }
    drawn = {
        one.label: (list(one.x), list(one.y)) for chart in curves.run_charts(epochs, "val") for one in chart.series
    }
    assert drawn["training"] == ([1, 2], [2.0, 1.0])
    assert drawn["Mean IoU"][1][1] == 25
    assert drawn["head"][1] == [0.1, 0.05]
    assert "head_no_decay" not in drawn
    assert drawn["a, 95 %"][1] == [0.0, 1.5]
    (table,) = curves.epoch_table(epochs, "val")
    assert table["head"][:4] == ["epoch", "train/loss", "val/loss", "val/miou, %"]
    assert [row[:4] for row in table["rows"]] == [["1", "2.0000", "–", "–"], ["2", "1.0000", "1.5000", "25.00"]]


def test_figures_in_words() -> None:
    assert [numbers.large(number) for number in (None, 7, 544124, 2530475, 179933184, 9.99e11)] == [
        "–",
        "7",
        "544 k",
        "2.53 M",
        "180 M",
        "999 G",
    ]
    assert [numbers.duration(s) for s in (None, 72, 147, 8000)] == ["–", "72 s", "2.5 min", "2.2 h"]
    assert [numbers.clock(s) for s in (72, 147, 8000)] == ["1:12", "2:27", "2:13:20"]
    assert [numbers.three_digits(v) for v in (0, 0.08, 4.256, 306.4, 1234)] == ["0", "0.0800", "4.26", "306", "1234"]
    assert [numbers.metric_value(0.5, metric) for metric in ("val/miou", "val/loss")] == ["50.00", "0.5000"]
    assert [numbers.percent(v) for v in (None, math.nan, 0.70636)] == ["–", "–", "70.64"]
    assert [numbers.signed(v) for v in (0.05, -0.05, None)] == ["+5.00", "−5.00", "–"]


def test_confusions_by_hand() -> None:
    confusion = torch.tensor([[90, 10, 0], [30, 70, 0], [0, 0, 0]])
    counts = Counts(["i"], ["sky", "tree", "moon"], torch.zeros(1, 3, 3, dtype=torch.int64), confusion)
    found = tables.confusion(counts)
    assert found.rows[0] == [0.9, 0.1, 0.0]
    assert found.rows[2] is None
    assert found.words == [
        "30.0 % of the pixels of tree are taken for sky",
        "10.0 % of the pixels of sky are taken for tree",
    ]


def test_dilations_are_the_papers_table() -> None:
    sizes = {size: {"mean": None, "std": None, "cells": 0} for size in tables.SIZES}
    sizes |= {"small": {"mean": 2.0, "std": 0.5, "cells": 3}}
    layer = {"name": "backbone.l1", "dilation": [2, 2], "outside": 0.125, "effective_dilation": sizes}
    study = {"objects": {"thresholds": [96.0, 224.0]}, "layers": [layer, {**layer, "name": "l2", "dilation": [1, 2]}]}
    found = tables.dilations(study, "run", "Measured on 3 images", None)
    assert [row[:2] for row in found.rows] == [("l2", "1×2"), ("l1", "2")]
    assert found.rows[1][2:] == (["2.00 ± 0.50", "–", "–", "–"], "12.50")
    assert "96²" in found.text
    assert "No objects." in tables.dilations({**study, "objects": {"thresholds": []}}, "r", "m", None).text


@pytest.fixture
def run(first_run: FirstRun, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(first_run.folder, folder, ignore=shutil.ignore_patterns("tensorboard", "panels", "report.html"))
    return folder


def read(folder: Path) -> PageRun:
    return page_run(read_finished(folder))


def test_a_run_is_read_with_its_counts(run: Path) -> None:
    shown = read(run)
    assert shown.counts is not None
    assert shown.lacking == ""
    assert shown.counts.class_names == list(shown.record.iou)
    classes = tables.classes(shown, {})
    assert classes is not None
    rows = classes["rows"]
    figures = json.loads((run / "metrics.json").read_text())
    for row in rows:
        assert row.figure == figures[f"val/iou/{row.name}"]
        if row.figure is not None:
            assert row.low is not None
            assert row.high is not None
            assert row.low <= row.figure + 1e-9
            assert row.figure <= row.high + 1e-9
    known = [row.figure for row in rows if row.figure is not None]
    assert known == sorted(known, reverse=True)
    assert "paper" not in " ".join(tile.label for tile in tables.tiles(shown.record))


def test_a_run_without_counts_says_what_to_evaluate_and_finds_it_then(run: Path) -> None:
    (run / "counts.npz").rename(run / "elsewhere.npz")
    assert f"segdcn-evaluate checkpoint={run}/checkpoints/best.ckpt" in read(run).lacking
    later = run / "evaluation" / "best_val"
    later.mkdir(parents=True)
    shutil.copy(run / "elsewhere.npz", later / "counts.npz")
    assert read(run).counts is None  # of which checkpoint is not told
    figures = json.loads((run / "metrics.json").read_text())
    same = {**figures, "checkpoint_sha256": read_run(run).checkpoint_hash}
    (later / "metrics.json").write_text(json.dumps(same))
    assert read(run).counts is not None
    for change in ({"checkpoint_sha256": "another"}, {"protocol": "another"}):
        (later / "metrics.json").write_text(json.dumps(same | change))
        assert read(run).counts is None


def test_what_a_run_lacks_is_a_note_or_one_line(run: Path, tmp_path: Path) -> None:
    (run / "counts.npz").write_bytes((run / "counts.npz").read_bytes()[:200])
    (run / "metrics.csv").write_text("epoch,val/miou\n0,\n1,not a number\n")
    (run / "environment.json").unlink()
    shown = read(run)
    assert shown.counts is None
    assert "damaged" in shown.lacking
    assert [math.isnan(value) for value in shown.record.epochs["val/miou"]] == [True, True]
    assert "Device" not in dict(tables.provenance(shown.record))
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        read(tmp_path / "nowhere")
    (run / "metrics.json").unlink()
    with pytest.raises(ValueError, match="has not finished"):
        read(run)


def test_a_run_is_in_the_state_that_its_folder_tells(run: Path, tmp_path: Path) -> None:
    assert (read_run(run).state, read_run(run).error) == ("finished", None)
    assert (read_run(tmp_path / "nowhere").state, read_run(tmp_path / "nowhere").error) == ("missing", "never started")
    (run / "metrics.json").unlink()
    for state in STATES[1:-1]:
        (run / "job.json").write_text(json.dumps({"state": state, "attempts": 2, "error": "why"}))
        assert (read_run(run).state, read_run(run).error) == (state, f"{state} in attempt 2: why")


def test_runs_are_told_apart_by_what_differs(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub("layers: 3", "layers: 0", config).replace("seed: 0\n", "seed: 7\n", 1))
    first, second = read_run(run), read_run(other)
    assert unique_names([first, second]) == [
        "shapes, seed=0, deform.layers=3",
        "shapes, seed=7, deform.layers=0",
    ]
    assert len(set(unique_names([first, first]))) == 2


def test_the_interval_of_a_difference_needs_the_same_images(run: Path, tmp_path: Path) -> None:
    first = read(run)
    assert comparison.paired_interval(first, first) == "+0.00 to +0.00"
    other = tmp_path / "other"
    shutil.copytree(run, other)
    counts = first.counts
    assert counts is not None
    write_counts(
        other / "counts.npz", Counts(["x", *counts.names[1:]], counts.class_names, counts.images, counts.confusion)
    )
    assert comparison.paired_interval(read(other), first) == comparison.NOT_PAIRED
