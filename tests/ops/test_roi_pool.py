"""Deformable RoI poolings against loops written from their definition, torchvision's, and answers known by hand."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segdcn.ops import DeformPSRoIPool, DeformRoIPool, deform_ps_roi_pool, deform_roi_pool, ps_roi_pool, roi_pool

HALVES = (torch.bfloat16, torch.float16)


def on_a_gpu(test: Callable[..., None]) -> Any:
    """Marks a test that needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def some_rois(count: int, images: int, height: float, width: float, seed: int = 0) -> Tensor:
    """Regions of very different sizes in image pixels, some of them partly outside an image of this size."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float64)
    corner = (torch.rand(count, 2, dtype=torch.float64, generator=generator) * 1.3 - 0.2) * size
    extent = torch.rand(count, 2, dtype=torch.float64, generator=generator) ** 2 * size
    image = torch.randint(images, (count, 1), generator=generator).double()
    return torch.cat((image, corner, corner + extent), dim=1)


# The definitions as loops


def bilinear(values: Tensor, y: float, x: float) -> float:
    """Between the four cells around a point within the map."""
    top, left = math.floor(y), math.floor(x)
    bottom, right = math.ceil(y), math.ceil(x)
    down, along = y - top, x - left
    upper = values[top, left].item() * (1 - along) + values[top, right].item() * along
    lower = values[bottom, left].item() * (1 - along) + values[bottom, right].item() * along
    return upper * (1 - down) + lower * down


def aligned_loop(
    maps: Tensor, rois: Tensor, offset: Tensor | None, size: tuple[int, int], scale: float, ratio: int, gamma: float
) -> Tensor:
    """RoIAlign (aligned, He et al. 2017) whose bins are moved: Dai et al. 2017, section 2.2."""
    channels, height, width = maps.shape[1:]
    output = torch.zeros(len(rois), channels, *size, dtype=torch.float64)
    for r, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (corner * scale - 0.5 for corner in corners)
        bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
        grid_h, grid_w = ratio or math.ceil(bin_h), ratio or math.ceil(bin_w)
        for i, j in itertools.product(range(size[0]), range(size[1])):
            move_x, move_y = (0.0, 0.0) if offset is None else (offset[r, axis, i, j].item() for axis in (0, 1))
            for iy, ix, c in itertools.product(range(grid_h), range(grid_w), range(channels)):
                y = y1 + i * bin_h + (iy + 0.5) * bin_h / grid_h + gamma * move_y * (y2 - y1)
                x = x1 + j * bin_w + (ix + 0.5) * bin_w / grid_w + gamma * move_x * (x2 - x1)
                if -1 <= y <= height and -1 <= x <= width:
                    value = bilinear(maps[int(image), c], min(max(y, 0), height - 1), min(max(x, 0), width - 1))
                    output[r, c, i, j] += value / (grid_h * grid_w)
    return output


def c_round(value: float) -> float:
    return math.copysign(math.floor(abs(value) + 0.5), value)


def position_sensitive_loop(
    maps: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: tuple[int, int],
    channels: int,
    group: int,
    scale: float,
    samples: int,
    part: int,
    gamma: float,
) -> Tensor:
    """The authors' deformable_psroi_pooling.cu, step by step."""
    height, width = maps.shape[2:]
    classes = 1 if offset is None else offset.shape[1] // 2
    output = torch.zeros(len(rois), channels, *size, dtype=torch.float64)
    for r, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c_round(corner) for corner in corners)
        x1, y1, x2, y2 = x1 * scale - 0.5, y1 * scale - 0.5, (x2 + 1) * scale - 0.5, (y2 + 1) * scale - 0.5
        roi_w, roi_h = max(x2 - x1, 0.1), max(y2 - y1, 0.1)
        for c, i, j in itertools.product(range(channels), range(size[0]), range(size[1])):
            x, y = x1 + j * roi_w / size[1], y1 + i * roi_h / size[0]
            if offset is not None:
                of_class = c // (channels // classes)
                place = (i * part // size[0], j * part // size[1])
                x += offset[(r, 2 * of_class, *place)].item() * gamma * roi_w
                y += offset[(r, 2 * of_class + 1, *place)].item() * gamma * roi_h
            channel = (c * group + i * group // size[0]) * group + j * group // size[1]
            values = []
            for iy, ix in itertools.product(range(samples), range(samples)):
                sample_y, sample_x = y + iy * roi_h / size[0] / samples, x + ix * roi_w / size[1] / samples
                if -0.5 <= sample_y <= height - 0.5 and -0.5 <= sample_x <= width - 0.5:
                    inside_y, inside_x = min(max(sample_y, 0), height - 1), min(max(sample_x, 0), width - 1)
                    values.append(bilinear(maps[int(image), channel], inside_y, inside_x))
            output[r, c, i, j] = sum(values) / max(1, len(values))
    return output


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ratio=st.integers(0, 2),
    scale=st.sampled_from([1.0, 0.25]),
    moved=st.booleans(),
    seed=st.integers(0, 999),
)
def test_aligned_pooling_is_its_definition(
    size: tuple[int, int], ratio: int, scale: float, moved: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 2, 5, 8, dtype=torch.float64, generator=generator)
    rois = some_rois(3, 2, 5 / scale, 8 / scale, seed)
    offset = torch.randn(3, 2, *size, dtype=torch.float64, generator=generator) if moved else None
    expected = aligned_loop(maps, rois, offset, size, scale, ratio, 0.3)
    torch.testing.assert_close(deform_roi_pool(maps, rois, offset, size, scale, ratio, 0.3), expected)


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    group=st.integers(1, 3),
    part=st.integers(1, 3),
    classes=st.integers(0, 2),
    samples=st.integers(1, 3),
    scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 999),
)
def test_position_sensitive_pooling_is_its_definition(
    size: tuple[int, int], group: int, part: int, classes: int, samples: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * max(1, classes)
    maps = torch.randn(2, channels * group**2, 5, 8, dtype=torch.float64, generator=generator)
    rois = some_rois(2, 2, 5 / scale, 8 / scale, seed)
    offset = torch.randn(2, 2 * classes, part, part, dtype=torch.float64, generator=generator) if classes else None
    ours = deform_ps_roi_pool(maps, rois, offset, size, channels, group, scale, samples, part, 0.3)
    expected = position_sensitive_loop(maps, rois, offset, size, channels, group, scale, samples, part, 0.3)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ratio=st.integers(0, 3),
    scale=st.sampled_from([1.0, 1 / 16, 0.3]),
    seed=st.integers(0, 999),
)
def test_without_offsets_values_and_gradients_are_roi_aligns(
    dtype: torch.dtype, tolerance: float, size: tuple[int, int], ratio: int, scale: float, seed: int
) -> None:
    maps = torch.randn(2, 3, 9, 14, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    rois = some_rois(8, 2, 9 / scale, 14 / scale, seed).to(dtype)
    expected = torchvision.ops.roi_align(maps, rois, size, scale, ratio, aligned=True)
    for offset in (None, torch.zeros(8, 2, *size, dtype=dtype)):
        ours = deform_roi_pool(maps, rois, offset, size, scale, ratio)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
        grad = torch.randn_like(expected)
        of_ours, of_expected = (torch.autograd.grad(out, maps, grad, retain_graph=True)[0] for out in (ours, expected))
        torch.testing.assert_close(of_ours, of_expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradients_of_aligned_pooling_equal_finite_differences(ratio: int) -> None:
    maps = torch.randn(2, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    rois = some_rois(5, 2, 6, 7)
    assert torch.autograd.gradcheck(lambda x, o: deform_roi_pool(x, rois, o, (2, 3), 1.0, ratio), (maps, offset))


@pytest.mark.parametrize("part", [2, 3, 5])
def test_gradients_of_position_sensitive_pooling_equal_finite_differences(part: int) -> None:
    maps = torch.randn(2, 4 * 4, 6, 7, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(4, 4, part, part, dtype=torch.float64, requires_grad=True)
    rois = some_rois(4, 2, 9, 10)
    assert torch.autograd.gradcheck(lambda x, o: deform_ps_roi_pool(x, rois, o, 3, 4, 2, 0.7, 2, part), (maps, offset))


def test_answers_of_the_authors_kernel_on_a_ramp() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    roi = torch.tensor([[0.0, 16, 16, 47, 47]])
    right, down = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    right[:, 0], down[:, 1] = 1, 1
    for offset, columns in ((None, [0.75, 1.75]), (right, [0.95, 1.95]), (down, [0.75, 1.75])):
        pooled = deform_ps_roi_pool(ramp, roi, offset, 2, 1, 1, 1 / 16, 2)
        torch.testing.assert_close(pooled[0, 0], torch.tensor([columns, columns]))


def test_offsets_are_x_then_y_in_fractions_of_the_region() -> None:
    row, column = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    maps = torch.stack((column, row))[None]  # channel 0 tells x, channel 1 tells y
    roi = torch.tensor([[0.0, 8, 5, 18, 9]])  # 10 wide, 4 high
    offset = torch.zeros(1, 2, 1, 1)
    offset[0, :, 0, 0] = torch.tensor([1.0, -2.0])
    plain, moved = (deform_roi_pool(maps, roi, o, 1)[0, :, 0, 0] for o in (None, offset))
    torch.testing.assert_close(moved - plain, torch.tensor([0.1 * 1 * 10, 0.1 * -2 * 4]))


# The two functions in one form, for what holds of both

Pool = Callable[..., Tensor]


def aligned(maps: Tensor, rois: Tensor, offset: Tensor | None, **options: Any) -> Tensor:
    return deform_roi_pool(maps, rois, offset, 2, **options)


def position_sensitive(maps: Tensor, rois: Tensor, offset: Tensor | None, **options: Any) -> Tensor:
    return deform_ps_roi_pool(maps, rois, offset, 2, 2, 2, **options)


both_pools = pytest.mark.parametrize("pool", [aligned, position_sensitive])


def arguments(rois: int = 3, images: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Maps of 8 channels, regions, offsets of 2 x 2 bins."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(images, 8, 6, 9, dtype=torch.float64, generator=generator)
    offset = torch.randn(rois, 2, 2, 2, dtype=torch.float64, generator=generator)
    return [tensor.to(dtype) for tensor in (maps, some_rois(rois, max(1, images), 6, 9), offset)]


def with_gradients(pool: Pool, maps: Tensor, rois: Tensor, offset: Tensor) -> list[Tensor]:
    maps, offset = maps.detach().requires_grad_(), offset.detach().requires_grad_()
    output = pool(maps, rois, offset)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)
    return [output.detach(), *torch.autograd.grad(output, (maps, offset), grad)]


# Nothing to do: no regions, no images, no channels

some_or_none = st.sampled_from([(0, 2, 3), (3, 2, 0), (0, 0, 3), (0, 2, 0), (0, 0, 0), (1, 1, 1)])  # R, N, C
dtypes = st.sampled_from([torch.float64, torch.float32, *HALVES])


@settings(max_examples=30)
@given(sizes=some_or_none, dtype=dtypes, moved=st.booleans(), seed=st.integers(0, 999))
def test_aligned_pooling_of_nothing_is_roi_aligns(
    sizes: tuple[int, int, int], dtype: torch.dtype, moved: bool, seed: int
) -> None:
    regions, images, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, channels, 6, 9, generator=generator).to(dtype).requires_grad_()
    rois, offset = (
        some_rois(regions, max(1, images), 6, 9, seed).float(),
        torch.zeros(regions, 2, 2, 3).requires_grad_(),
    )
    ours = deform_roi_pool(maps, rois, offset if moved else None, (2, 3))
    as_float = maps.detach().float().requires_grad_()
    expected = torchvision.ops.roi_align(as_float, rois, (2, 3), aligned=True)
    ours.sum().backward()
    expected.sum().backward()
    assert ours.dtype == dtype
    for value, oracle in ((ours, expected), (maps.grad, as_float.grad)):
        torch.testing.assert_close(value.float(), oracle, rtol=0.02, atol=0.02)
    if moved:
        assert offset.grad.shape == offset.shape
        assert (regions and channels) or not offset.grad.any()


@settings(max_examples=30)
@given(sizes=some_or_none, dtype=dtypes, classes=st.integers(0, 2), seed=st.integers(0, 999))
def test_position_sensitive_pooling_of_nothing_is_its_definition(
    sizes: tuple[int, int, int], dtype: torch.dtype, classes: int, seed: int
) -> None:
    regions, images, channels = sizes[0], sizes[1], 2 * sizes[2]
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, channels * 4, 6, 9, generator=generator).to(dtype).requires_grad_()
    rois = some_rois(regions, max(1, images), 6, 9, seed)
    offset = torch.randn(regions, 2 * classes, 2, 2, generator=generator).requires_grad_() if classes else None
    ours = deform_ps_roi_pool(maps, rois, offset, 3, channels, 2, part_size=2)
    expected = position_sensitive_loop(maps.detach(), rois, offset, (3, 3), channels, 2, 1.0, 4, 2, 0.1)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0.05)
    ours.sum().backward()
    for leaf in (maps, offset) if classes else (maps,):
        assert leaf.grad.shape == leaf.shape
        assert (regions and channels) or not leaf.grad.any()


@both_pools
def test_regions_need_an_image_and_pixels(pool: Pool) -> None:
    maps, rois, offset = arguments(1, 1)
    with pytest.raises(ValueError, match=r"^rois must be empty where input has no images, got 0 to 0"):
        pool(maps[:0], rois, offset)
    for empty in (maps[:, :, :0], maps[..., :0]):
        with pytest.raises(ValueError, match=r"^input must have at least one pixel, got \(1, 8, "):
            pool(empty, rois, offset)


def test_a_region_turned_inside_out_gives_zero_as_roi_align_does() -> None:
    maps, roi = torch.randn(1, 3, 5, 7), torch.tensor([[0.0, 5, 3, 2, 1]])
    assert not deform_roi_pool(maps, roi, None, 2).any()
    assert not torchvision.ops.roi_align(maps, roi, 2, aligned=True).any()


@both_pools
def test_memory_layout_does_not_matter(pool: Pool) -> None:
    maps, rois, offset = arguments()
    expected = with_gradients(pool, maps, rois, offset)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack((t, -t), dim=-1)[..., 0],
    ]
    for layout in layouts:
        result = with_gradients(pool, layout(maps), layout(rois), layout(offset))
        for ours, value in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, value)


WILD_OFFSETS = """
import math, sys, torch
from segdcn.ops import deform_ps_roi_pool, deform_roi_pool
torch.manual_seed(0)
maps, rois = torch.randn(2, 8, 6, 9), torch.tensor([[0, 1., 1, 7, 5], [1, 0, 0, 8, 5]])
pools = (lambda *a: deform_roi_pool(*a, 2), lambda *a: deform_ps_roi_pool(*a, 2, 2, 2))
for pool in pools:
    for bad in (math.nan, math.inf, -math.inf, 1e6, -1e6, 1e30, -1e30):
        for axis in (0, 1):
            offset = torch.zeros(2, 2, 2, 2)
            expected = pool(maps, rois, offset)
            expected[1, :, 0, 1] = 0
            offset[1, axis, 0, 1] = bad
            leaves = [maps.clone().requires_grad_(), offset.clone().requires_grad_()]
            output = pool(leaves[0], rois, leaves[1])
            output.square().sum().backward()
            assert torch.allclose(output, expected, atol=1e-5), (bad, axis)
            assert all(leaf.grad.isfinite().all() for leaf in leaves), (bad, axis)
            assert not leaves[1].grad[1, :, 0, 1].any(), (bad, axis)
    for bad in (math.nan, math.inf):
        for column in range(1, 5):
            broken = rois.clone()
            broken[1, column] = bad
            try:
                pool(maps, broken, None)
            except ValueError as error:
                assert str(error) == "rois must be finite, got NaN or infinity"
            else:
                raise AssertionError(bad)
"""


def test_wild_offsets_contribute_nothing_and_gradients_stay_finite() -> None:
    process = subprocess.run(
        [sys.executable, "-c", WILD_OFFSETS], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, f"exit {process.returncode}: {process.stderr}"


@both_pools
def test_what_the_map_holds_does_not_reach_a_sample_outside(pool: Pool) -> None:
    _, rois, offset = arguments()
    assert not pool(torch.full((2, 8, 6, 9), math.nan, dtype=torch.float64), rois, offset.fill_(math.inf)).any()


@both_pools
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(8, 6, 9)}, r"input must be \(N, C, H, W\), got \(8, 6, 9\)"),
        ({0: torch.zeros(2, 8, 6, 9, dtype=torch.int64)}, "input must be floating point, got torch.int64"),
        ({1: torch.zeros(3, 4)}, r"rois must be \(R, 5\) as \(image, x1, y1, x2, y2\), got \(3, 4\)"),
        ({1: torch.zeros(3, 5, device="meta")}, "rois must be on input's device cpu, got meta"),
        (
            {1: torch.tensor([[2.0, 0, 0, 1, 1]]), 2: torch.zeros(1, 2, 2, 2)},
            "rois must name images 0 to 1, got 2 to 2",
        ),
        ({1: torch.tensor([[-1.0, 0, 0, 1, 1]]), 2: torch.zeros(1, 2, 2, 2)}, "rois must name images 0 to 1, got -1"),
        ({2: torch.zeros(3, 2, 2, 3)}, r"offset must be \(3, 2.*, 2, 2\).*got \(3, 2, 2, 3\)"),
        ({2: torch.zeros(2, 2, 2, 2)}, r"offset must be \(3, 2.*, 2, 2\).*got \(2, 2, 2, 2\)"),
        ({2: torch.zeros(3, 2, 2, 2, dtype=torch.int32)}, "offset must be floating point, got torch.int32"),
    ],
)
def test_a_wrong_argument_is_told_by_its_name(pool: Pool, change: dict[int, Tensor], message: str) -> None:
    right = arguments()
    with pytest.raises(ValueError, match=f"^{message}"):
        pool(*(change.get(position, tensor) for position, tensor in enumerate(right)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, r, o: deform_roi_pool(m, r, None, (0, 2)), r"output_size must be positive, got \(0, 2\)"),
        (lambda m, r, o: deform_roi_pool(m, r, o, 2, 1.0, -1), "sampling_ratio must be 0 or more, got -1"),
        (lambda m, r, o: deform_ps_roi_pool(m, r, o, 2, 3, 2), r"input must have .* = 12 channels, got 8"),
        (lambda m, r, o: deform_ps_roi_pool(m, r, o, 2, 2, 0), "group_size must be 1 or more, got 0"),
        (lambda m, r, o: deform_ps_roi_pool(m, r, o, 2, 2, 2, 1.0, 0), "sample_per_part must be 1 or more, got 0"),
        (lambda m, r, o: deform_ps_roi_pool(m, r, o, (2, 3), 2, 2), "part_size must be given where output_size is"),
        (
            lambda m, r, o: deform_ps_roi_pool(m, r, o.repeat(1, 3, 1, 1), 2, 2, 2),
            "offset must be .* dividing 2 output",
        ),
        (lambda m, r, o: DeformPSRoIPool(8, 4, 3, offset_classes=3), "offset_classes must divide output_channels 4"),
        (lambda m, r, o: deform_roi_pool(m, r, o, 2, backend="cuda"), "backend must be auto, gather or triton, got 'c"),
        (lambda m, r, o: deform_ps_roi_pool(m, r, o, 2, 2, 2, backend=""), "backend must be auto, gather or triton"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(*arguments())


@on_a_gpu
@both_pools
def test_on_a_gpu_values_and_gradients_are_those_of_the_cpu(pool: Pool) -> None:
    tensors = arguments()
    on_gpu = with_gradients(pool, *(tensor.cuda() for tensor in tensors))
    for ours, value in zip(on_gpu, with_gradients(pool, *tensors), strict=True):
        torch.testing.assert_close(ours.cpu(), value)


@on_a_gpu
@both_pools
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("of_offsets", [torch.float32, *HALVES])
def test_on_a_gpu_half_precision_stays_close_to_float32(
    pool: Pool, dtype: torch.dtype, of_offsets: torch.dtype
) -> None:
    maps, rois, offset = arguments(dtype=torch.float32)
    maps, offset = maps.to(dtype), offset.to(of_offsets)
    result = with_gradients(pool, maps.cuda(), rois.cuda(), offset.cuda())
    assert [value.dtype for value in result] == [dtype, dtype, of_offsets]
    for ours, value in zip(result, with_gradients(pool, maps.float(), rois, offset.float()), strict=True):
        assert (ours.cpu().float() - value).abs().max() < 0.03 * value.abs().max()


@on_a_gpu
@both_pools
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rois", "images"), [(0, 2), (0, 0)])
def test_on_a_gpu_no_regions_have_gradients_too(pool: Pool, dtype: torch.dtype, rois: int, images: int) -> None:
    tensors = [tensor.cuda() for tensor in arguments(rois, images, dtype)]
    output, for_maps, for_offset = with_gradients(pool, *tensors)
    assert output.shape == (0, 8 if pool is aligned else 2, 2, 2)
    assert (for_maps.shape, for_offset.shape) == (tensors[0].shape, tensors[2].shape)
    assert not for_maps.any()


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_on_a_gpu_no_channels_have_gradients_too(dtype: torch.dtype) -> None:
    maps, rois, offset = (tensor.cuda() for tensor in arguments(dtype=dtype))
    for pool in (aligned, lambda m, r, o: deform_ps_roi_pool(m, r, o, 2, 0, 2)):
        output, for_maps, for_offset = with_gradients(pool, maps[:, :0], rois, offset)
        assert output.shape == (3, 0, 2, 2)
        assert for_maps.shape == (2, 0, 6, 9)
        assert not for_offset.any()


@both_pools
def test_half_precision_maps_are_read_at_exact_points(pool: Pool) -> None:
    # region corners of a wide map that bfloat16 cannot tell apart
    maps = torch.arange(2048.0).remainder(7).expand(1, 8, 4, 2048).contiguous()
    rois = torch.tensor([[0, 1001.0, 0, 1003.0, 3.0]])
    expected = pool(maps, rois, None)
    for dtype in HALVES:
        output = pool(maps.to(dtype), rois, None)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert pool(maps, rois, None).dtype == torch.bfloat16


@both_pools
def test_a_compiled_pooling_trains_as_one_graph(pool: Pool) -> None:
    maps, rois, offset = arguments()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    for ours, value in zip(
        with_gradients(compiled, maps, rois, offset), with_gradients(pool, maps, rois, offset), strict=True
    ):
        torch.testing.assert_close(ours, value)


@pytest.mark.parametrize("moved", [False, True])
def test_the_operators_keep_the_rules_of_custom_operators(moved: bool) -> None:
    maps, rois, offset = arguments()
    chosen = offset.requires_grad_() if moved else None
    fixed = None if chosen is None else chosen.detach()
    grad = torch.randn(3, 8, 2, 2, dtype=torch.float64)
    for operator, backward, channels, settings_ in (
        (roi_pool._pool, roi_pool._pool_backward, 8, ([2, 2], 1.0, 0, 0.1)),
        (ps_roi_pool._pool, ps_roi_pool._pool_backward, 2, ([2, 2], 2, 1.0, 4, 0.1)),
    ):
        torch.library.opcheck(operator, (maps.requires_grad_(), rois, chosen, *settings_))
        torch.library.opcheck(backward, (grad[:, :channels], maps.detach(), rois, fixed, *settings_, [True, moved]))


# The modules

MODULES = {
    "aligned": lambda: DeformRoIPool(4, (2, 3), 0.5),
    "aligned modulated": lambda: DeformRoIPool(4, (2, 3), 0.5, modulated=True, hidden=(8, 8)),
    "position-sensitive": lambda: DeformPSRoIPool(4, 6, 3, 0.5, offset_classes=3),
    "position-sensitive modulated": lambda: DeformPSRoIPool(4, 6, 3, 0.5, modulated=True),
}
modules = pytest.mark.parametrize("name", MODULES)


def trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_an_untrained_module_pools_plainly() -> None:
    x, rois = torch.randn(2, 4, 6, 9), some_rois(3, 2, 12, 18).float()
    for name in ("aligned", "aligned modulated"):
        expected = torchvision.ops.roi_align(x, rois, (2, 3), 0.5, aligned=True)
        torch.testing.assert_close(MODULES[name]()(x, rois), expected)
    for name in ("position-sensitive", "position-sensitive modulated"):
        module = MODULES[name]()
        expected = deform_ps_roi_pool(module.maps(x), rois, None, 3, 6, 3, 0.5)
        torch.testing.assert_close(module(x, rois), expected)


@modules
def test_a_new_module_learns_where_to_pool(name: str) -> None:
    torch.manual_seed(0)
    module, x, rois = MODULES[name](), torch.randn(2, 4, 6, 9), some_rois(3, 2, 12, 18).float()
    module(x, rois).square().sum().backward()
    start_at_zero = [p for p in module.parameters() if not p.any()]
    assert start_at_zero
    for parameter in start_at_zero:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert any(parameter.grad.any() for parameter in start_at_zero)


EMPTY_MODULES = {
    "aligned": lambda channels, out: DeformRoIPool(channels, (2, 3), 0.5),
    "aligned modulated": lambda channels, out: DeformRoIPool(channels, (2, 3), 0.5, modulated=True, hidden=(8, 8)),
    "aligned, nothing hidden": lambda channels, out: DeformRoIPool(channels, (2, 3), 0.5, hidden=(0,)),
    "position-sensitive": lambda channels, out: DeformPSRoIPool(channels, out, 3, 0.5, offset_classes=2),
    "position-sensitive modulated": lambda channels, out: DeformPSRoIPool(channels, out, 3, 0.5, modulated=True),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", EMPTY_MODULES)
@pytest.mark.parametrize(("regions", "images", "channels", "out"), [(0, 0, 4, 6), (3, 2, 0, 6), (3, 2, 4, 0)])
def test_a_module_with_nothing_to_do_trains_compiles_and_is_exported(
    name: str, regions: int, images: int, channels: int, out: int
) -> None:
    module = EMPTY_MODULES[name](channels, out)
    x, rois = torch.randn(images, channels, 6, 9), some_rois(regions, max(1, images), 12, 18).float()
    torch.compiler.reset()  # one function is compiled anew for each module, which has a limit
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    shape = (regions, channels, 2, 3) if name.startswith("aligned") else (regions, out, 3, 3)
    for run in (module, compiled, torch.export.export(module, (x, rois)).module()):
        assert run(x, rois).shape == shape
    for run in (module, compiled):
        module.zero_grad()
        run(x, rois).sum().backward()
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert (regions and (channels or out)) or not parameter.grad.any()


def test_the_offsets_of_the_fully_connected_branch_move_the_bins() -> None:
    module, x = MODULES["aligned modulated"](), torch.randn(2, 4, 6, 9)
    rois = some_rois(3, 2, 12, 18).float()
    bias = torch.randn(18)
    with torch.no_grad():
        module.branch[-1].bias.copy_(bias)
    offset = bias[:12].view(1, 2, 2, 3).expand(3, -1, -1, -1)
    expected = deform_roi_pool(x, rois, offset, (2, 3), 0.5) * 2 * bias[12:].view(2, 3).sigmoid()
    torch.testing.assert_close(module(x, rois), expected)


def test_each_class_moves_by_its_own_offset_field() -> None:
    module, x = MODULES["position-sensitive"](), torch.randn(2, 4, 6, 9)
    rois = torch.tensor([[0, 2.0, 2, 14, 9], [1, 0, 0, 15, 10]])
    bias = torch.randn(6, 9)  # class and axis, bin: the same everywhere on the map
    with torch.no_grad():
        module.offset.bias.copy_(bias.flatten())
    offset = bias.view(1, 6, 3, 3).expand(2, -1, -1, -1)
    torch.testing.assert_close(module(x, rois), deform_ps_roi_pool(module.maps(x), rois, offset, 3, 6, 3, 0.5))


def test_classes_that_memory_keeps_apart_pool_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.randn(2, 6 * 9, 6, 9, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, 6, 3, 3, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        output = deform_ps_roi_pool(maps, some_rois(5, 2, 12, 18), offset, 3, 6, 3, 0.5)
        return [output, *torch.autograd.grad(output.square().sum(), (maps, offset))]

    together = results()
    monkeypatch.setattr(ps_roi_pool, "AT_ONCE", 1)
    torch.testing.assert_close(results(), together)


@modules
def test_state_survives_a_file_of_plain_tensors(name: str) -> None:
    module, file = trained(name), io.BytesIO()
    x, rois = torch.randn(2, 4, 6, 9), some_rois(3, 2, 12, 18).float()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = MODULES[name]()
    assert not torch.equal(other(x, rois), module(x, rois))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, rois), module(x, rois))


@modules
def test_an_exported_module_takes_any_number_of_images_and_regions(name: str) -> None:
    module, x, rois = trained(name).eval(), torch.randn(2, 4, 6, 9), some_rois(3, 2, 12, 18).float()
    images, regions = torch.export.Dim("images"), torch.export.Dim("regions")
    program = torch.export.export(module, (x, rois), dynamic_shapes=({0: images}, {0: regions}))
    more_x, more_rois = torch.randn(3, 4, 6, 9), some_rois(5, 3, 12, 18).float()
    torch.testing.assert_close(program.module()(more_x, more_rois), module(more_x, more_rois))


@modules
def test_repr_tells_how_the_module_pools(name: str) -> None:
    text = repr(MODULES[name]())
    assert "spatial_scale=0.5" in text
    assert ("output_size=(2, 3)" in text) == name.startswith("aligned")
