"""Every command that stands in a config, a help text or the docs can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.errors import HydraException
from named_commands import assert_composes, commands_in
from omegaconf.errors import OmegaConfBaseException
from running import compose

from segdcn.commands.configs import CONFIG_PATH

ROOT, CONF = Path(__file__).parents[1], Path(CONFIG_PATH)
TEXTS = [*CONF.rglob("*.yaml"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
COMMANDS = sorted({command for path in TEXTS for command in commands_in(path.read_text(encoding="utf-8"))})


def test_commands_are_found_wherever_they_stand() -> None:
    text = """
# segdcn-predict: no command, prose on segdcn-train; `segdcn-train a=b …` is a pattern
# segdcn-data check: no command either
# on GPUs: segdcn-train trainer=ddp
#   segdcn-train experiment=a \\
#       dataset.root=b
  segdcn-evaluate split=test      explained, see segdcn-predict
$ pip install . && segdcn-train
`segdcn-sweep status x` and `other code` of segdcn-report
```bash
segdcn-train c=1 && segdcn-export d=2
```
"""
    assert commands_in(text) == [
        "segdcn-evaluate split=test",
        "segdcn-export d=2",
        "segdcn-sweep status x",
        "segdcn-train",
        "segdcn-train c=1",
        "segdcn-train experiment=a dataset.root=b",
        "segdcn-train trainer=ddp",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "segdcn-trane",
        "segdcn-train model.depth=3",
        "segdcn-train dataset=voc",  # without a root
        "segdcn-train -m model.deform.layer=0,3",
        "segdcn-train --verbose",
        "segdcn-data dataset=voc",
        "segdcn-predict checkpoint=x input=y",
        "segdcn-report --page x",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, HydraException, OmegaConfBaseException, SystemExit)):
        assert_composes(command)


def test_many_commands_are_named() -> None:
    programs = {command.split()[0] for command in COMMANDS}
    assert len(programs) == 9
    assert len(COMMANDS) > 80


# what a user's own config adds is tried in tests/data/test_own_dataset.py and tests/commands/test_own_network.py
@pytest.mark.parametrize("command", [command for command in COMMANDS if "--config-dir" not in command])
def test_command_composes(command: str) -> None:
    assert_composes(command)


HINTS = [
    (path.stem, found)
    for path in sorted((CONF / "experiment").glob("*.yaml"))
    for found in re.findall(r"^#.*devices.*: (trainer[.=].*)$", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("recipe", "overrides"), HINTS)
def test_a_recipe_on_several_devices_sees_its_images_per_step(recipe: str, overrides: str) -> None:
    (first, *_) = [c for c in commands_in((CONF / "experiment" / f"{recipe}.yaml").read_text()) if recipe in c]
    one = compose("train", "name=test", "output_dir=x", *first.split()[1:])
    many = compose("train", "name=test", "output_dir=x", *first.split()[1:], *overrides.split())
    for config in (one, many):
        images = config.datamodule.batch_size * config.trainer.devices * config.trainer.accumulate_grad_batches
        assert images == config.images_per_step
    # and as many steps between two validations
    if one.trainer.limit_train_batches is not None:
        steps = [c.trainer.limit_train_batches / c.trainer.accumulate_grad_batches for c in (one, many)]
        assert steps[0] == steps[1]
