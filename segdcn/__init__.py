"""segdcn: semantic segmentation with deformable convolution on PyTorch Lightning and Hydra."""

__version__ = "0.1.0"
