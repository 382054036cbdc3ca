"""What a sweep is: its jobs, and what they are compared by; kept in its folder's sweep.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from segdcn.errors import UserError
from segdcn.runs.files import read_object, shown, write_json
from segdcn.runs.overrides import is_of_the_place, split_override

Setting = tuple[str, ...]
"""The overrides of a job without its seed."""

# Not of the training itself: who runs it, and where.
_AROUND = ("launcher", "sweep", "output_dir", "resume", "name", "report", "trust")


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    folder: its run folder, relative to the sweep's.
    overrides: what makes it this job, as Hydra gives them (``key=value``).
    arguments: the command line of ``python -m segdcn.commands.train``, all but the run folder.
    epochs, steps: its length, whichever is set.
    accelerator, devices, nodes: of its trainer; devices are processes per node.
    """

    folder: str
    overrides: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"
    nodes: int = 1

    @property
    def seed(self) -> str | None:
        """As it was typed; None where the config's own seed is used."""
        seeds = [value for key, _, value in map(split_override, self.overrides) if key == "seed"]
        return seeds[-1] if seeds else None  # Hydra takes the last one too

    @property
    def setting(self) -> Setting:
        """The overrides without the seed."""
        return tuple(override for override in self.overrides if split_override(override)[0] != "seed")


@dataclass(frozen=True)
class Sweep:
    """What ``sweep.json`` holds.

    command: that started it.
    baseline: overrides of the setting with which the others are compared; None is the first setting.
    metric: the figure that is compared, a key of metrics.json.
    """

    folder: Path
    name: str
    command: str
    baseline: tuple[str, ...] | None
    metric: str
    jobs: tuple[Job, ...]

    def path(self, job: Job) -> Path:
        """A job's run folder."""
        return self.folder / job.folder

    def write(self) -> None:
        """Write ``sweep.json``, without its own folder, which may be moved."""
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / "sweep.json", values)

    @property
    def settings(self) -> dict[Setting, list[Job]]:
        """The jobs of each setting, in the sweep's order."""
        settings: dict[Setting, list[Job]] = {}
        for job in self.jobs:
            settings.setdefault(job.setting, []).append(job)
        return settings

    @property
    def labels(self) -> dict[Setting, str]:
        """The name of each setting: the overrides that not all settings have."""
        settings = list(self.settings)
        common = set(settings[0]).intersection(*settings) if len(settings) > 1 else set()
        return {
            setting: " ".join(override for override in setting if override not in common) or "(nothing changed)"
            for setting in settings
        }

    @property
    def job_labels(self) -> dict[str, str]:
        """What to call each job, by its folder: the overrides that not all jobs have, or all of them."""
        common = set(self.jobs[0].overrides).intersection(*(job.overrides for job in self.jobs))
        return {
            job.folder: " ".join([one for one in job.overrides if one not in common] or job.overrides)
            for job in self.jobs
        }

    @property
    def baseline_setting(self) -> Setting:
        """The setting with which the others are compared.

        Raises: ValueError, one line, when ``baseline`` is not exactly one of the settings.
        """
        settings = list(self.settings)
        if self.baseline is None:
            return settings[0]
        searched = {override.lstrip("+") for override in self.baseline}
        found = [setting for setting in settings if searched <= {override.lstrip("+") for override in setting}]
        if len(found) != 1:
            labels = [self.labels[setting] for setting in found or settings]
            raise UserError(
                f"the baseline {' '.join(self.baseline)!r} of {shown(self.folder)} is"
                f" {'more than one' if found else 'none'} of the sweep's settings: name one of {'; '.join(labels)}"
            )
        return found[0]

    def check(self) -> None:
        """That a table can come of it: each run once, and a baseline.

        Raises: ValueError, one line.
        """
        for setting, jobs in self.settings.items():
            if len({job.seed for job in jobs}) < len(jobs):
                raise UserError(
                    f"{shown(self.folder)} plans {' '.join(setting) or 'the config as it is'} twice with one seed:"
                    " where data lie and how they are loaded makes no other run; give each a seed, or each data set"
                    " a sweep.name, of its own"
                )
        _ = self.baseline_setting

    def joined(self, other: Sweep) -> Sweep:
        """This sweep, and after its own jobs those that only the other has."""
        mine = {job.folder for job in self.jobs}
        return replace(self, jobs=self.jobs + tuple(job for job in other.jobs if job.folder not in mine))

    def check_same(self, before: Sweep) -> None:
        """That this is the sweep that its folder holds, or a part of it, or more of it.

        Raises: ValueError when each has jobs that the other lacks.
        """
        mine, its = ({job.folder for job in sweep.jobs} for sweep in (self, before))
        if not (mine <= its or its <= mine):
            raise UserError(
                f"{shown(self.folder)} holds another sweep (its job {min(its - mine)} is none of this one): choose"
                " another sweep.name, or delete that folder"
            )


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder.

    Raises: ValueError, one line, when there is none or its ``sweep.json`` cannot be read or does not describe one.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise UserError(f"{shown(folder)} is no sweep: it holds no sweep.json; give a folder such as sweeps/NAME")
    values = read_object(path, "start the sweep again with the same name to write it anew")
    try:
        jobs = tuple(_job(job) for job in values["jobs"])
        name, command, metric = _texts([values["name"], values["command"], values["metric"]])
        baseline = None if values["baseline"] is None else _texts(values["baseline"])
        if not jobs:
            raise ValueError
        sweep = Sweep(folder, name, command, baseline, metric, jobs)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{shown(path)} does not describe a sweep: it must hold name, command, baseline (a list or null), metric"
            " and jobs, each with a folder's name and a list of overrides"
        ) from error
    sweep.check()
    return sweep


def _job(values: Any) -> Job:
    job = Job(**values)
    # one that lies nowhere but in the sweep's folder
    if not isinstance(job.folder, str) or job.folder in ("", ".", "..") or Path(job.folder).name != job.folder:
        raise ValueError
    return replace(job, overrides=_texts(job.overrides), arguments=_texts(job.arguments))


def _texts(values: Any) -> tuple[str, ...]:
    if not (isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)):
        raise TypeError
    return tuple(values)


def job_folder(overrides: Sequence[str], config: Mapping[str, Any]) -> str:
    """A job's folder: its overrides and a short hash of its config, in characters that need quotes nowhere.

    config: the whole, as plain values; where the job runs does not count.
    """
    counted = {key: value for key, value in config.items() if key not in _AROUND}
    for group in ("dataset", "datamodule"):
        of_group = counted.get(group) or {}
        counted[group] = {key: value for key, value in of_group.items() if not is_of_the_place(f"{group}.{key}")}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:8]
    readable = "_".join(re.sub(r"[^A-Za-z0-9_.]+", "-", override).strip("-") for override in overrides)[:120]
    return f"{readable or 'job'}_{digest}"
