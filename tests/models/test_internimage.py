"""InternImage and UperNet against what the authors' own code gave, and against the published sizes."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segdcn
from segdcn.models import Deform, Features, UPerHead, build_backbone, build_deeplab, from_mmsegmentation_upernet
from segdcn.models.cost import network_cost
from segdcn.models.internimage import VARIANTS, InternImage
from segdcn.ops import DCNv3, DCNv4

# Mean, standard deviation and one value of each stage's map, from the authors' code: docs/internimage.md says how.
AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "authors_internimage.json").read_text())

SMALL: dict[str, Any] = {"channels": 32, "depths": (1, 1, 3, 1), "groups": (2, 4, 8, 16)}
CASES = {
    "internimage_t": VARIANTS["internimage_t"],
    "small t": dataclasses.replace(VARIANTS["internimage_t"], **SMALL),
    "small b": dataclasses.replace(VARIANTS["internimage_b"], **SMALL),
    "small l": dataclasses.replace(VARIANTS["internimage_l"], **SMALL),
    "small h": dataclasses.replace(VARIANTS["internimage_h"], **SMALL, norms_within=(0, 2)),
}
FLASH = {name: variant for name, variant in VARIANTS.items() if variant.flash}


def fill(module: nn.Module) -> None:
    """Give a network values that hang on the names of its tensors alone, so that the authors' has the same."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape)
            scale = 0.3 / max(1, np.sqrt(tensor[0].numel())) if tensor.ndim > 1 else 0.1
            factor = (name.endswith("weight") and tensor.ndim == 1) or "gamma" in name or "running_var" in name
            values = abs(values) if "running_var" in name else values
            tensor.copy_(torch.from_numpy(float(factor) + scale * values))


def image(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, height, width)))


@pytest.mark.parametrize("case", AUTHORS["stages"])
def test_each_stage_is_the_authors(case: str) -> None:
    name, _, size = case.rpartition(" ")
    network = InternImage(CASES[name]).eval()
    fill(network)
    with torch.no_grad():
        maps = network.double()(image(*map(int, size.split("x"))))
    ours = [[m.mean().item(), m.std().item(), m[0, 1, 1, 1].item()] for m in maps]
    assert np.allclose(ours, AUTHORS["stages"][case], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as InternImage's authors publish their UperNets, with the values of ``fill``."""
    ours = build_deeplab(150, "internimage_t", "upernet", None, weights=None, deform=Deform(0), auxiliary=True)
    inverse = {new: old for old, new in names_of_mmsegmentation(ours).items()}
    theirs = nn.Module()
    for name, tensor in ours.state_dict().items():
        module = theirs
        *parts, last = inverse[name].split(".")
        for part in parts:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor.clone())
    fill(theirs)
    state = theirs.state_dict()
    assert {"decode_head.psp_modules.3.1.conv.weight", "auxiliary_head.convs.0.bn.running_var"} <= state.keys()
    file = tmp_path_factory.mktemp("published") / "upernet_internimage_t_512_160k_ade20k.pth"
    torch.save({"meta": {"epoch": 127, "config": "text"}, "state_dict": state}, file)
    return file


def test_a_published_upernet_gives_the_authors_logits(published: Path) -> None:
    network = build_deeplab(
        150, "internimage_t", "upernet", None, weights=str(published), deform=Deform(0), auxiliary=True
    )
    for size, expected in AUTHORS["upernet"].items():
        with torch.no_grad():
            logits = network.eval().training_logits(image(*map(int, size.split("x"))).float())
        found = [[t.mean().item(), t.std().item(), t[0, 1, 1, 1].item(), t[0, -1, -1, -1].item()] for t in logits]
        assert np.allclose(found, expected, rtol=0, atol=1e-5), size


def test_a_published_upernet_is_opened_as_it_is(published: Path, tmp_path: Path) -> None:
    predictor = segdcn.load(published, device="cpu")
    assert (predictor.class_names[0], predictor.class_names[149]) == ("wall", "flag")  # ADE20K's, which has 150
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    prediction = predictor(pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    network = build_deeplab(
        150, "internimage_t", "upernet", None, weights=str(published), deform=Deform(0), auxiliary=True
    )
    with torch.no_grad():
        logits = network.eval()(((torch.from_numpy(pixels).permute(2, 0, 1) - mean) / std)[None])
    assert (torch.from_numpy(prediction.labels) == logits.argmax(1)[0]).float().mean() > 0.999

    content = torch.load(published, weights_only=True)
    content["meta"]["CLASSES"] = [f"thing {number}" for number in range(150)]
    torch.save(content, tmp_path / "mine.pth")
    assert segdcn.load(tmp_path / "mine.pth", device="cpu").class_names[2] == "thing 2"
    content["state_dict"]["backbone.patch_embed.conv2.weight"] = torch.zeros(7, 32, 3, 3)
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is an UperNet whose backbone is none of internimage_t, "):
        segdcn.load(tmp_path / "other.pth", device="cpu")


def names_of_mmsegmentation(network: nn.Module) -> dict[str, str]:
    """Published name -> ours, for all tensors of an UperNet, by hand."""
    published = {}
    for name in network.state_dict():
        other = name
        for ours, theirs in (
            ("head.pyramid", "decode_head.psp_modules"),
            ("head.context", "decode_head.bottleneck"),
            ("head.lateral", "decode_head.lateral_convs"),
            ("head.smooth", "decode_head.fpn_convs"),
            ("head.fuse", "decode_head.fpn_bottleneck"),
            ("head.classifier.1", "decode_head.conv_seg"),
            ("auxiliary.0", "auxiliary_head.convs.0"),
            ("auxiliary.2", "auxiliary_head.conv_seg"),
        ):
            if name.startswith(ours):
                other = theirs + name.removeprefix(ours)
                if not theirs.endswith("conv_seg"):
                    *front, number, last = other.split(".")
                    other = ".".join((*front, {"0": "conv", "1": "bn"}[number], last))
        published[other] = name
    return published


def test_a_name_that_no_upernet_has_is_refused() -> None:
    network = build_deeplab(3, "resnet_tiny", "upernet", weights=None, deform=Deform(0), head_channels=8)
    state = {published: network.state_dict()[ours] for published, ours in names_of_mmsegmentation(network).items()}
    assert from_mmsegmentation_upernet(state).keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match=r"'decode_head\.kernel_update\.weight' is not a name in mmsegmentation's"):
        from_mmsegmentation_upernet({**state, "decode_head.kernel_update.weight": torch.zeros(1)})


# millions of parameters of the backbone with its classifier of 1,000 classes, as the authors state them
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("internimage_t", 30),
        ("internimage_s", 50),
        ("internimage_b", 97),
        ("internimage_l", 223),
        ("internimage_xl", 335),
        ("flash_internimage_t", 30),
        ("flash_internimage_s", 50),
        ("flash_internimage_b", 97),
        ("flash_internimage_l", 223),
    ],
)
def test_a_network_has_the_published_size(name: str, published: int) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_backbone(name, 32).parameters()) / 1e6
    assert published * 0.945 < parameters < published + 0.5  # without the classifier


def test_upernet_has_the_published_size_and_cost() -> None:
    with torch.device("meta"):
        network = build_deeplab(150, "internimage_t", "upernet", None, weights=None, deform=Deform(0), auxiliary=True)
    cost = network_cost(network, (512, 2048))
    assert cost["parameters"] / 1e6 == pytest.approx(59, abs=0.5)
    assert cost["flops"] / 2e9 == pytest.approx(944, rel=0.01)  # published: multiply-adds


@pytest.mark.parametrize("name", FLASH)
def test_flash_blocks_are_of_dcnv4(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, 32)
    layers = [module for module in backbone.modules() if isinstance(module, DCNv3 | DCNv4)]
    assert len(layers) == sum(FLASH[name].depths)
    assert all(isinstance(layer, DCNv4) and layer.channels // layer.group == 16 for layer in layers)


@pytest.mark.parametrize("name", ["internimage_t", "flash_internimage_s"])
def test_a_small_network_learns_in_training_mode(name: str) -> None:
    torch.manual_seed(0)
    backbone = InternImage(dataclasses.replace(VARIANTS[name], **SMALL))
    head = UPerHead((32, 64, 128, 256), 2, channels=16)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
    x = torch.randn(2, 3, 64, 64)
    label = (x[:, 0, ::4, ::4] > 0).long()
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(head(backbone(x)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    moved = [m for m in backbone.modules() if isinstance(m, DCNv3 | DCNv4)]
    assert all((m.offset if isinstance(m, DCNv3) else m.offset_mask).weight.any() for m in moved)


def test_all_maps_have_their_say_in_upernet() -> None:
    head = UPerHead((4, 5, 6, 7), 3, channels=8).eval()
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    features = Features(*(torch.randn(2, c, h, w) for c, (h, w) in zip((4, 5, 6, 7), sizes, strict=True)))
    logits = head(features)
    assert logits.shape == (2, 3, 16, 24)
    for name in Features._fields:
        changed = features._replace(**{name: getattr(features, name) + 1})
        assert (head(changed) - logits).abs().max() > 0, name


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 6), (7, 13)])
def test_the_context_is_adaptive_average_pooling(size: tuple[int, int]) -> None:
    head, x = UPerHead((4, 5, 6, 7), 3, channels=8), torch.randn(2, 7, *size)
    for side, branch in zip((1, 2, 3, 6), head.pyramid, strict=True):
        torch.testing.assert_close(branch[0](x), F.adaptive_avg_pool2d(x, side))


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="InternImage has output stride 32 alone, got 16"):
        build_backbone("internimage_t", 16)
    with pytest.raises(ValueError, match=r"samples where it predicts in every layer: set model\.deform\.layers=0"):
        build_deeplab(3, "internimage_t", "upernet", None, weights=None)
    with pytest.raises(ValueError, match=r"set model\.weights to the authors' file"):
        build_backbone("internimage_t", 32, "imagenet")
    with pytest.raises(ValueError, match="cannot train on a batch of one image"):
        UPerHead((4, 5, 6, 7), 3, channels=8)(Features(*(torch.randn(1, c, 8, 8) for c in (4, 5, 6, 7))))


def test_a_file_of_the_authors_classification_network_loads_without_its_classifier(tmp_path: Path) -> None:
    backbone = InternImage(VARIANTS["internimage_t"])
    fill(backbone)
    extra = {"head.weight": torch.zeros(1000, 768), "conv_head.0.weight": torch.zeros(768, 512, 1, 1)}
    torch.save({"model": {**backbone.state_dict(), **extra}}, tmp_path / "internimage_t_1k_224.pth")
    loaded = build_backbone("internimage_t", 32, str(tmp_path / "internimage_t_1k_224.pth")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"do not fit the backbone: .* of another shape"):
        build_backbone("internimage_s", 32, str(tmp_path / "internimage_t_1k_224.pth"))
