"""The figures of a split as files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdcn.evaluation.counts import COUNTS_FILE, write_counts
from segdcn.evaluation.evaluator import EvaluationResult
from segdcn.runs.folder import write_json


def write_figures(result: EvaluationResult, split: str, facts: Mapping[str, Any], folder: Path) -> None:
    """Write metrics.json, figures and ``facts`` as one flat object, and counts.npz beside it.

    Of a split without labels (a benchmark's test split) there are neither figures nor counts.

    result: figures under ``<split>/miou``, ``<split>/iou/<class>`` and so on.
    facts: what the figures depend on: protocol, inference, checkpoint, seed.
    """
    figures = {} if math.isnan(result.figures[f"{split}/miou"]) else result.figures
    if figures:
        write_counts(folder / COUNTS_FILE, result.counts)
    write_json(folder / "metrics.json", {**figures, "split": split, "images": result.images, **facts})
