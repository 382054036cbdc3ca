"""Which recipe a training follows, and what it is called by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segdcn.errors import UserError
from segdcn.runs.overrides import split_override

SHAPES = "shapes"
"""The data set that needs no files, and the recipe for it."""


def with_recipe(overrides: list[str]) -> list[str]:
    """Overrides of segdcn-train, before they are composed: where a data set is chosen, no recipe but a chosen one.

    The recipe that conf/train.yaml has is a toy's, for the data set shapes.
    """
    chosen = {key.lstrip("~"): value for key, _, value in map(split_override, overrides)}
    if chosen.get("dataset", SHAPES) == SHAPES or chosen.keys() & {"experiment", "sweep"}:
        return overrides
    place = 1 + max(n for n, override in enumerate(overrides) if split_override(override)[0] == "dataset")
    return [*overrides[:place], "experiment=none", *overrides[place:]]  # after a flag it would be none of the overrides


def run_name(choices: Mapping[str, Any], overrides: list[str]) -> str:
    """What to call a run: as its recipe, or data set; both where another data set than the recipe's own is named.

    choices: the option of each group, as Hydra composed them.

    Raises: UserError for the toy's recipe on other data, which a sweep's file could ask for.
    """
    recipe, dataset = choices.get("experiment"), str(choices.get("dataset"))
    chosen = {split_override(override)[0] for override in overrides}
    if recipe == SHAPES and dataset != SHAPES and "experiment" not in chosen:
        raise UserError(
            f"dataset={dataset} would be trained by the recipe {SHAPES}: add experiment=NAME, or experiment=none for"
            " the settings of conf/train.yaml"
        )
    if recipe in (None, "none"):
        return dataset
    return f"{dataset}_{recipe}" if "dataset" in chosen and not recipe.startswith(dataset) else str(recipe)
