"""Hydra's side of a sweep: the jobs of a multirun, told to segdcn.sweep, and their figures handed back.

Hydra finds launchers in the namespace ``hydra_plugins`` alone, and imports all of it whenever it starts: hence one
small file, with its imports where they are needed. (``from __future__ import annotations`` together with a dataclass
would break every Hydra program of the environment here.)
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from segdcn import UserError
from segdcn.runs.folder import make_folder

if TYPE_CHECKING:
    from segdcn.sweep.plan import Job, Sweep

MOST_JOBS = 200

ConfigStore.instance().store(
    group="hydra/launcher",
    name="segdcn",
    node={"_target_": "hydra_plugins.segdcn_launcher.SegdcnLauncher"},
    provider="segdcn",
)


class SegdcnLauncher(Launcher):
    """Every job of a multirun is a process of its own, ``python -m segdcn.commands.train``, run by ``launcher``."""

    context: HydraContext
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        chosen = str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"])  # type: ignore[index,call-overload]
        # Hydra's own default is a folder for each minute
        self._dir = None if chosen.startswith("multirun/${now:") else Path(str(config.hydra.sweep.dir))
        if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            # its grid is known before anything is written: Hydra's own records in the folder, to begin with
            _one_line(lambda: self._check(self._grid()))
        with flag_override(config, ["readonly", "struct"], False):
            config.hydra.sweep.dir = str(self._folder())
        _one_line(lambda: make_folder(self._folder(), "hydra.sweep.dir=DIR"))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        returned: Sequence[JobReturn] = _one_line(lambda: self._launch(job_overrides, first=initial_job_idx == 0))
        return returned

    def _grid(self) -> list[list[str]]:
        """The overrides of all jobs, by Hydra's own expansion."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        hydra = self.config.hydra
        given = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
        overrides = OverridesParser.create(self.context.config_loader).parse_overrides([*given, *hydra.overrides.task])
        return BasicSweeper.split_arguments(overrides, None)[0]

    def _check(self, job_overrides: Sequence[Sequence[str]], first: bool = True) -> "tuple[Sweep, Any]":
        """The sweep, joined with what its folder holds, and its launcher.

        Raises: UserError, before anything is written or started, where it cannot be run.
        """
        from hydra.utils import instantiate

        from segdcn.commands.compose import check_hydra_keys
        from segdcn.runs.files import shown
        from segdcn.sweep.local import LocalLauncher
        from segdcn.sweep.plan import read_sweep

        check_hydra_keys(self.config.hydra)
        if len(job_overrides) > MOST_JOBS and not self.config.sweep.confirm:
            raise UserError(f"this sweep has {len(job_overrides)} jobs: add sweep.confirm=true if it is meant")
        sweep = self._sweep(job_overrides)
        launcher = instantiate(self.config.launcher, _convert_="all")
        launcher.check(sweep.jobs)
        if isinstance(launcher, LocalLauncher):  # a cluster's nodes may see other data than this machine
            self._check_data(job_overrides)
        folder = sweep.folder
        if (folder / "sweep.json").exists():
            before = read_sweep(folder)
            if first:  # a sweeper that goes on from figures adds jobs with every batch
                sweep.check_same(before)
            sweep = sweep.joined(before)
        elif folder.is_dir() and {path.name for path in folder.iterdir()} - {"multirun.yaml"}:  # Hydra's own record
            raise UserError(f"{shown(folder)} holds something else than a sweep: choose another sweep.name")
        sweep.check()
        return sweep, launcher

    def _check_data(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """That the data sets of all jobs are there."""
        from segdcn.commands.compose import build_dataset

        seen = set()
        for config in map(self._compose, job_overrides):
            settings = str(OmegaConf.to_container(config.dataset, resolve=True))
            if settings not in seen:
                seen.add(settings)
                build_dataset(config)

    def _launch(self, job_overrides: Sequence[Sequence[str]], first: bool) -> list[JobReturn]:
        from segdcn.runs.files import shown
        from segdcn.runs.folder import locked
        from segdcn.sweep.collect import collect
        from segdcn.sweep.jobs import read_progress
        from segdcn.sweep.local import SweepStopped
        from segdcn.sweep.publish import publish

        sweep, launcher = self._check(job_overrides, first)
        jobs = sweep.jobs[: len(job_overrides)]
        with locked(sweep.folder / "sweep.lock", seconds=1.0) as lock:  # a look at its status takes a moment
            if lock is None:
                raise UserError(f"{shown(sweep.folder)} is being run by another process: see segdcn-sweep status")
            sweep.write()
            try:
                launcher.run(sweep, jobs)
            except SweepStopped as stop:
                print(f"{stop}; go on with the same command")
                sys.exit(128 + stop.signal)
            complete = publish(collect(sweep.folder))
        if not complete:
            sys.exit(1)
        return [
            _finished(overrides, self._compose(overrides), read_progress(sweep.path(job), sweep.metric).best)
            for overrides, job in zip(job_overrides, jobs, strict=True)
        ]

    def _folder(self) -> Path:
        if self._dir is not None:
            return self._dir
        name = self.config.sweep.name
        if name is None:
            choices, task = self.config.hydra.runtime.choices, self.config.hydra.overrides.task
            telling = sorted(override for override in task if _is_telling(override))
            digest = sha256(" ".join(telling).encode()).hexdigest()[:8]
            name = f"{choices.experiment or choices.dataset}_{digest}"
        return Path("sweeps") / str(name)

    def _sweep(self, job_overrides: Sequence[Sequence[str]]) -> "Sweep":
        from segdcn.sweep.plan import Sweep

        options, folder = self.config.sweep, self._folder()
        jobs = tuple(self._job(overrides) for overrides in job_overrides)
        return Sweep(
            folder=folder.absolute(),
            name=folder.name,
            command=shlex.join(["segdcn-train", *sys.argv[1:]]),
            baseline=None if options.baseline is None else tuple(options.baseline),
            metric=str(options.metric),
            jobs=jobs,
        )

    def _job(self, overrides: Sequence[str]) -> "Job":
        from segdcn.sweep.plan import Job, job_folder

        for key in ("output_dir", "resume"):
            if any(override.startswith(f"{key}=") for override in overrides):
                raise UserError(f"{key} is the sweep's to choose for each job: leave it out, or set sweep.name")
        config = self._compose(overrides)
        plain: Any = OmegaConf.to_container(config, resolve=False)
        del plain["hydra"]
        for key in _missing(plain):
            raise UserError(f"{key} must be given: add {key}=VALUE to the command")
        telling = tuple(override for override in overrides if _is_telling(override))
        return Job(
            folder=job_folder(telling, plain),
            overrides=telling,
            arguments=(*self._sources(), *overrides),
            epochs=config.trainer.max_epochs if (config.trainer.max_epochs or -1) > 0 else None,
            steps=config.trainer.max_steps if (config.trainer.max_steps or -1) > 0 else None,
            accelerator=str(config.trainer.accelerator),
            devices=config.trainer.devices,
            nodes=config.trainer.num_nodes,
        )

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
    from segdcn.runs.overrides import is_of_the_place, split_override

    key = split_override(override.lstrip("~"))[0]
    return not is_of_the_place(key) and key.partition(".")[0] not in ("sweep", "launcher", "trust")


def _finished(overrides: Sequence[str], config: DictConfig, figure: float) -> JobReturn:
    return JobReturn(overrides=overrides, cfg=config, status=JobStatus.COMPLETED, _return_value=figure)


def _one_line(action: Callable[[], Any]) -> Any:
    """What ``action`` returns; an error that is no bug becomes one line and its exit status."""
    from segdcn.commands.errors import one_line_errors

    with one_line_errors():
        return action()
