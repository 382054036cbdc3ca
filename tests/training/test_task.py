"""SegmentationTask: what learns how fast, which loss is minimised, and which figures come out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from segdcn.models import Deform, build_deeplab
from segdcn.training.averaging import AveragedWeights
from segdcn.training.offset_health import OffsetHealth, TrainingStopped
from segdcn.training.optim import constant, one_cycle, parameter_groups, poly
from segdcn.training.optim import step as step_schedule
from segdcn.training.signals import StopOnSignal
from segdcn.training.task import SegmentationTask

# Parameter groups


@pytest.mark.parametrize("deform", [Deform(0), Deform(3), Deform(2, modulated=True, offset_groups=2)])
def test_each_parameter_learns_by_its_role(deform: Deform) -> None:
    network = build_deeplab(
        6, "resnet_tiny", "paper", 16, weights=None, deform=deform, head_channels=16, auxiliary=True
    )
    groups = parameter_groups(network, backbone_lr_mult=0.3, offset_lr_mult=0.01)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=0.5)
    settings_of = {id(p): (g["lr_mult"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        if ".offset." in name:
            expected = (0.01, 0.0)
        else:
            norm_or_bias = name.endswith(".bias") or parameter.ndim == 1
            expected = (0.3 if name.startswith("backbone.") else 1.0, 0.0 if norm_or_bias else 0.5)
        assert settings_of[id(parameter)] == expected, name
    assert len({group["name"] for group in groups}) == len(groups) == (5 if deform.layers else 4)


def test_frozen_parameters_are_in_no_group() -> None:
    network = build_deeplab(6, "resnet_tiny", "paper", 16, weights=None, deform=Deform(3), head_channels=16)
    network.backbone.requires_grad_(False)
    assert {group["name"] for group in parameter_groups(network)} == {"head", "head_no_decay"}


# Schedules


def learning_rates(schedule: Callable[..., LRScheduler], steps: int, **options: Any) -> list[tuple[float, ...]]:
    """Of two groups with rates 1 and 0.1, for each step, and after the last."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = schedule(optimizer, total_steps=steps, **options)
    rates = []
    for _ in range(steps):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    return [*rates, tuple(group["lr"] for group in optimizer.param_groups)]


@settings(max_examples=20)
@given(steps=st.integers(1, 30), power=st.floats(0.5, 2))
def test_poly(steps: int, power: float) -> None:
    for step, rates in enumerate(learning_rates(poly, steps, power=power)):
        expected = (1 - step / steps) ** power
        assert rates == pytest.approx((expected, 0.1 * expected))


def test_poly_warms_up() -> None:
    rates = [rate for rate, _ in learning_rates(poly, 20, power=1.0, warmup_steps=4)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([1 - step / 20 for step in range(4, 21)])


@settings(max_examples=20)
@given(steps=st.integers(10, 60), share=st.floats(0.2, 0.6))
def test_one_cycle_is_the_curve_of_torch(steps: int, share: float) -> None:
    def of_torch(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, [1.0, 0.1], total_steps, pct_start=share, cycle_momentum=False)

    ours = learning_rates(one_cycle, steps, warmup_share=share)
    expected = learning_rates(of_torch, steps)
    for rates, torchs in zip(ours[:-1], expected[:-1], strict=True):
        assert rates == pytest.approx(torchs, abs=1e-12)
    assert max(ours)[0] == pytest.approx(1.0, abs=0.05)
    assert ours[-2] == pytest.approx((4e-6, 4e-7))
    assert ours[-1] == ours[-2]  # stepped once more after the last batch


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_one_cycle_of_very_few_steps(steps: int) -> None:
    rates = [rate for rate, _ in learning_rates(one_cycle, steps)]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_one_cycle_refuses_a_warm_up_that_leaves_no_way_down(share: float) -> None:
    with pytest.raises(ValueError, match="warmup_share"):
        learning_rates(one_cycle, 10, warmup_share=share)


def test_step_is_the_papers_schedule() -> None:
    rates = [rate for rate, _ in learning_rates(step_schedule, 30, drops=[0.66667])]
    assert rates == pytest.approx(20 * [1.0] + 11 * [0.1])
    long = step_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 30_000, drops=[0.66667]).lr_lambdas[0]
    assert (long(19_999), long(20_000)) == (1.0, 0.1)  # the share of the config file is two thirds


def test_step_with_warm_up_and_several_drops() -> None:
    settings = {"drops": (0.5, 0.8), "factor": 0.5, "warmup_steps": 3, "warmup_factor": 0.2}
    rates = learning_rates(step_schedule, 10, **settings)
    expected = 3 * [0.2] + 2 * [1.0] + 3 * [0.5] + 3 * [0.25]
    for pair, rate in zip(rates, expected, strict=True):
        assert pair == pytest.approx((rate, 0.1 * rate))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"drops": [20_000]}, "schedule.drops"),
        ({"drops": [0.0]}, "schedule.drops"),
        ({"factor": 0.0}, "schedule.factor"),
        ({"warmup_factor": -1.0}, "schedule.warmup_factor"),
        ({"warmup_steps": -1}, "schedule.warmup_steps"),
    ],
)
def test_step_refuses_what_is_no_schedule(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        learning_rates(step_schedule, 10, **options)


def test_constant() -> None:
    assert set(learning_rates(constant, 5)) == {(1.0, 0.1)}


# The task in a trainer


class Pixelwise(nn.Module):
    """Logits (N, 3, H, W) from each pixel alone, and auxiliary logits from a convolution of their own."""

    def __init__(self, auxiliary: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 3, 1)
        self.auxiliary = nn.Conv2d(3, 3, 1) if auxiliary else None

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(image))
        return logits

    def training_logits(self, image: Tensor) -> list[Tensor]:
        return [self(image)] + ([] if self.auxiliary is None else [self.auxiliary(image)])


class FirstChannel(nn.Module):
    """Predicts the class that the image's first channel names."""

    def forward(self, image: Tensor) -> Tensor:
        return F.one_hot(image[:, 0].long(), 3).permute(0, 3, 1, 2).float()


def make_task(network: nn.Module, lr: float = 0.1, **options: Any) -> SegmentationTask:
    optimizer = functools.partial(torch.optim.SGD, lr=lr)
    schedule = options.pop("schedule", constant)
    return SegmentationTask(network, ["a", "b", "c"], optimizer=optimizer, schedule=schedule, **options)


def make_trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(batches: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def batch(seed: int, size: tuple[int, int], count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 3, *size, generator=generator)
    label = torch.randint(0, 3, (count, *size), generator=generator)
    return {"image": image, "label": label, "name": ["x"] * count}


@pytest.mark.parametrize("weight", [0.4, 0.0])
def test_auxiliary_loss_counts_with_its_weight(weight: float) -> None:
    task, data = make_task(Pixelwise(auxiliary=True), lr=0.0, auxiliary_weight=weight), batch(0, (4, 5))
    trainer = make_trainer(max_steps=1)
    trainer.fit(task, loader([data]))
    logits, auxiliary = task.train().network.training_logits(data["image"])
    expected = F.cross_entropy(logits, data["label"]) + weight * F.cross_entropy(auxiliary, data["label"])
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected.item(), rel=1e-6)


def test_channels_last_is_another_memory_format_of_the_same_training() -> None:
    trained, seen = [], []
    for channels_last in (False, True):
        torch.manual_seed(0)
        network = build_deeplab(3, "resnet_tiny", "fpn", 32, weights=None, deform=Deform(1))
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        task = make_task(network, lr=0.01, channels_last=channels_last)
        data = loader([batch(seed, (64, 96)) for seed in range(3)])
        trainer = make_trainer(max_epochs=1)
        trainer.fit(task, data, loader([batch(3, (64, 96))]))
        trained.append(trainer.callback_metrics)
    convolution = task.network.backbone.conv1.weight
    for tensor in (convolution, seen[-1]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    for name in ("train/loss", "val/loss"):
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-3, atol=0)


class Watched(TorchDispatchMode):
    """The names of operators as they are called, in a list for each step; what comes before is in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = [[]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps[-1].append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_no_number_before_its_backward_pass_is_queued(tmp_path: Path) -> None:
    """On a GPU whoever reads a number waits for it: then only for the forward pass, while the backward pass runs."""
    watched = Watched()
    network = build_deeplab(3, "resnet_tiny", "fpn", 32, weights=None, deform=Deform(1))
    network.register_forward_pre_hook(lambda module, inputs: watched.steps.append([]))
    network.training_logits = lambda image: [network(image)]
    task = make_task(network, lr=0.01)
    trainer = make_trainer(max_epochs=1, callbacks=[AveragedWeights(), OffsetHealth(), StopOnSignal(tmp_path / "a")])
    with watched:
        trainer.fit(task, loader([batch(seed, (64, 96)) for seed in range(5)]))
    assert len(watched.steps) == 1 + 5
    for step in watched.steps[2:-1]:
        assert step.count("_local_scalar_dense") == 1
        backward = len(step) - step[::-1].index("convolution_backward")
        assert step.index("_local_scalar_dense") >= backward


@pytest.mark.parametrize(
    ("gradients", "precision"), [("loss", "32-true"), ("loss", "bf16-mixed"), ("accumulated", "32-true")]
)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(gradients: str, precision: Any) -> None:
    task = make_task(Pixelwise(), lr=0.1)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    bad = batch(1, (4, 5))
    bad["image"][0, 0, 0, 0] = math.nan
    batches = [bad] if gradients == "loss" else [bad, batch(0, (4, 5))]
    options = {"accumulate_grad_batches": len(batches), "precision": precision}
    trainer = make_trainer(max_epochs=1, callbacks=[OffsetHealth()], **options)
    with pytest.raises(TrainingStopped, match=r"^the loss is nan at step 0: "):
        trainer.fit(task, loader(batches))
    assert all(torch.equal(one, other) for one, other in zip(before, task.parameters(), strict=True))


def test_a_compiled_training_is_the_same_training_of_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # "aot_eager": the graphs of forward and backward as torch.compile makes them, without a C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    trained, names = [], []
    for compile in (False, True):
        torch.manual_seed(0)
        task = make_task(
            build_deeplab(3, "resnet_tiny", "fpn", 32, weights=None, deform=Deform(1)), lr=0.01, compile=compile
        )
        trainer = make_trainer(max_epochs=1)
        trainer.fit(task, loader([batch(seed, (64, 96)) for seed in range(2)]), loader([batch(3, (64, 96))]))
        trained.append(trainer.callback_metrics)
        names.append(list(task.state_dict()))
    assert names[0] == names[1]
    for name in ("train/loss", "val/loss"):
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-4, atol=0)


def test_validation_figures_come_from_all_pixels_at_once() -> None:
    """Images of two sizes, ignored pixels, and a class (c) that nobody has: all figures counted by hand."""
    first = {"prediction": [[0, 0, 1]], "label": [[0, 1, 1]]}
    second = {"prediction": [[0, 1], [1, 1]], "label": [[0, 0], [255, 255]]}
    batches = []
    for image in (first, second):
        prediction = torch.tensor([image["prediction"]])[:, None].float()
        label = torch.tensor([image["label"]])
        batches.append({"image": prediction.expand(-1, 3, -1, -1), "label": label, "name": ["a"]})
    (figures,) = make_trainer().validate(make_task(FirstChannel()), loader(batches), verbose=False)
    # where the truth is a, the prediction is a a b; where it is b, a b
    assert figures["val/iou/a"] == pytest.approx(2 / 4)
    assert figures["val/iou/b"] == pytest.approx(1 / 3)
    assert torch.tensor(figures["val/iou/c"]).isnan()
    assert figures["val/miou"] == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert figures["val/pixel_accuracy"] == pytest.approx(3 / 5)
    right, wrong = (float(F.cross_entropy(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(k))) for k in (0, 1))
    assert figures["val/loss"] == pytest.approx((3 * right + 2 * wrong) / 5)
    (test_figures,) = make_trainer().test(make_task(FirstChannel()), loader(batches), verbose=False)
    assert {key.replace("test/", "val/") for key in test_figures} == figures.keys()


def test_batch_without_a_label_changes_nothing() -> None:
    task, data = make_task(Pixelwise()), batch(0, (4, 5))
    data["label"].fill_(255)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    trainer = make_trainer(max_steps=1)
    trainer.fit(task, loader([data]))
    assert float(trainer.callback_metrics["train/loss"]) == 0.0
    assert all(torch.equal(one, other) for one, other in zip(before, task.parameters(), strict=True))


def test_learning_rates_follow_role_and_iteration() -> None:
    seen = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    task = make_task(Pixelwise(), lr=0.5, schedule=functools.partial(poly, power=0.9), backbone_lr_mult=0.1)
    make_trainer(max_epochs=2, callbacks=[Recorder()]).fit(task, loader([batch(k, (4, 5)) for k in range(3)]))
    for step, rates in enumerate(seen, start=1):  # the rates of the step that follows
        factor = (1 - step / 6) ** 0.9
        assert rates["head"] == pytest.approx(0.5 * factor, abs=1e-12)
        assert rates["backbone"] == pytest.approx(0.05 * factor, abs=1e-12)
    assert len(seen) == 6


def test_train_loss_is_the_mean_over_the_images_of_an_epoch() -> None:
    task = make_task(Pixelwise(), lr=0.0)
    batches = [batch(0, (4, 5), count=4), batch(1, (4, 5), count=2)]
    trainer = make_trainer(max_epochs=2)
    trainer.fit(task, loader(batches))
    task.train()
    with torch.no_grad():
        losses = [float(F.cross_entropy(task.network(data["image"]), data["label"])) for data in batches]
    expected = (4 * losses[0] + 2 * losses[1]) / 6
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-5)
