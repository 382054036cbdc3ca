"""Hydra's side of a sweep: the jobs of a multirun, handed to segdcn.commands.multirun.

Hydra finds plugins in the namespace ``hydra_plugins`` alone, and imports all of it whenever it starts: hence small
files, with their imports where they are needed. (``from __future__ import annotations`` together with a dataclass would
break every Hydra program of the environment here.)
"""

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/launcher",
    name="segdcn",
    node={"_target_": "hydra_plugins.segdcn_launcher.SegdcnLauncher"},
    provider="segdcn",
)


class SegdcnLauncher(Launcher):
    """Every job of a multirun is a process of its own, ``python -m segdcn.commands.train``, run by ``launcher``."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from segdcn.commands.errors import one_line_errors
        from segdcn.commands.multirun import Multirun

        with one_line_errors():
            self._multirun = Multirun(hydra_context, config)
            if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
                # its grid is known before anything is written: Hydra's own records in the folder, to begin with
                self._multirun.check(self._multirun.grid())
            self._multirun.prepare()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from segdcn.commands.errors import one_line_errors

        with one_line_errors():
            return self._multirun.launch(job_overrides, first=initial_job_idx == 0)
