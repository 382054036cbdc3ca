"""How far apart a layer's sampling points lie: the effective dilation of the paper's Table 2."""

from __future__ import annotations

import torch
from torch import Tensor

from segdcn.analysis.layers import LayerCall
from segdcn.errors import UserError


def effective_dilation(call: LayerCall) -> Tensor:
    """Mean distance between adjacent kernel points, at each cell of the output map: (N, G, Ho, Wo).

    In pixels of the layer's input map. Adjacent are the 4-neighbours in the kernel, 12 pairs in a 3x3 one: without
    offsets it is the layer's dilation exactly, which with diagonals it would not be.

    Raises: ValueError for a 1x1 kernel, which has no pairs.
    Source: Dai et al. 2017, section 4.2.
    """
    if call.kernel_size == (1, 1):
        raise UserError(f"{call.name} has a single kernel point, so it has no dilation")
    n, groups, _, _, out_h, out_w = call.taps.shape
    grid = call.taps.reshape(n, groups, *call.kernel_size, 2, out_h, out_w)
    down = (grid[:, :, 1:] - grid[:, :, :-1]).square().sum(dim=4).sqrt().flatten(2, 3)
    right = (grid[:, :, :, 1:] - grid[:, :, :, :-1]).square().sum(dim=4).sqrt().flatten(2, 3)
    return torch.cat((down, right), dim=2).mean(dim=2)
