"""The figures of a split as files of a run's folder: metrics.json and counts.npz."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from segdcn.errors import MissingFileError, UserError, is_passing
from segdcn.evaluation.counts import Counts
from segdcn.evaluation.evaluator import EvaluationResult
from segdcn.runs.files import write_bytes, write_json
from segdcn.runs.record import RunRecord

COUNTS_FILE = "counts.npz"  # beside metrics.json

Kept = TypeVar("Kept")


def write_figures(result: EvaluationResult, split: str, conditions: Mapping[str, Any], folder: Path) -> None:
    """Write metrics.json, figures and ``conditions`` as one flat object, and counts.npz beside it.

    Of a split without labels (a benchmark's test split) there are neither figures nor counts.

    result: figures under ``<split>/miou``, ``<split>/iou/<class>`` and so on.
    conditions: what the figures depend on: protocol, inference, checkpoint, seed.
    """
    figures = {} if math.isnan(result.figures[f"{split}/miou"]) else result.figures
    if figures:
        write_counts(folder / COUNTS_FILE, result.counts)
    write_json(folder / "metrics.json", {**figures, "split": split, "images": result.images, **conditions})


def write_counts(path: Path, counts: Counts) -> None:
    """Write ``counts``, see ``write_arrays``."""
    write_arrays(path, counts, images=counts.images.numpy(), confusion=counts.confusion.numpy())


def write_arrays(path: Path, kept: Any, **arrays: NDArray[Any]) -> None:
    """Write arrays and the ``names`` and ``class_names`` of ``kept`` as an .npz, atomically; no pickle."""
    named: dict[str, Any] = {key: np.array(getattr(kept, key), dtype=np.str_) for key in ("names", "class_names")}
    content = io.BytesIO()
    np.savez_compressed(content, **named | arrays)
    write_bytes(path, content.getvalue())


def read_counts(path: Path) -> Counts:
    """Read a counts.npz; raises as ``read_arrays``."""
    return read_arrays(path, "pixel counts", _counts)


def _counts(arrays: Mapping[str, NDArray[Any]]) -> Counts:
    names, class_names = arrays["names"].tolist(), arrays["class_names"].tolist()
    images, confusion = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("images", "confusion"))
    n, k = len(names), len(class_names)
    if images.shape != (n, 3, k) or confusion.shape != (k, k):
        raise UserError(f"{n} images, {k} classes, counts {tuple(images.shape)}")
    return Counts(names, class_names, images, confusion)


def read_arrays(path: Path, what: str, make: Callable[[Mapping[str, NDArray[Any]]], Kept]) -> Kept:
    """What an evaluation kept as an .npz.

    what: it is, in words.
    make: makes it of the arrays; UserError where they do not fit together.

    Raises: FileNotFoundError, or ValueError when it is damaged or its parts do not fit; one line each.
    """
    if not path.is_file():
        raise MissingFileError(f"no {what} at {path}: segdcn-evaluate writes them")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return make(arrays)
    except UserError as error:
        raise UserError(f"{path} does not fit together: {error}; evaluate again") from error
    except Exception as error:  # a damaged archive raises many kinds: zip, zlib, key, value
        if is_passing(error):
            raise
        raise UserError(f"{path} cannot be read: it is damaged ({type(error).__name__}); evaluate again") from error


def find_counts(run: RunRecord) -> Counts:
    """See ``find_kept``."""
    return find_kept(run, COUNTS_FILE, read_counts, "the pixel counts of single images were not kept")


def find_kept(run: RunRecord, file: str, read: Callable[[Path], Kept], lacking: str) -> Kept:
    """What the run kept, or a later evaluation of the same checkpoint, protocol and inference.

    lacking: what to say where neither did.

    Raises: UserError, one line, where there is none, or none that can be read.
    """
    reason = UserError(lacking)
    if (run.folder / file).is_file():
        try:
            return read(run.folder / file)
        except UserError as error:
            reason = error
    later = run.evaluation(run.split)
    if later is None or any(later.metrics.get(key) != run.metrics.get(key) for key in ("protocol", "inference")):
        raise reason
    try:
        return read(later.folder / file)
    except MissingFileError:
        raise reason from None
