"""Deformable operators in plain PyTorch; they need torch and torchvision only."""

from segdcn.ops.deform_conv import DeformConv2d, deform_conv2d
from segdcn.ops.sampling import bilinear_corners, kernel_points, outside_map

__all__ = ["DeformConv2d", "bilinear_corners", "deform_conv2d", "kernel_points", "outside_map"]
