"""segdcn-benchmark: the operators, a training step and the loading of images, each against what it stands beside."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from segdcn import UserError
from segdcn.benchmarks import runtimes
from segdcn.benchmarks.stopwatch import Candidate, compare, interleaved
from segdcn.commands.compose import CONFIG_PATH, build_dataset, settle, with_recipe
from segdcn.commands.console import plain_script
from segdcn.models import Deform, build_deeplab, deformable_layers
from segdcn.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from segdcn.runs.environment import environment
from segdcn.runs.files import write_json

# N, C, H, W -> C, 3x3; groups
CONVOLUTIONS = (
    (4, 256, 40, 40, 1),
    (1, 512, 65, 65, 1),
    (4, 512, 33, 33, 1),
    (1, 256, 64, 64, 1),
    (2, 64, 64, 64, 1),
)
DEPTHWISE = ((4, 256, 40, 40, 256), (1, 512, 65, 65, 512))
REGIONS = (64, 300)
OFFSET_DEVIATION = 2.0  # pixels
DEFORMABLE_LAYERS = (0, 3, 6)
WORKERS = (1, 2)
LOADING_SECONDS = 3.0  # of each way to load, in each round


# --- what is compared -------------------------------------------------------------------------------------------------


def convolutions(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """deform_conv2d, both backends, against torchvision's operator and a plain convolution."""
    rows = []
    for n, channels, height, width, groups in CONVOLUTIONS + DEPTHWISE:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, channels, height, width, generator=generator)
        weight = torch.randn(channels, channels // groups, 3, 3, generator=generator) / math.sqrt(9 * channels / groups)
        offset = OFFSET_DEVIATION * torch.randn(n, 18, height, width, generator=generator)
        x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
        candidates = _convolution_candidates(x, offset.to(device).requires_grad_(), weight, groups)
        case = f"{n}×{channels}×{height}×{width}" + (" depthwise" if groups > 1 else "")
        rows.append({"case": case, "figures": compare(candidates, repeats)})
    return rows


def _convolution_candidates(x: Tensor, offset: Tensor, weight: Tensor, groups: int) -> list[Candidate]:
    wide_x, wide_weight = (t.detach().float().requires_grad_() for t in (x, weight))  # no bfloat16 on a CPU
    return [
        Candidate("conv2d", lambda: F.conv2d(x, weight, padding=1, groups=groups), (x, weight)),
        Candidate(
            "torchvision's own",
            lambda: torchvision.ops.deform_conv2d(wide_x, offset, wide_weight, padding=1),
            (wide_x, offset, wide_weight),
        ),
        Candidate(
            "torchvision",
            lambda: deform_conv2d(x, offset, weight, padding=1, backend="torchvision"),
            (x, offset, weight),
        ),
        Candidate("gather", lambda: deform_conv2d(x, offset, weight, padding=1, backend="gather"), (x, offset, weight)),
    ]


def poolings(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The deformable RoI poolings against torchvision's plain ones, on a map of 50×75 pixels."""
    rows = []
    for count in REGIONS:
        generator = torch.Generator().manual_seed(0)
        size = torch.tensor([1200.0, 800.0])
        corner = torch.rand(count, 2, generator=generator) * size * 0.6
        far = corner + torch.rand(count, 2, generator=generator) * size * 0.4
        rois = torch.cat((torch.zeros(count, 1), corner, far), dim=1).to(device)
        x, scores = (
            torch.randn(1, channels, 50, 75, generator=generator).to(device, dtype).requires_grad_()
            for channels in (256, 21 * 49)
        )
        offset = torch.randn(count, 2, 7, 7, generator=generator).to(device).requires_grad_()
        candidates = _pooling_candidates(x, scores, rois, offset)
        rows.append({"case": f"{count} regions", "figures": compare(candidates, repeats)})
    return rows


def _pooling_candidates(x: Tensor, scores: Tensor, rois: Tensor, offset: Tensor) -> list[Candidate]:
    wide_x, wide_scores = (t.detach().float().requires_grad_() for t in (x, scores))  # no bfloat16 in torchvision's
    return [
        Candidate("roi_align", lambda: torchvision.ops.roi_align(wide_x, rois, 7, 1 / 16, aligned=True), (wide_x,)),
        Candidate("deform_roi_pool", lambda: deform_roi_pool(x, rois, offset, 7, 1 / 16), (x, offset)),
        Candidate(
            "ps_roi_align", lambda: torchvision.ops.ps_roi_align(wide_scores, rois, 7, 1 / 16, 4), (wide_scores,)
        ),
        Candidate(
            "deform_ps_roi_pool",
            lambda: deform_ps_roi_pool(scores, rois, offset, 7, 21, 7, 1 / 16),
            (scores, offset),
        ),
    ]


def training_steps(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward, loss, backward and SGD step of DeepLabv3 on a ResNet-50, output stride 16, at 4×3×256×256."""
    image = torch.randn(4, 3, 256, 256, device=device)
    label = torch.randint(21, (4, 256, 256), device=device)
    steps: dict[str, Callable[[], object]] = {}
    for layers in DEFORMABLE_LAYERS:
        for backend in ("gather", "torchvision") if layers else ("gather",):
            torch.manual_seed(0)
            network = (
                build_deeplab(21, "resnet50", "aspp", weights=None, deform=Deform(layers=layers)).to(device).train()
            )
            for layer in deformable_layers(network).values():
                layer.backend = cast(Any, backend)
                torch.nn.init.normal_(cast(Tensor, layer.offset.bias), std=OFFSET_DEVIATION)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.0)  # the weights stay, the cost is there

            def step(network: Any = network, optimizer: torch.optim.SGD = optimizer) -> None:
                with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
                    loss = F.cross_entropy(network(image), label)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()

            steps[f"{layers} deformable" + (f", {backend}" if layers else "")] = step
    medians = interleaved(steps, repeats, image.device)
    return [{"case": name, "step_ms": taken} for name, taken in medians.items()]


def loading(repeats: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Training images per second and worker, in segdcn's order and in the naive one, and of decoding alone.

    overrides: of segdcn-train's config, such as dataset=cityscapes dataset.root=PATH; none takes made-up Cityscapes.
    """
    from hydra import compose, initialize_config_dir

    from segdcn.benchmarks.loading import make_streets, measure
    from segdcn.data.dataset import ImageMaskFiles

    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        if not overrides:
            streets = make_streets(Path(folder))
            overrides = ["dataset=cityscapes", f"dataset.root={streets}", "datamodule.crop_size=[768,768]"]
        config = compose("train", overrides=with_recipe(list(overrides)))
        dataset = build_dataset(config)
        settle(config, dataset)
        samples = dataset.split("train")
        if not isinstance(samples, ImageMaskFiles):
            raise UserError("data: only data sets of image and mask files can be timed, such as dataset=cityscapes")
        if config.datamodule.crop_size is None or config.datamodule.short_side is not None:
            raise UserError(
                "data: only random crops of images at their own size can be timed: leave crop_size and"
                " short_side as the data set has them"
            )
        settings = {key: config.datamodule[key] for key in ("crop_size", "scale", "flip", "photometric")}
        return [
            {
                "case": f"{workers} worker(s)",
                **measure(samples, **settings, workers=workers, seconds=LOADING_SECONDS, rounds=repeats),
            }
            for workers in WORKERS
        ]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def _times(row: dict[str, Any]) -> list[str]:
    return [f"{_number(f.forward_ms)} / {_number(f.training_ms)}" for f in row["figures"].values()]


def _number(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1}f}"  # a GPU's times are parts of a millisecond


def _geometric_mean(values: Sequence[float]) -> str:
    return f"{math.exp(statistics.mean(map(math.log, values))):.2f}"


def show_convolutions(rows: list[dict[str, Any]]) -> None:
    """Two tables: time with its ratios, and peak memory."""
    print("\nDeformable convolution 3×3, offsets of standard deviation 2; ms, forward / forward and backward")
    names = list(rows[0]["figures"])
    lines, ratios = [], []
    for row in rows:
        conv, torchvisions, _, gather = (row["figures"][name] for name in names)
        ratio = [
            slow / fast
            for slow, fast in (
                (torchvisions.forward_ms, gather.forward_ms),
                (torchvisions.training_ms, gather.training_ms),
                (gather.forward_ms, conv.forward_ms),
                (gather.training_ms, conv.training_ms),
            )
        ]
        if "depthwise" not in row["case"]:
            ratios.append(ratio)
        pairs = [f"{_number(one)} / {_number(other)}" for one, other in (ratio[:2], ratio[2:])]
        lines.append([row["case"], *_times(row), *pairs])
    means = [_geometric_mean(column) for column in zip(*ratios, strict=True)]
    mean_line = ["geometric mean, not depthwise", *[""] * len(names), " / ".join(means[:2]), " / ".join(means[2:])]
    _table(["N×C×H×W", *names, "torchvision's / gather", "gather / conv2d"], [*lines, mean_line])
    show_memory(rows)


def show_memory(rows: list[dict[str, Any]]) -> None:
    """Peak memory of each case."""
    print("\nPeak memory above what was held before; MB, forward / forward and backward")
    cells = [
        [row["case"], *(f"{f.forward_mb:.0f} / {f.training_mb:.0f}" for f in row["figures"].values())] for row in rows
    ]
    _table(["case", *rows[0]["figures"]], cells)


def show_poolings(rows: list[dict[str, Any]]) -> None:
    """Time of the poolings, and their peak memory."""
    print(
        "\nRoI pooling of 1×256×50×75 (1×1029×50×75 position-sensitive), 7×7 bins; ms, forward / forward and backward"
    )
    _table(["case", *rows[0]["figures"]], [[row["case"], *_times(row)] for row in rows])
    show_memory(rows)


def show_training_steps(rows: list[dict[str, Any]]) -> None:
    """One line per network, beside the one without deformable layers."""
    print("\nTraining step of DeepLabv3, ResNet-50, output stride 16, 4×3×256×256")
    plain = rows[0]["step_ms"]
    _table(
        ["layers, backend", "ms", "of the plain network"],
        [[row["case"], f"{row['step_ms']:.0f}", f"{row['step_ms'] / plain:.2f}"] for row in rows],
    )


def show_loading(rows: list[dict[str, Any]]) -> None:
    """One line per number of workers."""
    print("\nLoading of training images; images per second and worker")
    columns = list(rows[0])[1:]
    _table(
        ["workers", *(name.replace("_", ", ") for name in columns)],
        [
            [row["case"], *(f"{row[name]:.2f}" if name == "speedup" else f"{row[name]:.1f}" for name in columns)]
            for row in rows
        ],
    )


def show_runtimes(rows: list[dict[str, Any]]) -> None:
    """One line per image size and runtime."""
    print(
        "\nDeepLabv3, ResNet-50, output stride 16, 19 classes; ms, and peak MB above what the process held before it"
        "\nhad a network (weights included); logits: the largest difference from eager PyTorch's, of their range"
    )
    layers = [key for key in rows[0] if key not in ("case", "runtime")]
    head = [f"{'plain' if n == '0' else f'{n} deformable'}, {unit}" for n in layers for unit in ("ms", "MB", "logits")]
    lines = []
    for row in rows:
        cells = [_runtime_cells(row[n]) for n in layers]
        lines.append([row["case"], row["runtime"], *(text for cell in cells for text in cell)])
    _table(["N×C×H×W", "runtime", *head], lines)


def _runtime_cells(cell: dict[str, Any] | None) -> list[str]:
    if cell is None or "missing" in cell:
        return [cell["missing"] if cell else "", "", ""]
    memory = "" if cell["mb"] is None else str(cell["mb"])
    return [f"{cell['ms']:.0f}", memory, f"{cell['difference']:.0e}" if cell.get("difference") else ""]


BENCHMARKS = {
    "conv": (convolutions, show_convolutions),
    "pool": (poolings, show_poolings),
    "step": (training_steps, show_training_steps),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; exits with a line that says what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="segdcn-benchmark",
        description="Times the operators against torchvision's and a plain convolution, all in one process and in "
        "turn, prints tables (medians) and writes them with versions and device to a JSON file.",
        usage="%(prog)s [options] [conv] [pool] [step] [runtimes] [data [dataset=NAME dataset.root=PATH ...]]",
        epilog="For figures worth quoting the machine must be idle: a second run tells how much they move.",
    )
    parser.add_argument(
        "which",
        nargs="*",
        metavar="conv|pool|step|runtimes|data",
        help="what to time: convolutions, RoI poolings, a training step (these three by default); a network under "
        "PyTorch, onnxruntime and OpenVINO; loading of images",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds after one to warm up (default: 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of features")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="file (default: benchmark.json)")
    options = parser.parse_args(arguments)
    options.overrides = [word for word in options.which if "=" in word]
    options.which = [word for word in options.which if "=" not in word] or list(BENCHMARKS)
    known = (*BENCHMARKS, "runtimes", "data")
    unknown = [name for name in options.which if name not in known]
    if unknown:
        parser.error(f"nothing to time is called {unknown[0]!r}: choose from {', '.join(known)}")
    if "runtimes" in options.which and (options.device, options.dtype) != ("cpu", "float32"):
        parser.error("runtimes are compared on the CPU in float32: leave --device and --dtype out")
    if options.overrides and "data" not in options.which:
        parser.error(
            f"{options.overrides[0]} is for the loading of images: segdcn-benchmark data {options.overrides[0]}"
        )
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {options.repeats}")
    return options


@plain_script
def main() -> None:
    """Console script."""
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device on this machine")
    if options.threads:
        torch.set_num_threads(options.threads)

    about = environment(seed=0)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {options.dtype}, {about['device']}, ",
        end="",
    )
    print(f"{about['threads']} threads, medians of {options.repeats}", flush=True)
    results: dict[str, Any] = {}
    for name in options.which:
        if name == "data":
            rows, show = loading(options.repeats, options.overrides), show_loading
        elif name == "runtimes":
            rows, show = runtimes.measure(options.repeats), show_runtimes
        else:
            run, show = BENCHMARKS[name]
            rows = run(options.repeats, options.device, getattr(torch, options.dtype))
        results[name] = [_plain(row) for row in rows]
        write_json(options.output, {"environment": about, "dtype": options.dtype, **results})  # what is there is safe
        show(rows)
    print(f"\nfigures in {options.output}")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON; a memory figure that is not known becomes null."""
    figures = {
        name: {key: None if math.isnan(value) else round(value, 3) for key, value in vars(f).items()}
        for name, f in row.get("figures", {}).items()
    }
    return {key: value for key, value in row.items() if key != "figures"} | figures


if __name__ == "__main__":
    main()
