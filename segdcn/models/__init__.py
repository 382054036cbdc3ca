"""Segmentation networks: backbones, heads, their assembly, and deformable layers for any network."""

from segdcn.models.backbones import BACKBONES, build_backbone
from segdcn.models.deeplab import DeepLab, Deform, build_deeplab
from segdcn.models.deformable import (
    deformable_layers,
    make_deformable,
    plain_twin,
    sampling_layers,
    set_fixed_dilation,
)
from segdcn.models.features import Backbone, Features
from segdcn.models.frozen import freeze_batch_norm, freeze_stages
from segdcn.models.heads import ASPPHead, FPNHead, PaperHead, UPerHead, V3PlusHead
from segdcn.models.published import from_mmsegmentation_upernet, from_torchvision_deeplabv3
from segdcn.models.weights import load_weights

__all__ = [
    "BACKBONES",
    "ASPPHead",
    "Backbone",
    "DeepLab",
    "Deform",
    "FPNHead",
    "Features",
    "PaperHead",
    "UPerHead",
    "V3PlusHead",
    "build_backbone",
    "build_deeplab",
    "deformable_layers",
    "freeze_batch_norm",
    "freeze_stages",
    "from_mmsegmentation_upernet",
    "from_torchvision_deeplabv3",
    "load_weights",
    "make_deformable",
    "plain_twin",
    "sampling_layers",
    "set_fixed_dilation",
]
