"""Where the configs are, and what is asked of one before anything is built of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segdcn.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# a wheel carries the configs inside the package; in a checkout they lie beside it
CONFIG_PATH = str(next((folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()), ""))


def check_hydra_keys(hydra: HydraConf | DictConfig) -> None:
    """Refuse what Hydra's own keys could ask for and nothing here would do.

    Raises: UserError, one line.
    """
    if hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true is of no use: paths are of the folder where the command is started, and everything is"
            " written to output_dir"
        )


def plain(config: DictConfig) -> dict[str, Any]:
    """A group of the config as plain values."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def build_dataset(config: DictConfig) -> Any:
    """The data set that ``config.dataset`` names."""
    return instantiate(config.dataset, _convert_="all")
