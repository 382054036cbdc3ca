"""segdcn-export checkpoint=PATH format=onnx|torch: a network as a file that runs without this package, verified."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from segdcn.commands.console import console_script
from segdcn.errors import UserError, is_passing, one_line
from segdcn.runs.files import file_hash, replacing, shown, write_json
from segdcn.runs.folder import make_folder, run_folder_of, unmake_folder

if TYPE_CHECKING:
    from segdcn.data.dataset import Array
    from segdcn.inference.predictor import Predictor
    from segdcn.interchange.verification import Agreement
    from segdcn.runs.checkpoint import Checkpoint

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@console_script("export")
def main(config: DictConfig) -> None:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    export(config)


def export(config: DictConfig) -> Path:
    """Write the network of ``config.checkpoint`` and what its verification found; returns the file.

    Raises:
        FileNotFoundError, ValueError, ImportError: one line; nothing is written, also where the file's results differ
            from PyTorch's by more than ``config.tolerance``.
    """
    target = _target(config, Path(config.checkpoint))  # before torch is imported: a wrong option is reported at once
    import torch

    from segdcn.interchange.onnx import onnx_bytes, open_onnx, require_packages
    from segdcn.interchange.program import open_program, program_bytes
    from segdcn.interchange.verification import batches, compare, judge
    from segdcn.runs.checkpoint import read_checkpoint
    from segdcn.runs.environment import environment

    if config.format == "onnx":
        require_packages("onnx", "onnxscript", "onnxruntime")
    checkpoint = read_checkpoint(Path(config.checkpoint), config.trust)
    predictor = checkpoint.predictor(torch.device("cpu"))
    image, image_name = _image(config.image, checkpoint)
    metadata = {**describe(predictor, checkpoint), "deform": config.deform}
    if config.format == "onnx":
        content = onnx_bytes(predictor.network, metadata, config.deform, config.opset)
        runtime, start = "onnxruntime", open_onnx
    else:
        content = program_bytes(predictor.network, metadata, config.deform)
        runtime, start = "torch", open_program
    report = target.with_name(f"{target.name}.json")
    make_folder(target.parent, "output=FILE")
    with contextlib.ExitStack() as stack:
        stack.callback(unmake_folder, target.parent)  # what was made for the file and is empty
        file = stack.enter_context(replacing(target))  # under its name it is seen when it was verified
        file.write(content)
        file.flush()
        written = Path(file.name)
        cases = compare(predictor.network, start(written), batches(image, predictor.transform.image))
        figures = judge(cases, config.tolerance, runtime)
        verified = {
            "file": target.name,
            "file_sha256": file_hash(written),
            "bytes": len(content),
            "checkpoint": str(checkpoint.path),
            "runtime": runtime,
            "image": image_name,
            **figures,
            "tolerance": dict(config.tolerance),
            "cases": [vars(case) for case in cases],
            "metadata": metadata,
            "opset": config.opset if config.format == "onnx" else None,
            "environment": environment(checkpoint.seed),
        }
        write_json(report, verified)
    _show(cases, runtime, image_name)
    print(f"{shown(target)}  {len(content) / 1e6:.1f} MB, verified in {shown(target)}.json")
    return target


def _target(config: DictConfig, checkpoint: Path) -> Path:
    """Where to write; checks the options that name it."""
    if config.format not in SUFFIXES:
        raise UserError(f"format must be onnx or torch, got {config.format!r}")
    if config.deform not in ("standard", "grid_sample"):
        raise UserError(f"deform must be standard or grid_sample, got {config.deform!r}")
    for key, limit in config.tolerance.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0:
            raise UserError(f"tolerance.{key} must be a number of at least 0, got {limit!r}")
    suffix = SUFFIXES[config.format]
    if config.output is None:
        twin = "" if config.deform == "standard" else f"_{config.deform}"
        return run_folder_of(checkpoint) / "export" / f"{checkpoint.stem}{twin}{suffix}"
    target = Path(config.output)
    if target.suffix != suffix or target.is_dir():
        raise UserError(f"output={target} must be a file that ends in {suffix}, since format={config.format}")
    return target


def describe(predictor: Predictor, checkpoint: Checkpoint) -> dict[str, str]:
    """What a program needs to use the network, and where it comes from: texts, lists as JSON."""
    from segdcn import __version__
    from segdcn.models import deformable_layers

    metadata = {
        "input": "image: float32 (N, 3, H, W), RGB, (pixel / 255 - mean) / std per channel",
        "output": "logits: float32 (N, K, H, W); the label is the index of the largest of K",
        "class_names": json.dumps(predictor.class_names, ensure_ascii=False),
        "palette": json.dumps(predictor.palette),
        "mean": json.dumps(predictor.transform.mean),
        "std": json.dumps(predictor.transform.std),
        "deformable_layers": json.dumps(list(deformable_layers(predictor.network))),
        "protocol": checkpoint.config.get("protocol", "native"),
        "dataset": str(checkpoint.groups["dataset"].get("_target_")).rpartition(".")[2],
        "checkpoint_sha256": file_hash(checkpoint.path),
        "segdcn_version": __version__,
    }
    # of a network of ours; one of another kind has none to tell
    stride = getattr(getattr(predictor.network, "backbone", None), "output_stride", None)
    return metadata if stride is None else {**metadata, "output_stride": str(stride)}


def _image(path: str | None, checkpoint: Checkpoint) -> tuple[Array, str]:
    """A real image, uint8 (H, W, 3), and its name: the given one, or the first to validate of the run's data set."""
    from segdcn.inference.photographs import read_photo

    if path is not None:
        return read_photo(Path(path)), path
    try:
        sample = checkpoint.dataset().split("val")[0]
    except Exception as error:  # whatever a data set raises, whose files lie elsewhere
        if is_passing(error):
            raise
        raise UserError(
            f"the export is verified on a real image, and the run's data set is not at hand ({one_line(error)}):"
            " give an image with image=PATH"
        ) from error
    return sample.image, sample.name


def _show(cases: list[Agreement], runtime: str, image: str) -> None:
    print(f"{runtime} against PyTorch on {image}:")
    for case in cases:
        low, high = case.span
        print(
            f"  {case.batch}×3×{case.size[0]}×{case.size[1]}  largest logit difference {case.difference:.1e}"
            f" (logits {low:.1f} to {high:.1f}), {case.differing} of {case.pixels} labels differ"
        )


if __name__ == "__main__":
    main()
