"""The jobs of ``segdcn-train -m``: composed as each of them will be, checked before anything is written, and run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override

from segdcn.commands.configs import build_dataset, check_hydra_keys
from segdcn.commands.recipes import run_name
from segdcn.errors import UserError
from segdcn.runs.files import shown
from segdcn.runs.folder import locked, make_folder
from segdcn.runs.overrides import is_of_the_place, split_override
from segdcn.sweep.collect import collect
from segdcn.sweep.jobs import read_progress
from segdcn.sweep.local import LocalLauncher, SweepStopped
from segdcn.sweep.plan import Job, Sweep, job_folder, read_sweep
from segdcn.sweep.publish import publish

MOST_JOBS = 200
# what may lie in a folder before its sweep.json does, of a sweep that was killed just then
_BEFORE_A_SWEEP = ("multirun.yaml", "sweep.lock", "optuna.journal")


class Multirun:
    """A command with several jobs: its folder, its launcher, and what each job is told.

    context, config: as Hydra gives them to a sweeper.
    """

    def __init__(self, context: HydraContext, config: DictConfig) -> None:
        self.context, self.config = context, config
        self.folder = self._folder().absolute()
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._launcher: Any = None

    def prepare(self) -> None:
        """Make the folder, once it is known that the jobs can be run, and tell Hydra of it.

        Raises: UserError, one line.
        """
        make_folder(self.folder, "hydra.sweep.dir=DIR")
        with flag_override(self.config, ["readonly", "struct"], False):
            self.config.hydra.sweep.dir = str(self.folder)

    def given(self) -> list[Override]:
        """The overrides of this command, by Hydra's own parser; after those of ``hydra.sweeper.params``."""
        hydra = self.config.hydra
        params = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
        parser = OverridesParser.create(self.context.config_loader)
        parsed: list[Override] = parser.parse_overrides([*params, *hydra.overrides.task])
        return parsed

    def grid(self) -> list[list[str]]:
        """The overrides of all jobs of Hydra's own sweeper."""
        return BasicSweeper.split_arguments(self.given(), None)[0]

    def check(self, job_overrides: Sequence[Sequence[str]], jobs: int | None = None, first: bool = True) -> Sweep:
        """The sweep of these jobs, joined with what its folder holds.

        jobs: how many there will be, where these are not all.
        first: whether they are the first of this command, so that a folder with others is another sweep's.

        Raises: UserError, before anything is written or started, where it cannot be run.
        """
        check_hydra_keys(self.config.hydra)
        number = len(job_overrides) if jobs is None else jobs
        if number > MOST_JOBS and not self.config.sweep.confirm:
            raise UserError(f"this sweep has {number} jobs: add sweep.confirm=true if it is meant")
        sweep = self.sweep([self.job(overrides) for overrides in job_overrides])
        self.launcher.check(sweep.jobs)
        if isinstance(self.launcher, LocalLauncher):  # a cluster's nodes may see other data than this machine
            self._check_data(job_overrides)
        if (self.folder / "sweep.json").exists():
            before = read_sweep(self.folder)
            if first:
                sweep.check_same(before)
            sweep = sweep.joined(before)
        elif self.folder.is_dir() and any(not path.name.startswith(_BEFORE_A_SWEEP) for path in self.folder.iterdir()):
            raise UserError(f"{shown(self.folder)} holds something else than a sweep: choose another sweep.name")
        sweep.check()
        return sweep

    @property
    def launcher(self) -> Any:
        """What runs the jobs, as ``launcher`` says."""
        if self._launcher is None:
            self._launcher = instantiate(self.config.launcher, _convert_="all")
        return self._launcher

    @contextmanager
    def owned(self) -> Iterator[None]:
        """The folder, while no other process runs its sweep.

        Raises: UserError, one line, where one does.
        """
        with locked(self.folder / "sweep.lock", seconds=1.0) as lock:  # a look at its status takes a moment
            if lock is None:
                raise UserError(f"{shown(self.folder)} is being run by another process: see segdcn-sweep status")
            yield

    def run(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Run these jobs of the sweep to their end; a signal ends this process, and the same command goes on."""
        sweep.write()
        try:
            self.launcher.run(sweep, jobs)
        except SweepStopped as stop:
            print(f"{stop}; go on with the same command")
            sys.exit(128 + stop.signal)

    def launch(self, job_overrides: Sequence[Sequence[str]], first: bool) -> list[JobReturn]:
        """Run these jobs and print the sweep's table, as Hydra's own sweeper asks for it."""
        sweep = self.check(job_overrides, first=first)
        jobs = sweep.jobs[: len(job_overrides)]
        with self.owned():
            self.run(sweep, jobs)
            complete = publish(collect(self.folder))
        if not complete:
            sys.exit(1)
        return [
            JobReturn(
                overrides=overrides,
                cfg=self._compose(overrides),
                status=JobStatus.COMPLETED,
                _return_value=read_progress(sweep.path(job), sweep.metric).best,
            )
            for overrides, job in zip(job_overrides, jobs, strict=True)
        ]

    @property
    def metric(self) -> str:
        """What jobs are compared by: ``sweep.metric``, else the figure by which all that were composed are judged.

        Raises: UserError, one line, where these are several.
        """
        if self.config.sweep.metric is not None:
            return str(self.config.sweep.metric)
        judged = {str(config.task.get("monitor", "val/miou")) for config in self._composed.values() or [self.config]}
        if len(judged) > 1:
            raise UserError(f"the jobs are judged by {' and '.join(sorted(judged))}: add sweep.metric=FIGURE")
        return judged.pop()

    def sweep(self, jobs: Iterable[Job]) -> Sweep:
        """These jobs as a sweep, with what they are compared by."""
        options = self.config.sweep
        return Sweep(
            folder=self.folder,
            name=self.folder.name,
            command=shlex.join(["segdcn-train", *sys.argv[1:]]),
            baseline=None if options.baseline is None else tuple(options.baseline),
            metric=self.metric,
            jobs=tuple(jobs),
        )

    def job(self, overrides: Sequence[str], *more: str) -> Job:
        """The job of these overrides.

        more: further ones that make no other training of it.

        Raises: UserError, or what Hydra raises, for overrides that no job can have.
        """
        for key in ("output_dir", "resume"):
            if any(override.startswith(f"{key}=") for override in overrides):
                raise UserError(f"{key} is the sweep's to choose for each job: leave it out, or set sweep.name")
        config = self._compose(overrides)
        # which refuses the toy's recipe on other data
        run_name(config.hydra.runtime.choices, [*config.hydra.overrides.task, *overrides])
        plain: Any = OmegaConf.to_container(config, resolve=False)
        del plain["hydra"]
        for key in _missing(plain):
            raise UserError(f"{key} must be given: add {key}=VALUE to the command")
        telling = tuple(override for override in overrides if _is_telling(override))
        return Job(
            folder=job_folder(telling, plain),
            overrides=telling,
            arguments=(*self._sources(), *overrides, *more),
            epochs=config.trainer.max_epochs if (config.trainer.max_epochs or -1) > 0 else None,
            steps=config.trainer.max_steps if (config.trainer.max_steps or -1) > 0 else None,
            accelerator=str(config.trainer.accelerator),
            devices=config.trainer.devices,
            nodes=config.trainer.num_nodes,
        )

    def _folder(self) -> Path:
        chosen = str(OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["dir"])  # type: ignore[index,call-overload]
        if not chosen.startswith("multirun/${now:"):  # Hydra's own default is a folder for each minute
            return Path(str(self.config.hydra.sweep.dir))
        name = self.config.sweep.name
        if name is None:
            choices, task = self.config.hydra.runtime.choices, list(self.config.hydra.overrides.task)
            telling = sorted(override for override in task if _is_telling(override))
            digest = sha256(" ".join(telling).encode()).hexdigest()[:8]
            name = f"{run_name(choices, task)}_{digest}"
        return Path("sweeps") / str(name)

    def _check_data(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """That the data sets of all jobs are there."""
        seen = set()
        for config in map(self._compose, job_overrides):
            settings = str(OmegaConf.to_container(config.dataset, resolve=True))
            if settings not in seen:
                seen.add(settings)
                build_dataset(config)

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        key = tuple(overrides)
        if key not in self._composed:
            self._composed[key] = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        return self._composed[key]

    def _sources(self) -> list[str]:
        """Where a job finds the config, as this command was told."""
        job, arguments = self.config.hydra.job, []
        if job.config_name != "train":
            arguments += ["--config-name", job.config_name]
        for source in self.config.hydra.runtime.config_sources:
            if source.provider == "command-line":
                arguments += ["--config-dir", source.path]
        return arguments


def _missing(config: Any, prefix: str = "") -> Iterator[str]:
    """The keys of plain values that a user must give."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def _is_telling(override: str) -> bool:
    """Whether an override makes another job, rather than tell where and how it is run."""
    key = split_override(override.lstrip("~"))[0]
    return not is_of_the_place(key) and key.partition(".")[0] not in ("sweep", "launcher", "trust")
