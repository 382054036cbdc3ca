"""``hydra/sweeper=optuna``: a multirun whose settings Optuna chooses, a few at a time, by the figures so far."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.types import HydraContext
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from segdcn.commands.kinds import check_kinds
from segdcn.commands.multirun import Multirun
from segdcn.drawing.numbers import is_loss, metric_value
from segdcn.errors import UserError
from segdcn.runs.overrides import quoted
from segdcn.sweep.collect import collect
from segdcn.sweep.jobs import read_progress
from segdcn.sweep.plan import Job
from segdcn.sweep.publish import publish
from segdcn.training.pruning import STUDY, Pruning, journal

Space = dict[str, BaseDistribution]


class Search:
    """A study of Optuna's in a sweep's folder; its trials are the sweep's jobs.

    The trials are chosen in batches: all of one are over before the next is chosen. The sampler is seeded anew for
    each trial, so that a search that was killed, wherever, goes on with the trials that it would have had.

    Args:
        context, config: as Hydra gives them to a sweeper.
        n_trials: how many there are in the end, over all starts of the command.
        n_jobs: size of a batch; None is as many as the launcher runs at once.
        seed: of the sampler.
        pruning: the settings of ``segdcn.training.pruning.Pruning``; None prunes nothing.
        params: what is searched, by key, beside what the command line says; Hydra reads them from the config.
    """

    def __init__(
        self,
        context: HydraContext,
        config: DictConfig,
        n_trials: int,
        n_jobs: int | None,
        seed: int,
        pruning: Mapping[str, Any] | None,
        params: Mapping[str, str] | None,
    ) -> None:
        given = {"n_trials": n_trials, "n_jobs": n_jobs, "seed": seed, "pruning": pruning}
        check_kinds({"_target_": f"{__name__}.Search", **given}, "hydra.sweeper")
        check_kinds({"_target_": "segdcn.training.pruning.Pruning", **(pruning or {})}, "hydra.sweeper.pruning")
        if n_trials < 1 or (n_jobs is not None and n_jobs < 1):
            raise UserError(f"hydra.sweeper.n_trials and n_jobs must be 1 or more, got {n_trials} and {n_jobs}")
        if pruning is not None:
            Pruning("", 0, **pruning)  # which refuses what is out of range
        self.multirun = Multirun(context, config)
        self.metric = self.multirun.metric
        self.n_trials, self.n_jobs, self.seed, self.pruning = n_trials, n_jobs, seed, pruning
        self.space, self.fixed = search_space(self.multirun.given())
        self._jobs: dict[int, Job] = {}

    def run(self) -> None:
        """Run the trials that are left, print the table of all, and exit with status 1 where one has failed.

        Raises: UserError, one line, before anything is written where it cannot be run.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = self._overrides(self._ask(self._study(None)).params)
        self.multirun.check([first], self.n_trials)
        at_once = self.n_jobs or self.multirun.launcher.at_once([self.multirun.job(first)])
        self.multirun.prepare()
        with self.multirun.owned():
            study = self._study(journal(self.multirun.folder))
            if any(not trial.distributions.items() <= self.space.items() for trial in study.trials):
                raise UserError("this search's trials so far were chosen from other ranges: choose another sweep.name")
            failed: set[int] = set()
            while batch := self._batch(study, at_once, failed):
                failed |= self._run(study, batch)
            complete = publish(collect(self.multirun.folder))
            self._tell_best(study)
        if not complete:
            sys.exit(1)

    def _study(self, storage: Any) -> optuna.Study:
        """The one of a storage, begun or gone on with; in memory without one."""
        direction = StudyDirection.MINIMIZE if is_loss(self.metric) else StudyDirection.MAXIMIZE
        return optuna.create_study(storage=storage, study_name=STUDY, direction=direction, load_if_exists=True)

    def _ask(self, study: optuna.Study) -> optuna.Trial:
        # seeded once, a search that goes on would choose its first trials again
        study.sampler = TPESampler(seed=self.seed + len(_counted(study)), constant_liar=True)
        return study.ask(self.space)

    def _batch(self, study: optuna.Study, size: int, failed: set[int]) -> list[FrozenTrial]:
        """The next trials: those that were interrupted, or new ones. What failed waits for the next start."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.params.keys() != self.space.keys():  # killed while it was chosen
                study.tell(trial.number, state=TrialState.FAIL)
        counted = _counted(study)
        left = [number for number, trial in enumerate(counted) if _is_left(trial, failed)]
        begin = (left[0] if left else len(counted)) // size * size  # of a batch that was begun: it is filled up
        while len(counted) < min(begin + size, self.n_trials):
            self._ask(study)
            counted = _counted(study)
        return [trial for trial in counted[begin : begin + size] if _is_left(trial, failed)]

    def _run(self, study: optuna.Study, batch: Sequence[FrozenTrial]) -> set[int]:
        """Run the jobs of these trials and tell their figures; returns the trials that have none."""
        jobs = {trial.number: self._job(trial) for trial in _counted(study)}
        # settings that are chosen twice are one job
        sweep = self.multirun.sweep({job.folder: job for job in jobs.values()}.values())
        for trial in batch:
            print(f"trial {list(jobs).index(trial.number) + 1} of {self.n_trials}: {' '.join(_typed(trial.params))}")
        self.multirun.run(sweep, list({jobs[trial.number].folder: jobs[trial.number] for trial in batch}.values()))
        failed = set()
        for trial in batch:
            job = read_progress(sweep.path(jobs[trial.number]), self.metric)
            if job.record.state == "pruned":
                study.tell(trial.number, state=TrialState.PRUNED)
            elif job.record.state == "finished" and not math.isnan(job.best):
                study.tell(trial.number, job.best)
            else:
                failed.add(trial.number)
        return failed

    def _job(self, trial: FrozenTrial) -> Job:
        if trial.number not in self._jobs:
            settings = {"trial": trial.number, "metric": quoted(self.metric), **(self.pruning or {})}
            told = ",".join(f"{key}:{value}" for key, value in settings.items())
            target = "_target_:segdcn.training.pruning.Pruning,folder:${output_dir}"
            more = [] if self.pruning is None else [f"++callbacks.pruning={{{target},{told}}}"]
            self._jobs[trial.number] = self.multirun.job(self._overrides(trial.params), *more)
        return self._jobs[trial.number]

    def _overrides(self, params: Mapping[str, Any]) -> list[str]:
        return [*_typed(params), *self.fixed]  # a job's folder begins with what is searched

    def _tell_best(self, study: optuna.Study) -> None:
        if study.get_trials(states=(TrialState.COMPLETE,)):
            pruned = len(study.get_trials(states=(TrialState.PRUNED,)))
            chosen = " ".join(_typed(study.best_params))
            figure = f"{self.metric} {metric_value(study.best_value, self.metric)}"
            print(f"best of {len(_counted(study))} trials, {pruned} of them pruned: {chosen} ({figure})", flush=True)


def _is_left(trial: FrozenTrial, failed: set[int]) -> bool:
    return trial.state == TrialState.RUNNING and trial.number not in failed


def _typed(params: Mapping[str, Any]) -> list[str]:
    """What a trial chose, as overrides."""
    return [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


def _counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials in their order, without those that were never whole."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]


def search_space(overrides: Sequence[Override]) -> tuple[Space, list[str]]:
    """What is searched, by key as it is typed, and the overrides that all trials have.

    ``interval(a, b)`` is any number between, ``int(...)`` of it a whole one; ``range(...)`` is Hydra's, without its
    end; ``tag(log, ...)`` of either is searched on a logarithmic scale; ``choice(...)``, ``a,b,c`` and ``glob(...)``
    are values without an order.

    Raises: UserError, one line: nothing is searched, or a range that is none.
    """
    space: Space = {}
    fixed: list[str] = []
    for override in {override.key_or_group: override for override in overrides}.values():  # the last one of each key
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
            continue
        try:
            space[override.get_key_element()] = _distribution(override)
        except (ValueError, TypeError) as error:
            raise UserError(f"{override.input_line} cannot be searched: {error}") from error
    if not space:
        raise UserError(
            "hydra/sweeper=optuna has nothing to search: add a range, such as"
            " 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
        )
    return space, fixed


def _distribution(override: Override) -> BaseDistribution:
    value: Any = override.value()
    low: Any
    high: Any
    step: Any
    if isinstance(value, IntervalSweep):
        low, high, step = value.start, value.end, None
    elif isinstance(value, RangeSweep):
        values = sorted(value.range())
        if not values:
            raise ValueError("it is empty")
        low, high, step = values[0], values[-1], abs(value.step)
    else:  # sorted: hydra's shuffle would make another study of it each time
        return CategoricalDistribution(sorted(set(override.sweep_string_iterator())))
    log = "log" in value.tags
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)
