"""What came out of a sweep: one row per setting, with what its seeds tell about the difference to the baseline."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segdcn.runs.record import STATES, RunRecord
from segdcn.sweep.plan import Job

COSTS = ("parameters", "flops", "training_seconds", "seconds_per_image")
"""Keys of metrics.json: of the network, of one image of ``flops_input`` pixels, of the training, of inference."""


@dataclass(frozen=True)
class Estimate:
    """A mean of ``count`` values and the ends of its 95 % interval; ``p`` of the test that the mean is zero.

    Of one value, and of values that are all equal, there is neither interval nor p value: they tell nothing about
    how much another seed would differ.
    """

    count: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval, which is symmetric."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Run:
    """A planned run.

    error: why there is no figure.
    figure: the metric as metrics.json has it, a fraction.
    costs: ``COSTS``, as far as they are known.
    published: the published figure, as a fraction.
    metrics: all that the figure stands beside: the record's own, of the test split with those of its evaluation.
    """

    job: Job
    record: RunRecord
    error: str | None = None
    figure: float | None = None
    costs: Mapping[str, float | None] = field(default_factory=dict)
    published: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        return self.record.state

    def cost(self, key: str) -> float | None:
        """One of ``COSTS``."""
        return self.costs.get(key)

    @property
    def flops_input(self) -> str | None:
        """The size of the image of which the FLOPs are, "[height,width]"."""
        size = self.metrics.get("flops_input")
        return None if size is None else str(size)


@dataclass(frozen=True)
class Row:
    """One setting; figures are fractions, as in metrics.json.

    estimate: over the runs that have a figure; None without any.
    difference: to the baseline, paired by seed; None of the baseline itself and without a common seed.
    """

    label: str
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]
    is_baseline: bool
    estimate: Estimate | None
    difference: Estimate | None

    @property
    def states(self) -> dict[str, int]:
        """How many runs there are in each state, finished ones first, those without a figure apart."""
        found = Counter("without a figure" if run.state == "finished" and run.error else run.state for run in self.runs)
        return {state: found[state] for state in (*STATES, "without a figure") if found[state]}

    @property
    def figures(self) -> dict[str | None, float]:
        """Figure by seed, of the runs that have one."""
        return {run.job.seed: run.figure for run in self.runs if run.figure is not None}

    @property
    def published(self) -> float | None:
        return next((run.published for run in self.runs if run.published is not None), None)

    def cost(self, key: str) -> float | None:
        """The median of one of ``COSTS`` over the runs that know it."""
        known = [value for run in self.runs if (value := run.cost(key)) is not None]
        if not known:
            return None
        return statistics.median_low(known) if isinstance(known[0], int) else statistics.median(known)

    @property
    def flops_input(self) -> str | None:
        return next((run.flops_input for run in self.runs if run.flops_input is not None), None)


@dataclass(frozen=True)
class Results:
    """All settings of a sweep in its order.

    notes, warnings: what a reader must know to understand and to trust the figures, in whole sentences.
    stem: of the names of the files that hold them.
    """

    folder: Path
    name: str
    command: str
    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    stem: str = "results"

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @property
    def without_figure(self) -> list[Run]:
        return [run for run in self.runs if run.figure is None]

    @property
    def incomplete(self) -> list[Run]:
        """Those without a figure that may still get one; what was pruned was ended on purpose."""
        return [run for run in self.without_figure if run.state != "pruned"]

    @property
    def baseline(self) -> Row:
        return next(row for row in self.rows if row.is_baseline)
