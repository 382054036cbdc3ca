"""Hydra's side of ``hydra/sweeper=optuna``, handed to segdcn.commands.search; imports as in segdcn_launcher.

hydra-optuna-sweeper, which bears the same name, was tried first (1.3.0): it needs an Optuna below 3, whose database
fails with today's SQLAlchemy, it neither prunes nor goes on with trials that were interrupted, and installing it
replaced Hydra by a pre-release. Where it is installed as well, Hydra refuses ``hydra/sweeper=optuna``, which is then
both a file of ours and its schema: ``pip uninstall hydra-optuna-sweeper``.
"""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Optuna chooses the settings of each job; for ``options`` see conf/hydra/sweeper/optuna.yaml."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from segdcn.commands.errors import one_line_errors
        from segdcn.errors import MissingPackageError

        with one_line_errors():
            try:
                import optuna  # noqa: F401
            except ImportError as error:
                raise MissingPackageError('hydra/sweeper=optuna needs Optuna: pip install -e ".[optuna]"') from error
            from segdcn.commands.search import Search

            self._search = Search(hydra_context, config, **self._options)

    def sweep(self, arguments: list[str]) -> None:
        from segdcn.commands.errors import one_line_errors

        with one_line_errors():
            self._search.run()
