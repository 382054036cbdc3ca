"""Every config file composes, names what exists, and every experiment trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from miniatures import make_cityscapes, make_voc
from omegaconf import OmegaConf
from runs import BARE, compose, make_camvid

from segdcn.assembly import CONFIG_PATH
from segdcn.train import train

CONF = Path(CONFIG_PATH)
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name not in ("hydra", "help")
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# what a user must say; a name, since only a command knows which options were chosen
GIVEN = ("name=test", "output_dir=somewhere")
REQUIRED = {
    "dataset=camvid": ("dataset.root=x",),
    "dataset=cityscapes": ("dataset.root=x",),
    "dataset=folder": ("dataset.root=x", "dataset.class_names=[a,b]"),
    "dataset=voc": ("dataset.root=x",),
    **{f"experiment={name}": ("dataset.root=x",) for name in EXPERIMENTS},
}

# Arguments that the program itself passes, not the config.
INJECTED = {
    "segdcn.models.build_deeplab": {"num_classes"},
    "segdcn.data.SegmentationDataModule": {"dataset"},
    "segdcn.task.SegmentationTask": {"network", "loss", "optimizer", "schedule", "class_names", "description"},
    "pytorch_lightning.Trainer": {"callbacks", "logger"},
    "segdcn.optim.poly": {"optimizer", "total_steps"},
    "segdcn.optim.one_cycle": {"optimizer", "total_steps"},
    "segdcn.optim.constant": {"optimizer", "total_steps"},
    "torch.optim.SGD": {"params"},
    "torch.optim.AdamW": {"params"},
}


def targets(config: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a ``_target_``, at any depth."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        for value in config.values():
            yield from targets(value)


def assert_fits(config: dict[str, Any]) -> None:
    name = config["_target_"]
    parameters = dict(inspect.signature(get_object(name)).parameters)
    keys = {key for key in config if not key.startswith("_")}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = {key: parameter for key, parameter in parameters.items() if parameter.kind not in variadic}
    named = set(parameters)
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    injected = INJECTED.get(name, set())
    assert keys <= named, f"{name} does not know {keys - named}"
    assert injected <= named, f"{name} does not know {injected - named}"
    assert not keys & injected, f"{name} gets {keys & injected} from the program"
    assert required <= keys | injected, f"{name} needs {required - keys - injected}"


def test_every_file_is_an_option_or_a_command() -> None:
    files = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    options = {f"{option.replace('=', '/')}.yaml" for option in OPTIONS}
    commands = {f"{folder}{name}.yaml" for folder in ("", "hydra/help/") for name in ("train", "evaluate", "check")}
    assert files == options | commands
    assert len(OPTIONS) > 10


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_fits_what_it_names(option: str) -> None:
    config = compose("train", option, *GIVEN, *REQUIRED.get(option, ()))
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    found = list(targets(plain))
    for target in found:
        assert_fits(target)
    assert len(found) > 10


def test_evaluation_composes_and_fits_what_it_names() -> None:
    plain = OmegaConf.to_container(compose("evaluate", "checkpoint=x"), resolve=True, throw_on_missing=True)
    found = list(targets(plain))
    for target in found:
        assert_fits(target)
    assert len(found) == 4


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("dataset=")])
def test_check_composes_with_every_data_set(option: str) -> None:
    config = compose("check", option, *REQUIRED.get(option, ()))
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    (target,) = targets(plain)
    assert_fits(target)


@pytest.mark.parametrize(("name", "make"), [("voc", make_voc), ("cityscapes", make_cityscapes)])
def test_data_set_trains(name: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    settings = [setting for setting in BARE if not setting.startswith(("dataset.", "datamodule.eval"))]
    root, run = make(tmp_path / "data"), tmp_path / "run"
    config = compose(
        "train",
        f"dataset={name}",
        f"dataset.root={root}",
        *settings,
        "datamodule.batch_size=3",
        "datamodule.num_workers=0",
        "trainer.max_epochs=1",
        "name=test",
        f"output_dir={run}",
    )
    assert 0 <= train(config) <= 1
    assert (run / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_two_steps(name: str, tmp_path: Path) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert f"segdcn-train experiment={name}" in text
    assert "# Result:" in text
    root = make_camvid(tmp_path / "camvid", train=4, val=2)
    config = compose(
        "train",
        f"experiment={name}",
        f"dataset.root={root}",
        "model.weights=null",
        "datamodule.batch_size=2",
        "datamodule.crop_size=[64,96]",
        "datamodule.num_workers=0",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=1",
        f"output_dir={tmp_path / 'run'}",
    )
    assert 0 <= train(config) <= 1
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1].startswith("0,2,")
