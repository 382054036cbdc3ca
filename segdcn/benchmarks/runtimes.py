"""Networks under several runtimes: latency and memory, each in a process of its own, all called in turn.

A process of its own, since a runtime keeps what it has once taken (onnxruntime's arena), and since thread pools of
several runtimes would meet. The others wait, without using the processor, while one is called.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from segdcn.benchmarks.operators import OFFSET_DEVIATION
from segdcn.benchmarks.stopwatch import reset_peak, resident_megabytes
from segdcn.errors import MissingPackageError
from segdcn.interchange.onnx import onnx_bytes, open_onnx
from segdcn.interchange.verification import Runner
from segdcn.models import Deform, build_deeplab, sampling_layers
from segdcn.ops import DeformConv2d

STANDARD, TWIN = "standard.onnx", "grid_sample.onnx"  # without deformable layers they are one
SETTLE = 0.05  # seconds, in which the threads of the runtime before stop waiting for more


class Network(NamedTuple):
    """What is timed, see ``build_deeplab``; ``layers`` of the backbone are made deformable."""

    num_classes: int
    backbone: str
    head: str
    layers: int = 0

    def build(self) -> nn.Module:
        """With random weights and offsets, the same in every process."""
        torch.manual_seed(0)
        settings = (self.num_classes, self.backbone, self.head)
        network = build_deeplab(*settings, None, weights=None, deform=Deform(self.layers)).eval()
        for layer in sampling_layers(network).values():
            branch = layer.offset if isinstance(layer, DeformConv2d) else layer.branch
            nn.init.normal_(cast(Tensor, branch.bias), std=OFFSET_DEVIATION)
        return network


Size = tuple[int, int]

DEEPLAB = {"plain": Network(19, "resnet50", "aspp"), "3 deformable": Network(19, "resnet50", "aspp", 3)}
DEEPLAB_SIZES: Sequence[Size] = ((512, 1024), (256, 256))
INTERNIMAGE = {"UperNet": Network(150, "internimage_t", "upernet")}
INTERNIMAGE_SIZES: Sequence[Size] = ((512, 512),)


def open_openvino(path: Path) -> Runner:
    """An ONNX model under OpenVINO in float32, on as many CPU threads as PyTorch has."""
    # openvino tells Google Analytics that it was imported, without asking; where this package is missing it does not
    sys.modules["openvino_telemetry"] = cast(Any, None)
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError('openvino is not installed here: pip install -e ".[openvino]"') from error

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **threads})
    return lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0]))


RUNTIMES: dict[str, Callable[[Callable[[], nn.Module], Path], Runner]] = {
    "PyTorch, eager": lambda network, _: network(),
    "PyTorch, torch.compile": lambda network, _: torch.compile(network(), dynamic=False),
    "onnxruntime": lambda _, folder: open_onnx(folder / STANDARD),
    "onnxruntime, grid_sample": lambda _, folder: open_onnx(folder / TWIN),
    "OpenVINO, grid_sample": lambda _, folder: open_openvino(folder / TWIN),  # it has no DeformConv
}
"""By name: from what builds the network, or from the folder of its ONNX files."""


def measure(networks: Mapping[str, Network], sizes: Sequence[Size], repeats: int) -> list[dict[str, Any]]:
    """A row per image size (height, width) and runtime, with a cell per network.

    Returns:
        rows ``{"case": "1×3×256×256", "runtime": ..., "plain": cell}``, networks by name; a cell holds ``ms``, the
        median; ``mb``, the peak memory during the timed calls above what the process held before it had a network;
        ``difference``, the largest one of a logit from eager PyTorch's, as a share of their range; or ``missing``,
        why there are none.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folders = {column: Path(name) / str(number) for number, column in enumerate(networks)}
        for column, folder in folders.items():
            folder.mkdir()
            model = onnx_bytes(networks[column].build(), {}, "standard")
            (folder / STANDARD).write_bytes(model)
            if networks[column].layers:
                model = onnx_bytes(networks[column].build(), {}, "grid_sample")
            (folder / TWIN).write_bytes(model)
        for size in sizes:
            workers: dict[tuple[str, str], _Worker] = {}
            try:
                for column, folder in folders.items():
                    for runtime in RUNTIMES:
                        if networks[column].layers or runtime != "onnxruntime, grid_sample":  # the same file
                            workers[runtime, column] = _Worker(runtime, networks[column], size, folder)
                for _ in range(repeats):
                    for worker in workers.values():
                        worker.call()
                cells = {key: worker.finish() for key, worker in workers.items()}
            finally:
                for worker in workers.values():
                    worker.stop()
            for column in networks:
                _compare([cell for (_, other), cell in cells.items() if other == column])
            case = "×".join(map(str, (1, 3, *size)))
            rows += [
                {"case": case, "runtime": runtime, **{column: cells.get((runtime, column)) for column in networks}}
                for runtime in RUNTIMES
                if any(runtime == timed for timed, _ in cells)
            ]
    return rows


def _compare(cells: list[dict[str, Any]]) -> None:
    """Replace the logits of cells by how far they are from the first one's."""
    logits = [cell.pop("logits", None) for cell in cells]
    for cell, found in zip(cells, logits, strict=True):
        if found is not None and logits[0] is not None:
            cell["difference"] = float(np.abs(found - logits[0]).max() / np.ptp(logits[0]))


class _Worker:
    """A process that holds one network under one runtime and answers line by line."""

    def __init__(self, runtime: str, network: Network, size: Size, folder: Path) -> None:
        arguments = [runtime, json.dumps(network), *map(str, (*size, torch.get_num_threads(), folder))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "segdcn.benchmarks.runtimes", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.times: list[float] = []
        self.missing: str | None = self._answer().get("missing")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"missing": f"its process ended with status {self.process.wait()}"}

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        time.sleep(SETTLE)
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the answer tells
            print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def call(self) -> None:
        if self.missing is None:
            answer = self._ask("call")
            self.missing = answer.get("missing")
            self.times.append(answer.get("ms", 0.0))

    def finish(self) -> dict[str, Any]:
        if self.missing is None:
            answer = self._ask("finish")
            if "missing" not in answer:
                logits = np.load(answer["logits"])
                return {"ms": round(statistics.median(self.times), 1), "mb": answer["mb"], "logits": logits}
            self.missing = answer["missing"]
        return {"missing": self.missing}

    def stop(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def serve(runtime: str, network: Network, size: Size, threads: int, folder: Path) -> None:
    """The worker's side: open the runtime, warm it up, then call it once for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    torch.set_num_threads(threads)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        try:
            before = resident_megabytes()
            run = RUNTIMES[runtime](network.build, folder)
            for _ in range(2):
                logits = run(image)
        except Exception as error:  # a package, or a C++ compiler, that is not there
            answer(missing=(str(error).strip() or type(error).__name__).splitlines()[0])
            return
        file = folder / f"{runtime}.npy"
        np.save(file, logits.numpy())
        known = reset_peak()
        answer()
        for line in sys.stdin:
            if line == "call\n":
                start = time.perf_counter()
                run(image)
                answer(ms=1000 * (time.perf_counter() - start))
            else:
                peak = round(resident_megabytes(peak=True) - before) if known else None
                answer(mb=peak, logits=str(file))


if __name__ == "__main__":
    name, timed, *numbers, where = sys.argv[1:]
    height, width, processors = map(int, numbers)
    serve(name, Network(*json.loads(timed)), (height, width), processors, Path(where))
