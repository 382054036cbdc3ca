"""segdcn-benchmark on tiny shapes: what it prints and writes, not how fast anything is."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import one_line, process

from segdcn.benchmarks import networks, operators, runtimes, stopwatch
from segdcn.commands import benchmark


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(operators, "CONVOLUTIONS", ((1, 4, 6, 7, 1), (2, 4, 5, 5, 1)))
    monkeypatch.setattr(operators, "DEPTHWISE", ((1, 4, 6, 7, 4),))
    monkeypatch.setattr(operators, "AGGREGATIONS", ((1, 5, 6, 8, 2),))
    monkeypatch.setattr(operators, "REGIONS", (2,))
    monkeypatch.setattr(sys, "argv", ["segdcn-benchmark", *arguments])
    benchmark.main()


def test_tables_and_json_hold_every_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "conv", "aggregate", "pool", "--repeats", "2")
    text = capsys.readouterr().out
    assert text.startswith(f"torch {torch.__version__}, torchvision ")
    assert f"{torch.get_num_threads()} threads, medians of 2" in text.splitlines()[0]
    assert "| geometric mean, not depthwise |" in text
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results.keys() == {"environment", "dtype", "conv", "aggregate", "pool"}
    assert {"packages", "device", "threads", "git"} <= results["environment"].keys()
    assert [row["case"] for row in results["conv"]] == ["1×4×6×7", "2×4×5×5", "1×4×6×7 depthwise"]
    for row, names in (
        (results["conv"][0], {"conv2d", "torchvision's own", "torchvision", "gather"}),
        (results["aggregate"][0], {"grid_sample", "gather"}),
        (
            results["pool"][0],
            {"roi_align", "deform_roi_pool", "ps_roi_align", "deform_ps_roi_pool", "deform_ps_roi_pool by class"},
        ),
    ):
        assert row.keys() - {"case"} == names
        for name in names:
            assert f"| {name} |" in text
            assert min(row[name]["forward_ms"], row[name]["training_ms"]) > 0


def test_bfloat16_features_are_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        monkeypatch,
        "conv",
        "aggregate",
        "pool",
        "--dtype",
        "bfloat16",
        "--repeats",
        "1",
        "--output",
        str(tmp_path / "half.json"),
    )
    assert json.loads((tmp_path / "half.json").read_text())["dtype"] == "bfloat16"


def test_peak_memory_is_that_of_the_call() -> None:
    held = torch.ones(16 * 2**20)  # 64 MB, not counted
    peak = stopwatch.peak_megabytes(lambda: (held + 1).sum(), torch.device("cpu"))
    if math.isnan(peak):
        pytest.skip("this system does not tell a process its peak memory")
    assert 60 < peak < 80  # the temporary of 64 MB


def test_a_training_step_is_timed_per_layer_count_and_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = networks.build_deeplab
    monkeypatch.setattr(
        networks,
        "build_deeplab",
        lambda *_, weights, deform: original(21, "resnet_tiny", "paper", weights=weights, deform=deform),
    )
    monkeypatch.setattr(networks, "DEFORMABLE_LAYERS", (0, 2))
    run(monkeypatch, "step", "--repeats", "1", "--output", str(tmp_path / "step.json"))
    rows = json.loads((tmp_path / "step.json").read_text())["step"]
    assert [row["case"] for row in rows] == ["0 deformable", "2 deformable, gather", "2 deformable, torchvision"]
    assert all(row["step_ms"] > 0 for row in rows)
    assert "| 0 deformable |" in capsys.readouterr().out


def test_light_networks_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "LIGHT_IMAGES", (2, 3, 64, 64))
    monkeypatch.setattr(networks, "LIGHT_EVALUATED", (1, 3, 64, 64))
    run(monkeypatch, "light", "--repeats", "1", "--output", str(tmp_path / "light.json"))
    rows = json.loads((tmp_path / "light.json").read_text())["light"]
    assert [row["images"] for row in rows] == [2] * 5 + [1] * 2
    assert all(row["ms"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert "| + a frozen first stage |" in out
    assert "| batch norms folded |" in out


def test_loading_of_a_users_own_images_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "masks"):
        folder = tmp_path / "own" / "train" / kind
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((60, 80, 3) if kind == "images" else (60, 80), np.uint8)).save(folder / "a.png")
    monkeypatch.setattr(benchmark, "WORKERS", (0,))
    monkeypatch.setattr(benchmark, "LOADING_SECONDS", 0.05)
    own = ["dataset=folder", f"dataset.root={tmp_path / 'own'}", "dataset.class_names=[a,b]"]
    run(monkeypatch, "data", *own, "--repeats", "1", "--output", str(tmp_path / "data.json"))
    (row,) = json.loads((tmp_path / "data.json").read_text())["data"]
    assert row.keys() == {"case", "pipeline", "naive", "naive_order", "decode", "decode_pillow", "speedup"}
    assert "| 0 worker(s) |" in capsys.readouterr().out
    for settings, message in (
        (["dataset=shapes"], "only data sets of image and mask files can be timed"),
        (["dataset=voc", "dataset.root=nowhere"], "no VOC 2012 in nowhere"),
        ([*own, "datamodule.crop_size=null"], "only random crops of images at their own size can be timed"),
        ([*own, "datamodule.short_side=360"], "only random crops of images at their own size can be timed"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, "data", *settings)
        assert message in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_runtimes_answer_from_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtimes, "DEEPLAB", {"mine": runtimes.Network(19, "resnet_tiny", "aspp", 1)})
    monkeypatch.setattr(runtimes, "DEEPLAB_SIZES", ((64, 96),))
    for name in set(runtimes.RUNTIMES) - {"PyTorch, eager", "onnxruntime, grid_sample"}:
        monkeypatch.delitem(runtimes.RUNTIMES, name)
    monkeypatch.setitem(runtimes.RUNTIMES, "abacus", lambda *_: None)  # which the processes do not know
    run(monkeypatch, "runtimes", "--repeats", "2", "--output", str(tmp_path / "runtimes.json"))
    rows = json.loads((tmp_path / "runtimes.json").read_text())["runtimes"]
    assert [row["runtime"] for row in rows] == list(runtimes.RUNTIMES)
    text = capsys.readouterr().out
    for row in rows:
        assert row["case"] == "1×3×64×96"
        assert f"| 1×3×64×96 | {row['runtime']} |" in text
        if row["runtime"] == "abacus":
            assert row["mine"] == {"missing": "'abacus'"}
        else:
            assert row["mine"]["ms"] > 0
            assert row["mine"]["mb"] is None or row["mine"]["mb"] > 0
            assert row["mine"]["difference"] < 1e-4


@pytest.mark.slow
def test_a_network_that_has_one_onnx_file_is_timed_once_under_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = runtimes.INTERNIMAGE["UperNet"]._replace(num_classes=4, backbone="resnet_tiny")
    monkeypatch.setattr(runtimes, "INTERNIMAGE", {"UperNet": small})
    monkeypatch.setattr(runtimes, "INTERNIMAGE_SIZES", ((64, 96),))
    for name in set(runtimes.RUNTIMES) - {"PyTorch, eager", "onnxruntime", "onnxruntime, grid_sample"}:
        monkeypatch.delitem(runtimes.RUNTIMES, name)
    run(monkeypatch, "internimage", "--repeats", "1", "--output", str(tmp_path / "internimage.json"))
    eager, other = json.loads((tmp_path / "internimage.json").read_text())["internimage"]
    assert (eager["runtime"], other["runtime"]) == ("PyTorch, eager", "onnxruntime")
    assert min(eager["UperNet"]["ms"], other["UperNet"]["ms"]) > 0
    assert 0 < other["UperNet"]["difference"] < 1e-4
    assert "UperNet on InternImage-T, 150 classes; ms" in capsys.readouterr().out


ASK_NOTHING = """
import sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "os.fork"):
        raise AssertionError(f"{event} {arguments}")
sys.addaudithook(forbid)
from pathlib import Path
import torch
from segdcn.benchmarks import runtimes
from segdcn.interchange import onnx as exchange
from segdcn.interchange.verification import compare
from segdcn.models import Deform, build_deeplab, deformable_layers
deform = Deform(layers=2, modulated=True, offset_groups=2)
network = build_deeplab(6, "resnet_tiny", "v3plus", 32, weights=None, deform=deform)
for layer in deformable_layers(network).values():
    torch.nn.init.normal_(layer.offset.bias, std=2.0)
Path("x.onnx").write_bytes(exchange.onnx_bytes(network, {}, "grid_sample"))
images = torch.randn(2, 3, 65, 97)
for start in (runtimes.open_openvino, exchange.open_onnx):
    (found,) = compare(network, start(Path("x.onnx")), [images])
    assert found.relative < 1e-4, found
"""


@pytest.mark.slow
def test_openvino_runs_without_a_call_home(tmp_path: Path) -> None:
    ended = process(tmp_path, "-c", ASK_NOTHING, HOME=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "intel").exists()  # where it would keep a client number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["speed"],
            "nothing to time is called 'speed': choose from conv, aggregate, pool, step, light, runtimes, internimage,"
            " data",
        ),
        (["runtimes", "--dtype", "bfloat16"], "runtimes are compared on the CPU in float32"),
        (["internimage", "--device", "cuda"], "runtimes are compared on the CPU in float32"),
        (["conv", "dataset=voc"], "dataset=voc is for the loading of images: segdcn-benchmark data dataset=voc"),
        (["--repeats", "0"], "--repeats must be 1 or more, got 0"),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--device", "cuda")
    assert one_line(capsys.readouterr().err).startswith("error: --device cuda: PyTorch finds no CUDA device")
