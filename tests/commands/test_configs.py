"""Every config file composes, names what exists, and every experiment trains."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object, instantiate
from miniatures import make_ade20k, make_cityscapes, make_voc
from omegaconf import DictConfig, OmegaConf
from running import BARE, compose, make_camvid
from torch import nn

from segdcn.commands.configs import CONFIG_PATH
from segdcn.commands.train import train
from segdcn.models import deformable_layers
from segdcn.training.optim import parameter_groups

CONF = Path(CONFIG_PATH)
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "inference")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem != "none")
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def given(name: str, root: object) -> tuple[str, ...]:
    """What a recipe or a sweep must be told of its data set, which its name tells."""
    parts = name.split("_")
    roots = {"ade20k", "camvid", "voc", "coco", "cityscapes", "finetune"}
    where = (f"dataset.root={root}",) if roots & {*parts} else ()
    return (*where, f"dataset.sbd_root={root}") if "voc" in parts and "boxes" not in parts else where


# what a user must say; a name, since only a command knows which options were chosen
GIVEN = ("name=test", "output_dir=somewhere")
DETECTORS = ("faster_rcnn", "faster_rcnn_tiny", "rfcn", "rfcn_tiny", "class_aware_rpn")
REQUIRED = {
    "task=detection": ("model=faster_rcnn", "dataset=boxes", "experiment=none"),
    **{f"model={name}": ("dataset=boxes", "experiment=none") for name in DETECTORS},
    "dataset=ade20k": ("dataset.root=x",),
    "dataset=camvid": ("dataset.root=x",),
    "dataset=cityscapes": ("dataset.root=x",),
    "dataset=coco_boxes": ("dataset.root=x",),
    "dataset=folder": ("dataset.root=x",),
    "dataset=voc": ("dataset.root=x",),
    "dataset=voc_boxes": ("dataset.root=x",),
    "dataset=voc_aug": ("dataset.root=x", "dataset.sbd_root=x"),
    **{f"experiment={name}": given(name, "x") for name in EXPERIMENTS},
    **{f"sweep={name}": given(name, "x") for name in SWEEPS},
}

# Arguments that the program itself passes, not the config.
INJECTED = {
    "segdcn.models.build_deeplab": {"num_classes"},
    "segdcn.detection.build_detector": {"num_classes"},
    "segdcn.detection.DetectionDataModule": {"dataset"},
    "segdcn.detection.DetectionTask": {"network", "optimizer", "schedule", "class_names", "description"},
    "segdcn.data.SegmentationDataModule": {"dataset"},
    "segdcn.training.task.SegmentationTask": {"network", "loss", "optimizer", "schedule", "class_names", "description"},
    "pytorch_lightning.Trainer": {"callbacks", "logger"},
    "segdcn.training.optim.poly": {"optimizer", "total_steps"},
    "segdcn.training.optim.one_cycle": {"optimizer", "total_steps"},
    "segdcn.training.optim.step": {"optimizer", "total_steps"},
    "segdcn.training.optim.constant": {"optimizer", "total_steps"},
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
    names = ("train", "evaluate", "predict", "export", "analyze", "check", "convert")
    commands = {f"{folder}{name}.yaml" for folder in ("", "hydra/help/") for name in names}
    assert files == options | commands | {"inference/default.yaml", "hydra/sweeper/optuna.yaml"}
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


# The rows of the paper's tables, as published: mean IoU in percent on VOC and on Cityscapes
TABLE_1 = {0: (69.7, 70.4), 1: (73.9, 73.5), 2: (74.8, 74.4), 3: (75.2, 75.2), 6: (74.8, 75.1)}
TABLE_3 = {2: (69.7, 70.4), 4: (73.1, 71.9), 6: (73.6, 72.7), 8: (73.2, 72.4)}
ROWS = {
    f"{dataset}_{kind}{number}": {
        "paper_miou": figures[column],
        "model.deform.layers": number if kind == "deform" else 0,
        "model.fixed_dilation": number if kind == "atrous" else None,
    }
    for column, dataset in enumerate(("voc", "cityscapes"))
    for kind, table in (("deform", TABLE_1), ("atrous", TABLE_3))
    for number, figures in table.items()
}
SHARED = ("paper", "modern", "finetune")  # without data of their own: voc_*, cityscapes_* and tests below train them
SHARED += ("boxes_paper", "boxes_finetune")  # and those of detection/test_recipes.py, of boxes_voc_* and boxes_coco_*
TRAINED = [name for name in EXPERIMENTS if name not in ROWS and name not in SHARED]
TRAINED = [name for name in TRAINED if not name.startswith(("boxes_voc", "boxes_coco"))]


def experiment(name: str, *overrides: str) -> DictConfig:
    return compose("train", f"experiment={name}", *given(name, "x"), *GIVEN, *overrides)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, part in config.items() for key, value in flat(part, f"{prefix}.{name}").items()}


def values(config: DictConfig) -> dict[str, Any]:
    return {key[1:]: value for key, value in flat(OmegaConf.to_container(config)).items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_headed_by_its_command_and_its_result(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert f"#   segdcn-train experiment={name}" in text
    (result,) = [line for line in text.splitlines() if line.startswith("# Result:")]
    if name in ROWS:
        assert f"paper {ROWS[name]['paper_miou']}" in result
    for command in re.findall(r"#   segdcn-train ((?:.*\\\n# )*.*)", text):
        compose("train", *GIVEN, *command.replace("\\\n#", "").split())


@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_its_protocol_in_the_layers_alone(name: str) -> None:
    row, base = values(experiment(name)), values(experiment(f"{name.partition('_')[0]}_paper"))
    assert row.keys() == base.keys()
    assert {key: row[key] for key in ROWS[name]} == ROWS[name]
    assert {key for key in row if row[key] != base[key]} <= set(ROWS[name])


def network_of(name: str, *overrides: str) -> nn.Module:
    """The network of a recipe, without memory for its weights."""
    config = experiment(name, "model.weights=null", *overrides)
    with torch.device("meta"):
        return instantiate(config.model, num_classes=21, _convert_="all")


def test_deformable_rows_are_the_papers_layers() -> None:
    names = [f"backbone.layer3.{block}.conv2" for block in (20, 21, 22)]
    names += [f"backbone.layer4.{block}.conv2" for block in range(3)]
    for number in TABLE_1:
        layers = deformable_layers(network_of(f"voc_deform{number}"))
        assert list(layers) == names[len(names) - number :]
        for name, layer in layers.items():
            assert layer.dilation == ((2, 2) if "layer4" in name else (1, 1))
            assert layer.offset.dilation == layer.dilation
            assert (layer.offset_groups, layer.modulated) == (1, False)


@pytest.mark.parametrize("number", TABLE_3)
def test_atrous_rows_have_their_dilation_in_the_last_three_layers(number: int) -> None:
    network = network_of(f"cityscapes_atrous{number}")
    assert not deformable_layers(network)
    dilations = [m.dilation[0] for m in network.backbone.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
    assert dilations[-3:] == 3 * [number]
    assert [dilation for dilation in dilations if dilation > 1] == 3 * [number]
    if number == 2:  # table 3's first row is table 1's
        assert str(network) == str(network_of("cityscapes_deform0"))


def test_the_papers_network_learns_what_the_authors_code_does() -> None:
    network = network_of("voc_deform3")
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1.")) for name in learns)
    assert not any("bn" in name or "downsample.1" in name for name, _ in network.named_parameters())
    blocks = {"layer2": 4, "layer3": 23, "layer4": 3}
    expected = {f"backbone.{s}.{b}.conv{c}.weight" for s, n in blocks.items() for b in range(n) for c in (1, 2, 3)}
    expected |= {f"backbone.{stage}.0.downsample.0.weight" for stage in blocks}
    parts = ("weight", "bias")
    expected |= {f"backbone.layer4.{block}.conv2.offset.{part}" for block in range(3) for part in parts}
    expected |= {f"head.{layer}.{part}" for layer in ("fc6", "classifier") for part in parts}
    assert learns == expected
    assert network.head.fc6.out_channels == 1024


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("voc_paper", {0: 1e-3, 19_999: 1e-3, 20_000: 1e-4, 29_999: 1e-4}),
        ("cityscapes_paper", {0: 1e-4, 999: 1e-4, 1_000: 1e-3, 29_999: 1e-3, 30_000: 1e-4, 44_999: 1e-4}),
        ("voc_v3", {0: 0.007, 15_000: 0.007 * 0.5**0.9}),
        ("cityscapes_v3plus", {0: 0.007, 45_000: 0.007 * 0.5**0.9}),
        ("ade20k_upernet_internimage_t", {0: 6e-5 / 1501, 1_499: 6e-5 / 1501 * 1500, 80_000: 3e-5, 159_999: 3.75e-10}),
    ],
)
def test_learning_rates_at_points_of_a_recipe(name: str, rates: dict[int, float]) -> None:
    config = experiment(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    factor = instantiate(config.schedule)(optimizer, total_steps=config.trainer.max_steps).lr_lambdas[0]
    for step, rate in rates.items():
        assert config.optimizer.lr * factor(step) == pytest.approx(rate)


def test_upernets_optimizer_is_the_authors() -> None:
    config = experiment("ade20k_upernet_internimage_t")
    network = network_of("ade20k_upernet_internimage_t")
    groups = parameter_groups(network, *(config.task[key] for key in ("backbone_lr_mult", "offset_lr_mult")))
    optimizer = instantiate(config.optimizer)(groups)
    found = {id(p): (g["betas"], g["lr_mult"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        decay = 0.0 if parameter.ndim == 1 else 0.05
        assert found[id(parameter)] == ((0.9, 0.999), 1.0, decay), name


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(("voc", "cityscapes", "ade20k"))])
def test_every_step_has_its_images_and_the_last_one_is_validated(name: str) -> None:
    config = experiment(name)
    trainer, batch = config.trainer, config.datamodule.batch_size * config.trainer.accumulate_grad_batches
    assert batch == config.images_per_step == (16 if "_v3" in name or "_upernet" in name else 8)
    images = {"voc": 10_582, "cityscapes": 2_975, "ade20k": 20_210}[name.partition("_")[0]]
    assert trainer.limit_train_batches * config.datamodule.batch_size < images
    steps, rest = divmod(trainer.limit_train_batches, trainer.accumulate_grad_batches)
    assert rest == 0
    assert trainer.max_steps % (steps * trainer.check_val_every_n_epoch) == 0
    assert trainer.max_epochs == -1


# sweep: number of jobs
JOBS = {
    "default": 0,
    "table1_voc": 5,
    "table1_cityscapes": 5,
    "table3_voc": 5,
    "table3_cityscapes": 5,
    "modern_voc": 18,
    "modern_cityscapes": 18,
    "shapes_layers": 15,
    "shapes_atrous": 12,
    "camvid_layers": 12,
    "camvid_layers_long": 12,
    "boxes_pooling": 35,
}


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "shapes_optuna"])  # no grid
def test_a_sweep_has_the_jobs_that_its_header_names(name: str) -> None:
    """Split as Hydra's own sweeper does it, one setting the baseline; sweep/test_multirun.py composes the jobs."""
    common = [f"sweep={name}", *GIVEN, *REQUIRED[f"sweep={name}"]]
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        config = hydra.compose("train", common, return_hydra_config=True)
    assert set(config.sweep) == {"name", "baseline", "metric", "confirm"}
    swept = [f"{key}={choices}" for key, choices in (config.hydra.sweeper.params or {}).items()]
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept), None)[0] if swept else []
    assert len(jobs) == JOBS[name]
    if not jobs:
        assert config.hydra.mode is None
        return
    text = (CONF / "sweep" / f"{name}.yaml").read_text()
    assert f"#   segdcn-train sweep={name}" in text
    assert f"# {len(jobs)} jobs" in text
    assert config.sweep.name == name
    assert config.hydra.mode.name == "MULTIRUN"
    settings = [frozenset(o for o in job if not o.startswith("seed=")) for job in jobs]
    assert len({setting for setting in settings if set(config.sweep.baseline) <= setting}) == 1


MAKE = {"ade20k": make_ade20k, "camvid": make_camvid, "voc": make_voc, "cityscapes": make_cityscapes}


# many seconds for two steps, or a recipe much as another one
LARGE = {"camvid_cpu", "cityscapes_paper", "voc_paper", "cityscapes_v3", "voc_v3plus"}
LARGE |= {"cityscapes_upernet_internimage_t"}
LARGE |= {"shapes_atrous1", "shapes_atrous2", "camvid_atrous2", "camvid_deform0", "camvid_deform6", "camvid_gpu"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in TRAINED]
)
def test_every_experiment_trains_two_steps(name: str, tmp_path: Path) -> None:
    dataset, run = name.partition("_")[0], tmp_path / "run"
    if dataset in ("shapes", "boxes"):
        settings = ["dataset.train_images=4", "dataset.val_images=2", "datamodule.eval_batch_size=2"]
    else:
        train_split = {"voc": [f"2007_00000{number}" for number in range(4)]}.get(dataset, 4)
        root = MAKE[dataset](tmp_path / "data", train=train_split)
        settings = [f"dataset.root={root}", *(["dataset.sbd_root=null"] if dataset == "voc" else [])]
    chosen = experiment(name)
    if chosen.model.backbone != "mobilenet_v2":
        settings.append("model.backbone=resnet_tiny")
    if chosen.model.head == "upernet":
        settings.append("+model.head_channels=8")
    if chosen.datamodule.get("crop_size") is not None:
        settings.append("datamodule.crop_size=[64,96]")
    batch_size, accumulated = (1, 2) if chosen.trainer.accumulate_grad_batches > 1 else (2, 1)
    config = compose(
        "train",
        f"experiment={name}",
        *settings,
        "model.weights=null",
        f"datamodule.batch_size={batch_size}",
        "datamodule.num_workers=0",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=1",
        f"trainer.accumulate_grad_batches={accumulated}",
        f"trainer.limit_train_batches={2 * accumulated}",
        "name=test",
        f"output_dir={run}",
    )
    assert 0 <= train(config) <= 1
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "metrics.csv").read_text().splitlines()[1].startswith("0,2,")
    assert json.loads((run / "metrics.json").read_text())["protocol"] == chosen.get(
        "protocol", chosen.task.get("protocol")
    )
