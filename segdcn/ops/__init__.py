"""Deformable operators in plain PyTorch; they need torch and torchvision only."""

from segdcn.ops.aggregate import deform_aggregate
from segdcn.ops.aggregate_layers import DCNv3, DCNv4
from segdcn.ops.deform_conv import DeformConv2d, deform_conv2d
from segdcn.ops.ps_roi_pool import deform_ps_roi_pool
from segdcn.ops.roi_layers import DeformPSRoIPool, DeformRoIPool
from segdcn.ops.roi_pool import deform_roi_pool
from segdcn.ops.sampling import kernel_points, outside_map

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "deform_aggregate",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "kernel_points",
    "outside_map",
]
