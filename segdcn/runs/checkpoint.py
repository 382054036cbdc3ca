"""From a checkpoint to its data set, its network and its predictor: the one way of all commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segdcn.data import ADE20K, Cityscapes
from segdcn.data.dataset import voc_palette
from segdcn.data.transforms import EvalTransform
from segdcn.errors import UserError, one_line
from segdcn.inference.devices import find_device
from segdcn.inference.predictor import Predictor
from segdcn.inference.windows import Inference
from segdcn.models.contract import checked_module, giving_logits
from segdcn.models.published import from_mmsegmentation_upernet, upernet_settings
from segdcn.models.weights import NETWORK, DamagedFileError, misfit, read_saved
from segdcn.runs.files import typed
from segdcn.runs.folder import check_checkpoint, run_folder_of
from segdcn.runs.targets import build, check_targets

FORMAT = 2
"""Of the description that a checkpoint holds; a file of another one is refused."""
GROUPS = ("dataset", "datamodule", "model", "loss")
"""The parts of a config from which objects are built again; a checkpoint has them resolved."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``segdcn-train`` saved, read but not built.

    config: the run's, as it was composed, with its interpolations; for resuming and for what it tells.
    groups: ``GROUPS`` of it as plain values without interpolations. Of a training from Python, without a config, they
        hold no targets but a network's of ours.
    state_dict: of the run's task; the network's names begin with ``network.``.
    trust: whether targets of other packages may be called.
    """

    path: Path
    config: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]]
    state_dict: Mapping[str, Tensor] = field(repr=False)
    trust: bool = False

    @property
    def run(self) -> Path:
        """The run folder."""
        return run_folder_of(self.path)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    @property
    def channels_last(self) -> bool:
        """Whether the run's network had the channels of a pixel side by side in memory."""
        task = self.config.get("task")
        return isinstance(task, Mapping) and task.get("channels_last") is True

    def dataset(self, changes: Mapping[str, Any] | None = None) -> Any:
        """The data set of the run.

        changes: settings given anew, such as ``root``; None keeps one. A ``_target_`` among them is trusted.

        Raises: UserError, one line: a target that is not trusted, data that are not there, other classes.
        """
        dataset = build(self.dataset_settings(changes), self.path)
        names = [str(name) for name in dataset.class_names]
        if names != list(self.class_names):
            raise UserError(
                f"{self.path} was trained with the {len(self.class_names)} classes {', '.join(self.class_names)}, but"
                f" the data set has the {len(names)} classes {', '.join(names)}: give a checkpoint that was trained on"
                " it, or the data set's own classes"
            )
        return dataset

    def dataset_settings(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the data set is built from, see ``dataset``.

        Raises: UserError for a target that is not trusted.
        """
        given = {key: value for key, value in (changes or {}).items() if value is not None}
        saved = {key: value for key, value in self.groups["dataset"].items() if key not in given}
        self._check(saved, "dataset", named="_target_" in given)
        return {**saved, **given}

    def network(self, network: nn.Module | None = None) -> nn.Module:
        """The network, which gives logits; see ``module``."""
        return giving_logits(self.module(network))

    def module(self, network: nn.Module | None = None) -> nn.Module:
        """What was trained, with its weights and in the memory format of the run, in evaluation mode.

        network: built by the caller as it was for the training; None builds it from the checkpoint's settings.

        Raises: UserError, one line: a target that is not trusted, settings or weights that do not fit.
        """
        if network is None:
            self._check(self.groups["model"], "model")
            settings = without_pretrained(self.groups["model"])
            network = build(settings, self.path, num_classes=len(self.class_names))
        network = checked_module(network)
        weights = {
            key.removeprefix(NETWORK): value for key, value in self.state_dict.items() if key.startswith(NETWORK)
        }
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"{self.path} does not fit its network, the {type(network).__name__} that is built here:"
                f" {misfit(network.state_dict(), weights) or one_line(error)}"
                + ("" if self.config else "; segdcn.load(path, network=NETWORK) takes the one that was trained")
            ) from error
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        return network.eval()

    def predictor(
        self,
        device: torch.device,
        inference: Inference | None = None,
        max_pixels: int | None = None,
        network: nn.Module | None = None,
    ) -> Predictor:
        """The network with what an image needs before it; see ``load``."""
        data = self.groups["datamodule"]
        # our own recipes leave them at ImageNet's, which are the default
        colours = {key: data[key] for key in ("mean", "std") if data.get(key) is not None}
        try:
            transform = EvalTransform(**colours)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path} has colours to normalise by that cannot be used: {colours}") from error
        bits = self.groups["dataset"].get("bits")  # of ours; of a user's own data set it may mean anything
        return Predictor(
            self.network(network),
            self.class_names,
            self.palette,
            transform,
            inference,
            device,
            max_pixels,
            bits if type(bits) is int and 1 <= bits <= 16 else None,
        )

    def datamodule(self, dataset: Any, changes: Mapping[str, Any] | None = None) -> Any:
        """The batches of a data set as the run had them.

        changes: settings given anew; None keeps one.

        Raises: UserError for a target that is not trusted.
        """
        self._check(self.groups["datamodule"], "datamodule")
        given = {key: value for key, value in (changes or {}).items() if value is not None}
        return build({**self.groups["datamodule"], **given}, self.path, dataset=dataset)

    def loss(self) -> nn.Module:
        """The training loss, which an evaluation computes as well."""
        self._check(self.groups["loss"], "loss")
        loss: nn.Module = build(self.groups["loss"], self.path)
        return loss

    def _check(self, settings: Mapping[str, Any], group: str, named: bool = False) -> None:
        """That the settings of a group name what is to be built of them, and nothing that is not trusted."""
        if not self.trust:
            check_targets(settings, group, self.path)
        if not (named or "_target_" in settings):
            there = "segdcn.load(path, network=NETWORK) opens it" if group == "model" else "evaluate and continue it"
            raise UserError(
                f"{self.path} is of a training from Python and does not say how its {group} was built: {there} there"
            )


def read_checkpoint(path: Path, trust: bool = False) -> Checkpoint:
    """Read a checkpoint of ours, plain values and tensors only, or an UperNet of InternImage's authors.

    Raises: MissingFileError, or UserError when the file is damaged, not from segdcn or from another version of it; one
        line each.
    """
    check_checkpoint(path)
    try:
        content = read_saved(path)
    except DamagedFileError as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, truncated or no checkpoint"
            f" ({error}){_another(path)}"
        ) from error
    if isinstance(content, dict) and "segdcn" not in content and "decode_head.conv_seg.weight" in _tensors(content):
        return _published(path, content)
    if not isinstance(content, dict) or not isinstance(content.get("segdcn"), dict):
        raise UserError(f"{path} is not a segdcn checkpoint: it lacks the description of its run")
    description = content["segdcn"]
    if type(version := description.get("format", 1)) is not int or version != FORMAT:  # a tensor has no truth
        raise UserError(
            f"{path} was written by another version of segdcn, as checkpoints of format {str(version)[:20]}; this"
            f" one reads format {FORMAT}: use it with that version, or train again"
        )
    try:
        return Checkpoint(
            path,
            _of_texts(description["config"], "config"),
            {group: _of_texts(description["groups"][group], group) for group in GROUPS},
            _listed(description["class_names"], str, "class_names"),
            _listed(description["palette"], list, "palette"),
            _of_tensors(content["state_dict"]),
            trust,
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} lacks a part of the description of its run ({error}): it is damaged, or something else wrote it"
        ) from error


def _tensors(content: Mapping[str, Any]) -> Mapping[str, Any]:
    state = content.get("state_dict")
    return state if isinstance(state, Mapping) else content


def _published(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """A file that mmsegmentation wrote for an UperNet on InternImage, described as one of ours.

    Its classes are those that it names, else ADE20K's or Cityscapes' where there are as many.
    """
    tensors = _of_tensors(_tensors(content))
    try:
        settings = upernet_settings(tensors)
    except UserError as error:
        raise UserError(f"{path} is {error}, which is not known here") from None
    number = settings.pop("num_classes")
    known = next((each for each in (ADE20K, Cityscapes) if len(each.class_names) == number), None)
    meta = content.get("meta")
    named = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if isinstance(named, list | tuple) and len(named) == number:
        names = [str(name).strip() for name in named]
        known = known if known is not None and names == list(known.class_names) else None
    else:
        names = [str(name) for name in (known.class_names if known is not None else range(number))]
    palette = known.palette if known is not None else voc_palette(number)
    return Checkpoint(
        path,
        {},
        {
            "dataset": {} if known is None else {"_target_": f"segdcn.data.{known.__name__}"},
            "datamodule": {"_target_": "segdcn.data.SegmentationDataModule", "crop_size": [512, 512]},
            "model": {
                "_target_": "segdcn.models.build_deeplab",
                **settings,
                "deform": {"_target_": "segdcn.models.Deform", "layers": 0},
            },
            "loss": {"_target_": "segdcn.training.losses.SegmentationLoss"},
        },
        names,
        [list(colour) for colour in palette],
        {NETWORK + name: value for name, value in from_mmsegmentation_upernet(tensors).items()},
    )


def _of_texts(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name} is no mapping")
    return dict(values)


def _of_tensors(values: Any) -> dict[str, Tensor]:
    if not all(isinstance(value, Tensor) for value in _of_texts(values, "state_dict").values()):
        raise TypeError("state_dict holds more than tensors")
    return dict(values)


def _listed(values: Any, kind: type, name: str) -> list[Any]:
    if not isinstance(values, list | tuple) or not values or not all(isinstance(value, kind) for value in values):
        raise TypeError(f"{name} is no list of {kind.__name__}")
    return list(values)


def _another(path: Path) -> str:
    """What to resume from instead of a damaged last.ckpt."""
    best = path.with_name("best.ckpt")
    if path.name != "last.ckpt" or not best.is_file():
        return ""
    try:
        step = torch.load(best, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # damaged too
        return ""
    return f"; {typed(best, 'resume')} goes on from step {step}"


def without_pretrained(model: Mapping[str, Any]) -> dict[str, Any]:
    """A network's settings without those that fetch weights to begin with, by the names that are common for them.

    For a network whose weights are in a checkpoint: the file may not be here any more.
    """
    names = ("weights", "weights_backbone", "encoder_weights")
    empty = {name: None for name in names if isinstance(model.get(name), str)}
    return {**model, **empty, **({"pretrained": False} if model.get("pretrained") is True else {})}


def load(
    path: str | Path,
    device: str = "auto",
    inference: Inference | None = None,
    max_pixels: int | None = None,
    network: nn.Module | None = None,
    trust: bool = False,
) -> Predictor:
    """The network of a checkpoint, ready to predict: ``predictor = segdcn.load("best.ckpt"); predictor("a.jpg")``.

    Args:
        path: a checkpoint that ``segdcn-train`` or a training from Python wrote, or an UperNet file of InternImage's
            authors.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...
        inference, max_pixels: see ``Predictor``.
        network: for a checkpoint of a network of your own: the network, built as it was for the training. None builds
            what the checkpoint names, if it is segdcn's, torch's or torchvision's.
        trust: build it whatever it is: for a file whose origin you know, since it may name any function.

    Raises:
        FileNotFoundError, ValueError: one line; no such file, a damaged one, one that does not fit its network, or a
            device that is not there.
    """
    chosen = find_device(device)  # before anything is read
    return read_checkpoint(Path(path), trust).predictor(chosen, inference, max_pixels, network)
