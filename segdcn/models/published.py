"""State dicts that others have published, under the names of the same networks here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segdcn.errors import UserError
from segdcn.models.internimage import VARIANTS

# mmsegmentation's UPerHead and FCNHead, of InternImage's files for example
_MMSEGMENTATION = (
    (r"decode_head\.psp_modules\.", "head.pyramid."),
    (r"decode_head\.bottleneck\.", "head.context."),
    (r"decode_head\.lateral_convs\.", "head.lateral."),
    (r"decode_head\.fpn_convs\.", "head.smooth."),
    (r"decode_head\.fpn_bottleneck\.", "head.fuse."),
    (r"decode_head\.conv_seg\.", "head.classifier.1."),
    (r"auxiliary_head\.convs\.0\.", "auxiliary.0."),
    (r"auxiliary_head\.conv_seg\.", "auxiliary.2."),
)


def under_our_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors, renamed where they are of a network of torchvision's or mmsegmentation's that is known here.

    Raises: UserError for a name that such a network does not have.
    """
    if "classifier.0.convs.0.0.weight" in tensors:
        return from_torchvision_deeplabv3(tensors)
    if "decode_head.conv_seg.weight" in tensors:
        return from_mmsegmentation_upernet(tensors)
    return tensors


def upernet_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``build_deeplab`` is called with for the network of mmsegmentation's UperNet state dict, and num_classes.

    Raises: UserError where the backbone is none of InternImage's.
    """
    found = [
        name
        for name, variant in VARIANTS.items()
        if (stem := tensors.get("backbone.patch_embed.conv2.weight")) is not None
        and len(stem) == variant.channels
        and variant.flash == ("backbone.levels.0.blocks.0.dcn.offset_mask.weight" in tensors)
        and all(
            (f"backbone.levels.{level}.blocks.{depth - 1}.norm1.0.weight" in tensors)
            and (f"backbone.levels.{level}.blocks.{depth}.norm1.0.weight" not in tensors)
            for level, depth in enumerate(variant.depths)
        )
    ]
    if not found:
        raise UserError(f"an UperNet whose backbone is none of {', '.join(VARIANTS)}")
    return {
        "num_classes": len(tensors["decode_head.conv_seg.weight"]),
        "backbone": found[0],
        "head": "upernet",
        "output_stride": 32,
        "weights": None,
        "head_channels": tensors["decode_head.conv_seg.weight"].shape[1],
        "auxiliary": "auxiliary_head.conv_seg.weight" in tensors,
    }


def from_mmsegmentation_upernet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's UperNet state dict under the names of the same network here.

    | mmsegmentation               | here                | |
    |------------------------------|---------------------|-|
    | backbone.*                   | backbone.*          | |
    | decode_head.psp_modules.*    | head.pyramid.*      | pooled context |
    | decode_head.bottleneck.*     | head.context.*      | |
    | decode_head.lateral_convs.*  | head.lateral.*      | |
    | decode_head.fpn_convs.*      | head.smooth.*       | |
    | decode_head.fpn_bottleneck.* | head.fuse.*         | |
    | decode_head.conv_seg.*       | head.classifier.1.* | |
    | auxiliary_head.convs.0.*     | auxiliary.0.*       | only where the file has one |
    | auxiliary_head.conv_seg.*    | auxiliary.2.*       | |

    and of a convolution with its norm ``conv.*`` is ``0.*`` and ``bn.*`` is ``1.*``.

    Raises: UserError for a name that is not of such a network.
    """
    renamed = {}
    for key, value in state_dict.items():
        new = key
        if not key.startswith("backbone."):
            for pattern, ours in _MMSEGMENTATION:
                new, found = re.subn(f"^{pattern}", ours, key)
                if found:
                    break
            else:
                raise UserError(f"{key!r} is not a name in mmsegmentation's UperNet")
            new = re.sub(r"\.conv\.(?=[^.]+$)", ".0.", new)
            new = re.sub(r"\.bn\.(?=[^.]+$)", ".1.", new)
        renamed[new] = value
    return renamed


def from_torchvision_deeplabv3(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's deeplabv3_resnet50 or 101 state dict under the names of the same network here.

    | torchvision      | here              |                                       |
    |------------------|-------------------|---------------------------------------|
    | backbone.*       | backbone.*        |                                       |
    | classifier.0.*   | head.aspp.*       | pyramid pooling                       |
    | classifier.1.*   | head.fuse.0.*     | 3x3 convolution                       |
    | classifier.2.*   | head.fuse.1.*     | its batch norm                        |
    | classifier.4.*   | head.classifier.* |                                       |
    | aux_classifier.* | auxiliary.*       | only where the file has one           |

    The network that it fits, with equal logits: ``build_deeplab(21, "resnet50", "aspp", output_stride=8, weights=None,
    deform=Deform(0), auxiliary=True, torchvision_dilation=True)``. Make layers deformable after loading.

    Raises: ValueError for a name that is not of such a network.
    """
    names = {
        "backbone.": "backbone.",
        "classifier.0.": "head.aspp.",
        "classifier.1.": "head.fuse.0.",
        "classifier.2.": "head.fuse.1.",
        "classifier.4.": "head.classifier.",
        "aux_classifier.": "auxiliary.",
    }
    renamed = {}
    for key, value in state_dict.items():
        old = next((prefix for prefix in names if key.startswith(prefix)), None)
        if old is None:
            raise UserError(f"{key!r} is not a name in torchvision's deeplabv3_resnet50 or deeplabv3_resnet101")
        renamed[names[old] + key.removeprefix(old)] = value
    return renamed
