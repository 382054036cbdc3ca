"""segdcn-benchmark: the operators, a training step and the loading of images, each against what it stands beside."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segdcn.commands.configs import CONFIG_PATH
from segdcn.commands.console import plain_script
from segdcn.errors import UserError

DEFAULT = ("conv", "aggregate", "pool", "step")
WORKERS = (1, 2)
LOADING_SECONDS = 3.0  # of each way to load, in each round


@plain_script
def main() -> None:
    """Console script."""
    run(parse_arguments())


def run(options: argparse.Namespace) -> None:
    """Time what is asked for; what is measured is written before it is shown, and before the next is begun."""
    import torch
    import torchvision

    from segdcn.benchmarks import networks, operators, runtimes, tables
    from segdcn.benchmarks.stopwatch import plain_figures
    from segdcn.runs.environment import environment
    from segdcn.runs.files import write_json

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device on this machine")
    if options.threads:
        torch.set_num_threads(options.threads)
    repeats, of_features = options.repeats, (options.device, getattr(torch, options.dtype))
    benchmarks: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "conv": (lambda: operators.convolutions(repeats, *of_features), tables.show_convolutions),
        "aggregate": (lambda: operators.aggregations(repeats, *of_features), tables.show_aggregations),
        "pool": (lambda: operators.poolings(repeats, *of_features), tables.show_poolings),
        "step": (lambda: networks.training_steps(repeats, *of_features), tables.show_training_steps),
        "light": (lambda: networks.light_networks(repeats, *of_features), tables.show_light_networks),
        "runtimes": (
            lambda: runtimes.measure(runtimes.DEEPLAB, runtimes.DEEPLAB_SIZES, repeats),
            lambda rows: tables.show_runtimes(rows, "DeepLabv3, ResNet-50, output stride 16, 19 classes"),
        ),
        "internimage": (
            lambda: runtimes.measure(runtimes.INTERNIMAGE, runtimes.INTERNIMAGE_SIZES, repeats),
            lambda rows: tables.show_runtimes(rows, "UperNet on InternImage-T, 150 classes"),
        ),
        "data": (lambda: loading(repeats, options.overrides), tables.show_loading),
    }
    conditions = environment(seed=0)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(
        f"{versions}, {options.dtype}, {conditions['device']}, {conditions['threads']} threads, medians of {repeats}",
        flush=True,
    )
    results: dict[str, Any] = {}
    for name in options.which:
        measure, show = benchmarks[name]
        rows = measure()
        results[name] = [
            {key: value for key, value in row.items() if key != "figures"} | plain_figures(row.get("figures", {}))
            for row in rows
        ]
        write_json(options.output, {"environment": conditions, "dtype": options.dtype, **results})
        show(rows)
    print(f"\nfigures in {options.output}")


def loading(repeats: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Training images per second and worker, in segdcn's order and in the naive one, and of decoding alone.

    overrides: of segdcn-train's config, such as dataset=cityscapes dataset.root=PATH; none takes made-up Cityscapes.
    """
    from hydra import compose, initialize_config_dir

    from segdcn.benchmarks.loading import make_streets, measure
    from segdcn.commands.configs import build_dataset
    from segdcn.commands.recipes import with_recipe
    from segdcn.commands.segmentation import settle
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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; exits with a line that says what is wrong with them."""
    parser = argparse.ArgumentParser(
        prog="segdcn-benchmark",
        description="Times the operators against torchvision's and a plain convolution, all in one process and in "
        "turn, prints tables (medians) and writes them with versions and device to a JSON file.",
        usage="%(prog)s [options] [conv] [aggregate] [pool] [step] [light] [runtimes] [internimage]"
        " [data [dataset=NAME dataset.root=PATH ...]]",
        epilog="For figures worth quoting the machine must be idle: a second run tells how much they move.",
    )
    parser.add_argument(
        "which",
        nargs="*",
        metavar="conv|aggregate|pool|step|light|runtimes|internimage|data",
        help="what to time: convolutions, aggregations, RoI poolings, a training step (these four by default); one of "
        "light networks for CPUs, and their evaluation; DeepLabv3, or UperNet on InternImage-T, under PyTorch, "
        "onnxruntime and OpenVINO; loading of images",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds after one to warm up (default: 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of features")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="file (default: benchmark.json)")
    options = parser.parse_args(arguments)
    options.overrides = [word for word in options.which if "=" in word]
    options.which = [word for word in options.which if "=" not in word] or list(DEFAULT)
    known = (*DEFAULT, "light", "runtimes", "internimage", "data")
    unknown = [name for name in options.which if name not in known]
    if unknown:
        parser.error(f"nothing to time is called {unknown[0]!r}: choose from {', '.join(known)}")
    if {"runtimes", "internimage"} & {*options.which} and (options.device, options.dtype) != ("cpu", "float32"):
        parser.error("runtimes are compared on the CPU in float32: leave --device and --dtype out")
    if options.overrides and "data" not in options.which:
        parser.error(
            f"{options.overrides[0]} is for the loading of images: segdcn-benchmark data {options.overrides[0]}"
        )
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {options.repeats}")
    return options


if __name__ == "__main__":
    main()
