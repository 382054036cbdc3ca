"""A detector trains, resumes, evaluates, predicts, sweeps and reports by the commands of segmentation."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import assert_same_run, call, clean_environment, compose, one_line

from segdcn.commands import analyze, evaluate, export, predict, report, train
from segdcn.commands import sweep as sweep_command
from segdcn.commands.multirun import Multirun
from segdcn.detection import Boxes, DetectionDataModule, DetectionTask, build_detector
from segdcn.detection.average_precision import class_intervals, paired_difference, voc_figures
from segdcn.detection.datamodule import as_item
from segdcn.detection.found import Found, read_found, write_found
from segdcn.detection.samples import Detections
from segdcn.drawing.numbers import percent
from segdcn.models import Deform
from segdcn.report import comparison
from segdcn.runs.checkpoint import read_checkpoint

RUN = (
    "experiment=boxes",
    "dataset.train_images=16",
    "dataset.val_images=6",
    "dataset.test_images=5",
    "datamodule.batch_size=4",
    "datamodule.eval_batch_size=4",
    "model.hidden=16",
    "model.channels=16",
    "model.proposals=20",
    "model.deform.layers=1",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "logger=none",
    "name=test",
)
SMALL = (*RUN, "callbacks.panels=null", "report=false")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a run leaves."""
    folder = tmp_path_factory.mktemp("detector") / "run"
    assert 0 <= train.train(compose("train", *RUN, f"output_dir={folder}")) <= 1
    return folder


def test_a_run_leaves_its_figures_pictures_and_page(whole: Path) -> None:
    metrics = json.loads((whole / "metrics.json").read_text())
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    best = max(float(row["val/map70"]) for row in rows)
    assert float(f"{metrics['val/map70']:.6g}") == best
    assert (metrics["protocol"], metrics["images"]) == ("voc", 6)
    assert all(float(row["offset/backbone.body.layer4.0.conv2/mean"]) >= 0 for row in rows)
    assert len(read_found(whole / "found.npz").names) == 6
    for path in [*(whole / "panels").iterdir()]:
        assert np.asarray(Image.open(path)).std() > 1
    assert {path.name for path in (whole / "panels").iterdir()} >= {"val_0.png", "val_0_bins.png"}
    page = (whole / "report.html").read_text()
    for part in ("mAP@0.7, %", "Best, median and worst images", "AP@0.7 per class", "pooling deformable"):
        assert part in page
    assert 'data-layer="bins"' in page


def test_an_evaluation_counts_what_the_training_did(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((whole / "metrics.json").read_text())
    checkpoint = f"checkpoint={whole / 'checkpoints' / 'best.ckpt'}"
    assert call(evaluate.main, checkpoint, "callbacks.panels=null", "trainer.accelerator=cpu") == 0
    after = json.loads((whole / "evaluation" / "best_val" / "metrics.json").read_text())
    figures = {key for key in before if key.startswith("val/")}
    assert {key: after[key] for key in figures} == {key: before[key] for key in figures}
    assert "map70" in capsys.readouterr().out
    settings = ("split=test", "protocol=coco", "callbacks.panels=null", "trainer.accelerator=cpu")
    assert call(evaluate.main, checkpoint, *settings) == 0
    tested = json.loads((whole / "evaluation" / "best_test_coco" / "metrics.json").read_text())
    assert 0 <= tested["test/map_50"] <= 1
    assert tested["images"] == 5


def test_a_photograph_gets_boxes_and_rows(whole: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "photos", tmp_path / "found"
    source.mkdir()
    sample = Boxes(val_images=1).split("val")[0]
    Image.fromarray(sample.image).save(source / "a.png")
    Image.fromarray(sample.image[:100, :90]).save(source / "b.png")
    checkpoint = f"checkpoint={whole / 'checkpoints' / 'best.ckpt'}"
    arguments = (checkpoint, f"input={source}", f"output={output}", "score=0.05", "device=cpu")
    assert call(predict.main, *arguments) == 0
    rows = list(csv.DictReader((output / "boxes.csv").open()))
    assert {row["file"] for row in rows} <= {"a.png", "b.png"}
    assert {row["class"] for row in rows} <= set(Boxes.class_names)
    for row in rows:
        width, height = (128, 128) if row["file"] == "a.png" else (90, 100)
        assert 0 <= float(row["x1"]) <= float(row["x2"]) <= width
        assert 0 <= float(row["y1"]) <= float(row["y2"]) <= height
        assert float(row["score"]) >= 0.05
    assert Image.open(output / "a_overlay.png").size == (128, 128)
    assert call(predict.main, *arguments[:3], "areas=true", "device=cpu") == 1


def test_boxes_of_cocos_images_are_what_its_server_takes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of results has, by pycocotools alone, the figures of an evaluation."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    checkpoint = f"checkpoint={whole / 'checkpoints' / 'best.ckpt'}"
    settings = ("protocol=coco", "callbacks.panels=null", "trainer.accelerator=cpu", "datamodule.eval_batch_size=1")
    assert call(evaluate.main, checkpoint, *settings, f"output_dir={tmp_path / 'evaluated'}") == 0
    expected = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())

    source, truth = tmp_path / "images", tmp_path / "truth.json"
    source.mkdir()
    category = {name: 90 - 7 * number for number, name in enumerate(Boxes.class_names)}
    content: dict[str, Any] = {"images": [], "annotations": [], "info": {}}
    content["categories"] = [{"id": number, "name": name} for name, number in category.items()]
    for image, sample in enumerate(Boxes(val_images=6).split("val"), start=139):
        Image.fromarray(sample.image).save(source / f"{image:012}.png")
        content["images"].append({"id": image, "file_name": f"{image:012}.png"})
        for (x1, y1, x2, y2), label, _, area in zip(*(part.tolist() for part in sample.objects), strict=True):
            about = {"id": len(content["annotations"]) + 1, "image_id": image, "area": area, "iscrowd": 0}
            about |= {"category_id": category[Boxes.class_names[label - 1]], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            content["annotations"].append(about)
    truth.write_text(json.dumps(content))
    (tmp_path / "ids.json").write_text(json.dumps(content | {"annotations": None}))  # which are not needed
    Image.fromarray(sample.image).save(source / "other.png")
    output = tmp_path / "found"
    capsys.readouterr()
    arguments = (checkpoint, f"input={source}", f"output={output}", f"annotations={tmp_path / 'ids.json'}")
    assert call(predict.main, *arguments, "overlay=false", "device=cpu") == 1
    assert "calls none other.png" in one_line(capsys.readouterr().err)
    ground = coco.COCO(str(truth))
    found = cocoeval.COCOeval(ground, ground.loadRes(str(output / "boxes.json")), "bbox")
    found.evaluate()
    found.accumulate()
    found.summarize()
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    names += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
    for name, value in zip(names, found.stats.tolist(), strict=True):
        assert expected[f"val/{name}"] == (None if value < 0 else pytest.approx(value, rel=1e-9)), name
    assert expected["val/mar_100"] > 0


def test_several_runs_are_compared_by_what_was_found(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, other = read_found(whole / "found.npz"), tmp_path / "other"
    shutil.copytree(whole, other)
    better = [Detections(one.boxes, np.ones(len(one.labels), np.float32), one.labels) for one in first.objects]
    better[0] = first.detections[0]
    second = Found(first.names, first.class_names, better, first.objects)
    write_found(other / "found.npz", second)
    figures = {f"val/{name}": value for name, value in voc_figures(second, "voc").items()}
    metrics = json.dumps(json.loads((whole / "metrics.json").read_text()) | figures)
    (other / "metrics.json").write_text(metrics)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("name: test", "name: <b>other</b>"))
    assert call(report.main, str(whole), str(other)) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<b>other" not in page
    for threshold in (0.5, 0.7):
        mean, classes = paired_difference(second, first, "voc", threshold)
        assert mean[0] > 0.3
        assert comparison.ends(*mean) in page
    for one, (low, high) in zip(classes, class_intervals(second, "voc", 0.7), strict=True):
        assert f"{percent(low, 1)} – {percent(high, 1)}, difference {comparison.ends(*one)}" in page
    for part in ("mAP@0.5 on val, %", "Where they disagree most", "AP@0.7 in percent", 'data-layer="found1"'):
        assert part in page
    write_found(other / "found.npz", Found(first.names[::-1], first.class_names, better, first.objects))
    assert call(report.main, str(whole), str(other), "--output", "unpaired.html") == 0
    page = (tmp_path / "unpaired.html").read_text()
    assert "not the same images, or not counted" in page
    assert "Without gallery: the runs were not counted on the same images." in page
    # classes in another order
    turned = [one._replace(labels=len(first.class_names) + 1 - one.labels) for one in better]
    truth = [one._replace(labels=len(first.class_names) + 1 - one.labels) for one in first.objects]
    third = Found(first.names, first.class_names[::-1], turned, truth)
    write_found(other / "found.npz", third)
    (other / "metrics.json").write_text(json.dumps(dict(reversed(json.loads(metrics).items()))))
    assert call(report.main, str(whole), str(other)) == 0
    page = (tmp_path / "report.html").read_text()
    for name, (low, high) in zip(third.class_names, class_intervals(third, "voc", 0.7), strict=True):
        row = re.search(rf"</span>{name}</th>.*?</tr>", page, re.DOTALL)
        assert row is not None
        assert f"{percent(low, 1)} – {percent(high, 1)}" in row[0]


def test_what_has_no_meaning_for_a_detector_is_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = f"checkpoint={whole / 'checkpoints' / 'best.ckpt'}"
    few = ("dataset.train_images=8", "dataset.val_images=4")
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    (labelled / "metrics.json").write_text('{"val/miou": 0.5}')
    (labelled / "config.yaml").write_text("task: {_target_: segdcn.training.task.SegmentationTask}")
    cats = tmp_path / "cats.json"
    cats.write_text('{"categories": [{"id": 1, "name": "cat"}], "images": []}')
    cases: list[tuple[Any, tuple[str, ...], str]] = [
        (export.main, (checkpoint,), "finds boxes and gives no logits"),
        (analyze.main, (checkpoint,), "finds boxes and gives no logits"),
        (evaluate.main, (checkpoint, "inference.flip=true"), "inference.flip is of label maps"),
        (evaluate.main, (checkpoint, "submission=true"), "submission=true is of label maps"),
        (evaluate.main, (checkpoint, "protocol=cityscapes"), "voc07, voc, coco"),
        (report.main, (str(whole), str(labelled)), "they have no figure in common"),
        (predict.main, (checkpoint, f"input={whole}/panels", "output=x", "annotations=none.json"), "none.json"),
        (predict.main, (checkpoint, f"input={whole}/panels", "output=x", f"annotations={cats}"), "no category disc"),
        (train.main, ("dataset=boxes",), "choose model=faster_rcnn"),
        (train.main, ("model=faster_rcnn_tiny",), "choose dataset=boxes"),
        (train.main, ("experiment=boxes", *few, "task.protocol=coco"), "task.monitor=val/map70 is no figure of"),
        (train.main, ("experiment=boxes", *few, "task.monitor=val/map75"), "it has val/map50, val/map70"),
        (predict.main, (checkpoint, f"input={whole}/panels", "output=found", "score=x"), "score must be a number"),
    ]
    for main, arguments, part in cases:
        assert call(main, *arguments) == 1, arguments
        assert part in one_line(capsys.readouterr().err)
    with pytest.raises(ValueError, match="finds boxes"):
        __import__("segdcn").load(whole / "checkpoints" / "best.ckpt")


@pytest.mark.slow
def test_a_killed_run_ends_like_the_undisturbed_one(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, "-m", "segdcn.commands.train", *SMALL, "trainer.max_epochs=3"]
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"output_dir={other}"], check=True, env=environment, capture_output=True)
    killed = subprocess.Popen([*command, f"output_dir={folder}"], env=environment, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "metrics.json").exists()
    again = [sys.executable, "-m", "segdcn.commands.train", f"resume={folder}"]
    subprocess.run(again, check=True, env=environment, capture_output=True)
    assert_same_run(folder, other)


@pytest.mark.slow
def test_two_processes_train_and_count_each_image_once(tmp_path: Path) -> None:
    two = ("trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=false", "dataset.val_images=5")
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "segdcn.commands.train", *SMALL, *two, f"output_dir={folder}"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    before = json.loads((folder / "metrics.json").read_text())
    checkpoint = f"checkpoint={folder / 'checkpoints' / 'best.ckpt'}"
    assert call(evaluate.main, checkpoint, "callbacks.panels=null", "trainer.accelerator=cpu") == 0
    after = json.loads((folder / "evaluation" / "best_val" / "metrics.json").read_text())
    assert before["images"] == after["images"] == 5
    assert {key: after[key] for key in before if key.startswith("val/")} == {
        key: value for key, value in before.items() if key.startswith("val/")
    }


@pytest.mark.slow
def test_a_sweep_of_poolings_is_compared_by_what_is_monitored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = ("model.pooling=roi_align,deformable", "seed=0,1", "sweep.name=pooling")
    assert call(train.main, "-m", *SMALL[:-3], "trainer.max_epochs=1", "callbacks.panels=null", *jobs) == 0
    capsys.readouterr()
    assert call(sweep_command.main, "collect", "sweeps/pooling", "--baseline", "model.pooling=roi_align") == 0
    text = capsys.readouterr().out
    assert "map70" in text
    assert "pooling=deformable" in text
    assert call(report.main, "sweeps/pooling") == 0
    page = Path("sweeps/pooling/report.html").read_text()
    for part in (
        "more than the baseline, by seed",
        "Mean AP@0.7 over seeds",
        "mAP@0.7 on val, %",
        "pooling=deformable",
    ):
        assert part in page


def test_figures_do_not_depend_on_what_shares_a_batch(whole: Path) -> None:
    """Images of several sizes, each beside others and alone."""
    network = read_checkpoint(whole / "checkpoints" / "best.ckpt").module()
    samples = Boxes(val_images=6).split("val")
    items = [
        as_item(sample._replace(image=sample.image[: 80 + 8 * (n % 3)]), False, n) for n, sample in enumerate(samples)
    ]
    found = []
    for size in (1, 4, 6):
        task = DetectionTask(network, Boxes.class_names, protocol="voc")
        for start in range(0, 6, size):
            with torch.no_grad():
                task.evaluate(DetectionDataModule.collate(items[start : start + size]))
        found.append(task.evaluator.compute().found.detections)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-3, atol=1e-2)


def test_a_sweep_over_recipes_is_compared_by_what_they_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[str] = []
    monkeypatch.setattr(Multirun, "run", lambda self, sweep, jobs: started.append(sweep.metric))
    monkeypatch.setattr("segdcn.commands.multirun.publish", lambda results: True)
    monkeypatch.setattr("segdcn.commands.multirun.collect", lambda folder: None)
    small = ("trainer.accelerator=cpu", "dataset.train_images=8")
    assert call(train.main, "-m", "experiment=boxes_roi_align,boxes", "sweep.name=one", *small) == 0
    assert started == ["val/map70"]
    capsys.readouterr()
    assert call(train.main, "-m", "experiment=shapes,boxes", "sweep.name=two", *small) == 1
    assert "sweep.metric" in one_line(capsys.readouterr().err)


def test_offset_branches_learn_at_rates_of_their_own() -> None:
    network = build_detector(
        2, "rfcn", "resnet_tiny", 8, None, Deform(layers=1), pooling="modulated", channels=8, bins=3, samples=2
    )
    task = DetectionTask(network, ["a", "b"], backbone_lr_mult=0.5, offset_lr_mult=0.1, reduce_lr_mult=3.0)
    groups = {group["name"]: group for group in task.parameter_groups()}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    of = {key: {names[id(parameter)] for parameter in group["params"]} for key, group in groups.items()}
    assert sum(map(len, of.values())) == len(names)
    assert of["offset"] == {f"backbone.body.layer4.0.conv2.offset.{part}" for part in ("weight", "bias")}
    pools = ("scores", "boxes")
    expected = {
        f"roi_heads.box_roi_pool.pool.{pool}.{field}.{part}"
        for pool in pools
        for field in ("offset", "mask")
        for part in ("weight", "bias")
    }
    assert of["field_offset"] == expected
    assert of["reduce"] | of["reduce_no_decay"] == {"backbone.reduce.weight", "backbone.reduce.bias"}
    assert {key: group["lr_mult"] for key, group in groups.items() if not key.endswith("no_decay")} == {
        "backbone": 0.5,
        "offset": 0.1,
        "field_offset": 1.0,
        "reduce": 3.0,
        "head": 1.0,
    }
    assert all(group["weight_decay"] == 0 for key, group in groups.items() if key.endswith(("no_decay", "offset")))


def test_a_mirrored_box_lies_on_the_mirrored_object() -> None:
    data = DetectionDataModule(Boxes(train_images=4, val_images=1), batch_size=4, flip=1.0, num_workers=0)
    (batch,) = list(data.train_dataloader())
    for image, target, name in zip(batch["image"], batch["target"], batch["name"], strict=True):
        sample = next(one for one in data.dataset.split("train") if one.name == name)
        assert torch.equal(
            (image * 255).round().byte().permute(1, 2, 0), torch.from_numpy(sample.image[:, ::-1].copy())
        )
        for box, (x1, y1, x2, y2) in zip(target["boxes"], sample.objects.boxes.astype(int), strict=True):
            inside = sample.image[y1:y2, x1:x2]
            left, top, right, bottom = box.int().tolist()
            seen = (image * 255).round().byte()[:, top:bottom, left:right].permute(1, 2, 0).numpy()
            assert np.array_equal(seen[:, ::-1], inside)


def test_ignored_objects_are_not_learned() -> None:
    data = Boxes(train_images=2, val_images=1)
    sample = data.split("train")[0]
    sample.objects.ignored[0] = True  # of the sample that is kept
    module = DetectionDataModule(data, batch_size=2, flip=0.0, num_workers=0)
    (batch,) = list(module.train_dataloader())
    target = batch["target"][batch["name"].index(sample.name)]
    assert np.array_equal(target["boxes"].numpy(), sample.objects.boxes[1:])
    assert np.array_equal(target["labels"].numpy(), sample.objects.labels[1:])
