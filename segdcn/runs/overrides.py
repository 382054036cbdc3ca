"""Overrides of a config, ``key=value`` as Hydra takes them: what they are of, and their values in quotes."""

from __future__ import annotations

import re

_PATHS = (
    "annotations",
    "checkpoint",
    "dir",
    "file",
    "folder",
    "image",
    "input",
    "output",
    "path",
    "picture",
    "resume",
    "root",
    "weights",
)
_PATH_ENDINGS = ("_dir", "_file", "_folder", "_path", "_root")
_LOADING = ("datamodule.num_workers", "datamodule.eval_batch_size")
# What was learned so far depends on all the rest; changes of it would be refused or silently lost in the middle of
# a run (the optimizer, for one, restores its learning rate).
_CHANGED_ON_RESUME = ("trainer.", "callbacks.", "logger.")
MAY_CHANGE_ON_RESUME = ", ".join(
    (
        *(f"{group}*" for group in _CHANGED_ON_RESUME),
        "report",
        *_LOADING,
        "and paths of the data set, such as dataset.root",
    )
)


def split_override(override: str) -> tuple[str, str, str]:
    """Key, "=" and value; Hydra's pluses, which say that the key may be new, left out."""
    return override.lstrip("+").partition("=")


def is_path(key: str) -> bool:
    """Whether a key holds a path, by its name: ``checkpoint``, ``dataset.root``, ``dataset.labels_dir``."""
    name = key.rpartition(".")[2]
    return name in _PATHS or name.endswith(_PATH_ENDINGS)


def is_of_the_place(key: str) -> bool:
    """Whether a key only says where a run finds its data and how it loads them: on another machine it is another."""
    return (key.startswith("dataset.") and is_path(key)) or key in _LOADING


def may_change_on_resume(key: str) -> bool:
    """Whether a resumed run takes another value of a key: ``MAY_CHANGE_ON_RESUME``."""
    return key.startswith(_CHANGED_ON_RESUME) or key == "report" or is_of_the_place(key)


def quoted(value: str) -> str:
    """A text as a value in Hydra's grammar, in which some characters mean something else."""
    # a backslash counts as one only before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"
