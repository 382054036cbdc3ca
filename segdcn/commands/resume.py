"""The config of a run that goes on."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segdcn.errors import UserError
from segdcn.runs.checkpoint import GROUPS, read_checkpoint
from segdcn.runs.folder import find_checkpoint
from segdcn.runs.overrides import MAY_CHANGE_ON_RESUME, may_change_on_resume, split_override
from segdcn.runs.targets import check_interpolations, check_targets


def resumed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config of the run that ``config.resume`` names, from its checkpoint, with this command's overrides.

    Raises: UserError for an override that a resumed run cannot follow, and for targets that are not trusted.
    """
    path = find_checkpoint(config.resume)
    checkpoint = read_checkpoint(path)
    if not checkpoint.config:
        raise UserError(
            f"{path} is of a training from Python: continue it there, with trainer.fit(..., ckpt_path=PATH)"
        )
    if not config.trust:
        check_targets(checkpoint.config, "config", path)
        check_interpolations(checkpoint.config, path)
    saved = OmegaConf.create(dict(checkpoint.config))
    for group in (*GROUPS, "task", "optimizer", "schedule", "trainer", "callbacks", "logger"):
        if not (saved.get(group) is None or OmegaConf.is_dict(saved[group])):
            raise UserError(f"{path} cannot be continued: {group} in the config of its run is no mapping of settings")
    OmegaConf.set_struct(saved, True)
    parser = OverridesParser.create()
    for override in overrides:
        key = split_override(override.lstrip("~"))[0]
        if key in ("resume", "trust") or key.startswith("hydra."):
            continue
        if not may_change_on_resume(key):
            raise UserError(
                f"{override} cannot be changed when a run is resumed, only {MAY_CHANGE_ON_RESUME};"
                " a new run starts from its weights with model.weights=PATH"
            )
        # null leaves a callback out; a new key is a callback's or the trainer's
        value = None if override.startswith("~") else parser.parse_override(override).value()
        try:
            OmegaConf.update(saved, key, value, force_add=not key.startswith(("dataset.", "datamodule.")))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{override.lstrip('+')} does not fit the config of {path}: {reason}") from error
    saved.resume, saved.trust = str(path), config.trust
    return saved
