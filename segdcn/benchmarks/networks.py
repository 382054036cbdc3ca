"""What deformable layers cost a network, in a training step and for one image; and what lighter networks save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdcn.benchmarks.operators import OFFSET_DEVIATION
from segdcn.benchmarks.stopwatch import interleaved, peak_megabytes
from segdcn.errors import first_line
from segdcn.models import Deform, build_deeplab, deformable_layers, plain_twin, sampling_layers
from segdcn.models.cost import network_cost
from segdcn.models.folding import folded

DEFORMABLE_LAYERS = (0, 3, 6)
LIGHT_IMAGES = (8, 3, 240, 320)
LIGHT_EVALUATED = (1, 3, 720, 960)


def training_steps(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward, loss, backward and SGD step of DeepLabv3 on a ResNet-50, output stride 16, at 4×3×256×256."""
    image = torch.randn(4, 3, 256, 256, device=device)
    steps: dict[str, Callable[[], object]] = {}
    for layers in DEFORMABLE_LAYERS:
        for backend in ("gather", "torchvision") if layers else ("gather",):
            torch.manual_seed(0)
            network = build_deeplab(21, "resnet50", "aspp", weights=None, deform=Deform(layers)).to(device).train()
            for layer in deformable_layers(network).values():
                layer.backend = cast(Any, backend)
            steps[f"{layers} deformable" + (f", {backend}" if layers else "")] = _step(network, image, dtype)
    medians = interleaved(steps, repeats, image.device)
    return [{"case": name, "step_ms": taken} for name, taken in medians.items()]


def light_networks(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same step of a MobileNetV2 with three deformable layers at 8×3×240×320, lighter from row to row.

    On a CPU then the last one's evaluation of 1×3×720×960, with its batch norms as they are and folded.
    """
    cases: dict[str, tuple[dict[str, Any], torch.memory_format]] = {
        "v3plus of 64 channels": ({"head": "v3plus", "head_channels": 64}, torch.contiguous_format),
        "fpn of 64 channels": ({"head": "fpn"}, torch.contiguous_format),
        "+ channels_last": ({"head": "fpn"}, torch.channels_last),
        "+ output stride 32": ({"head": "fpn", "output_stride": 32}, torch.channels_last),
        "+ a frozen first stage": ({"head": "fpn", "output_stride": 32, "frozen_stages": 1}, torch.channels_last),
    }
    image = torch.randn(LIGHT_IMAGES, device=device)
    steps: dict[str, Callable[[], object]] = {}
    for name, (settings, layout) in cases.items():
        network = build_deeplab(11, "mobilenet_v2", weights=None, **settings).to(device).to(memory_format=layout)
        steps[name] = _step(network.train(), image.contiguous(memory_format=layout), dtype)
    rows = _light_rows("Training step", steps, image, repeats)
    if device != "cpu":
        return rows
    network.eval()
    image = torch.randn(LIGHT_EVALUATED, device=device).contiguous(memory_format=torch.channels_last)
    calls = {
        "batch norms by themselves": lambda: network(image),
        "batch norms folded": lambda: folded(network, image.shape[2:])(image),
    }
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return rows + _light_rows("Evaluation", calls, image, repeats)


def _light_rows(
    what: str, calls: Mapping[str, Callable[[], object]], image: Tensor, repeats: int
) -> list[dict[str, Any]]:
    size, medians = "×".join(map(str, image.shape)), interleaved(dict(calls), repeats, image.device)
    return [
        {"what": f"{what}, {size}", "case": name, "ms": taken, "images": len(image)} for name, taken in medians.items()
    ]


def mixed_steps(
    repeats: int,
    device: torch.device,
    backends: Sequence[str],
    backbones: Sequence[str] = ("resnet50", "resnet101"),
    images: tuple[int, int, int, int] = (8, 3, 513, 513),
    layer_counts: Sequence[int] = DEFORMABLE_LAYERS,
    compilers: Sequence[str | None] = (None, "inductor"),
) -> Iterator[dict[str, Any]]:
    """Training steps of DeepLabv3 at output stride 16 in bfloat16 by autocast, channels last, as they are and compiled.

    Those of a backbone are timed in turn; compiled ones, for which the first step waits long, one by one.

    Returns:
        rows with "backbone", "layers", "backend", "compiled", "step_ms", "images_per_second" and "mb", the peak above
        what was held before; or "error" in the place of figures.
    """
    image = torch.randn(images, device=device).contiguous(memory_format=torch.channels_last)
    kinds = [(layers, backend) for layers in layer_counts for backend in (backends if layers else ("",))]
    for compiler in compilers:
        for backbone in backbones:
            groups = [kinds] if compiler is None else [[kind] for kind in kinds]
            for group in groups:
                yield from _mixed_steps(repeats, image, backbone, group, compiler)


def _mixed_steps(
    repeats: int, image: Tensor, backbone: str, kinds: Sequence[tuple[int, str]], compiler: str | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    steps: dict[int, Callable[[], object]] = {}
    for layers, backend in kinds:
        row: dict[str, Any] = {"backbone": backbone, "layers": layers, "backend": backend, "compiled": bool(compiler)}
        rows.append(row)
        torch.manual_seed(0)
        torch.compiler.reset()
        network = build_deeplab(21, backbone, "aspp", weights=None, deform=Deform(layers)).to(image.device)
        for layer in deformable_layers(network).values():
            layer.backend = cast(Any, backend)
        step = _step(network.to(memory_format=torch.channels_last).train(), image, torch.bfloat16, compiler)
        try:
            row["mb"] = peak_megabytes(step, image.device)
            row["mb"] = peak_megabytes(step, image.device)  # the first one compiles
            steps[len(rows) - 1] = step
        except Exception as error:
            row["error"] = first_line(error)
    for number, taken in interleaved(steps, repeats, image.device).items():
        rows[number] |= {"step_ms": taken, "images_per_second": 1000 * len(image) / taken}
    return rows


def _step(network: Any, image: Tensor, dtype: torch.dtype, compiler: str | None = None) -> Callable[[], object]:
    """Forward, loss, backward and SGD step; the weights stay, the cost is there."""
    for layer in deformable_layers(network).values():
        torch.nn.init.normal_(cast(Tensor, layer.offset.bias), std=OFFSET_DEVIATION)
    label = torch.randint(network.head.classifier.out_channels, (len(image), *image.shape[2:]), device=image.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    forward = network if compiler is None else torch.compile(network, backend=compiler)

    def step() -> None:
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(forward(image), label)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_cost(network: nn.Module, image: Tensor, repeats: int) -> dict[str, Any]:
    """Parameters, FLOPs, time and memory of one image, plain against deformable: the paper's Table 4.

    The plain network is the deformable one with each deformable layer replaced by its convolution; of a network
    without deformable layers there is only one.

    Args:
        network: in evaluation mode.
        image: (1, 3, H, W), on the network's device.
        repeats: timed runs of each, in turn; the first, untimed ones warm up.

    Returns:
        plain values: "size" (H, W), "repeats", "device", "threads", and under "plain" and "deformable" each
        "parameters", "flops" (a multiply-add is 2), "milliseconds" (median) and "megabytes" (peak above what was
        held; None where the system does not tell).
    """
    networks = {"plain": network}
    if deformable_layers(network):
        networks = {"plain": plain_twin(network), "deformable": network}
    elif sampling_layers(network):  # DCNv3 and DCNv4, which have no plain twin
        networks = {"deformable": network}
    size = (image.shape[2], image.shape[3])
    calls: dict[str, Callable[[], object]] = {name: partial(one, image) for name, one in networks.items()}
    with torch.inference_mode():
        times = interleaved(calls, repeats, image.device)
        memory = {name: peak_megabytes(call, image.device) for name, call in calls.items()}
    figures: dict[str, Any] = {
        "size": list(size),
        "repeats": repeats,
        "device": str(image.device),
        "threads": torch.get_num_threads(),
    }
    for name, one in networks.items():
        cost = network_cost(one, size)
        figures[name] = {
            "parameters": cost["parameters"],
            "flops": cost["flops"],
            "milliseconds": times[name],
            "megabytes": None if math.isnan(memory[name]) else memory[name],
        }
    return figures
