"""The operators' Triton kernels: on a GPU where there is one, else by Triton's interpreter in a process of its own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from test_aggregate import aggregate_loop, some
from test_deform_conv import Case, with_gradients
from test_roi_pool import aligned_loop, position_sensitive_loop, some_rois
from torch import Tensor

from segdcn.ops import (
    DeformPSRoIPool,
    DeformRoIPool,
    deform_aggregate,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
where_kernels_run = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device; test_all_by_the_interpreter runs it"
)
pytestmark = pytest.mark.gpu


if INTERPRETED:
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpreterBuilder

    by_bits = InterpreterBuilder.create_dot

    def widened(builder: InterpreterBuilder, a: object, b: object, *rest: object) -> object:
        """The interpreter would multiply the bits of bfloat16, which NumPy has as integers."""
        wide = triton.language.float32
        return by_bits(builder, builder.cast_impl(a, wide), builder.cast_impl(b, wide), *rest)

    InterpreterBuilder.create_dot = widened


@pytest.mark.skipif(INTERPRETED, reason="it is this one")
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run here")
def test_all_by_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-rs", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


POINTERS_TO_FLOAT32 = {"offset_ptr", "mask_ptr", "by_x_ptr", "by_offset_ptr", "by_mask_ptr", "sums_ptr"}
POINTERS_TO_FLOAT32 |= {"first_ptr", "step_ptr", "by_map_ptr", "by_first_ptr"}
POINTERS_TO_INT32 = {"plane_ptr", "samples_ptr"}
SETTINGS = {
    "conv": {"KW": 3, "TAPS": 9, "MASKED": True, "DEPTHWISE": False, "PRECISION": "tf32", "BM": 64, "BN": 64, "BK": 32},
    "depthwise": {"KW": 3, "TAPS": 9, "MASKED": False, "DEPTHWISE": True, "PRECISION": "ieee"}
    | {"BM": 64, "BN": 16, "BK": 16},
    "aggregate": {"KH": 3, "KW": 3, "REMOVE_CENTER": True, "BM": 64, "BL": 16},
    "pool": {"ALL": True, "BM": 64, "BL": 16},
    "position-sensitive pool": {"ALL": False, "BM": 1024, "BL": 1},
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_kernels_compile_for_a_gpu_that_need_not_be_here(settings: str, dtype: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from segdcn.ops import triton_aggregate, triton_conv, triton_pool

    constants = SETTINGS[settings] | dict.fromkeys(("SY", "SX", "PY", "PX", "DY", "DX"), 1)
    constants |= {"FOR_INPUT": True, "FOR_POINTS": True}
    tuned = (triton_conv._forward, triton_conv._backward_data, triton_conv._backward_weight)
    kernels = [kernel.fn for kernel in tuned]
    if settings == "aggregate":
        kernels = [triton_aggregate._forward, triton_aggregate._backward]
    elif settings.endswith("pool"):
        kernels = [triton_pool._forward, triton_pool._backward]
    for kernel in kernels:
        signature: dict[str, str] = {}
        for name in kernel.arg_names:
            to = "fp32" if name in POINTERS_TO_FLOAT32 else "i32" if name in POINTERS_TO_INT32 else dtype
            pointer = f"*{to}" if name.endswith("_ptr") else None
            scalar = "fp32" if name in ("offset_scale", "margin") else "i32"
            signature[name] = "constexpr" if name in constants else pointer or scalar
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in signature}
        compiled = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 80, 32))
        assert compiled.asm["cubin"]
        assert ("mma" in compiled.asm["ptx"]) == (settings == "conv")


# Deformable convolution

CASES = {
    "more channels than a tile": Case(20, 18, (4, 5), (2, 2), n=1),
    "not square": Case(4, 3, (7, 6), (3, 2), (2, 1), (1, 0), (1, 2), offset_groups=2, n=1),
    "groups across offset groups": Case(12, 4, (3, 4), (1, 2), groups=2, offset_groups=3),
    "depthwise": Case(6, 6, (3, 5), (2, 2), padding=(1, 0), groups=6, offset_groups=2, n=1),
    "depthwise, two outputs of each input": Case(3, 6, (3, 4), (2, 1), groups=3),
    "positions of several parts": Case(2, 3, (18, 17), (1, 1), n=1),
    "no images": Case(4, 3, (5, 7), n=0),
}


@pytest.fixture(autouse=True)
def _one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the time that compiling all of them takes."""
    if torch.cuda.is_available():
        from segdcn.ops import triton_conv

        for kernel in (triton_conv._forward, triton_conv._backward_data, triton_conv._backward_weight):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        difference = (ours[name].cpu().double() - value).abs()
        assert (difference <= tolerance * value.abs().max().clamp(min=1) if value.numel() else difference).all(), name


def assert_torchvision_agrees(case: Case, masked: bool = True) -> None:
    tensors = case.tensors(torch.float32)
    if not masked:
        del tensors["mask"]
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = with_gradients(torchvision.ops.deform_conv2d, wide, **case.geometry)
    ours = with_gradients(deform_conv2d, on_device(tensors), backend="triton", **case.geometry)
    assert_same(ours, expected, 1e-5)


@where_kernels_run
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_equal_torchvision(case: Case) -> None:
    assert_torchvision_agrees(case)


@where_kernels_run
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_value_and_gradients_without_a_mask_equal_torchvision(groups: int) -> None:
    assert_torchvision_agrees(Case(4, 4, (3, 4), (1, 2), groups=groups, n=1), masked=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("groups", [1, 2, 96])
@pytest.mark.parametrize("tile", [0, 1, 2, 3, 4, None], ids=lambda tile: "timed" if tile is None else str(tile))
def test_the_tile_does_not_matter(tile: int | None, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from segdcn.ops import triton_conv

    tiles = triton_conv.TILES if tile is None else triton_conv.TILES[tile : tile + 1]
    for kernel in (triton_conv._forward, triton_conv._backward_data, triton_conv._backward_weight):
        monkeypatch.setattr(kernel, "configs", tiles)
    assert_torchvision_agrees(Case(96, 192, (13, 11), padding=(1, 1), groups=groups, n=3))


@where_kernels_run
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("groups", [1, 6])
def test_half_precision_rounds_features_but_no_coordinates(dtype: torch.dtype, rounding: float, groups: int) -> None:
    case = Case(6, 6, (2, 300), (1, 2), (1, 17), groups=groups, n=1)
    tensors = case.tensors(torch.float32)
    tensors["offset"][:, 1::2, :, :9] += 100  # where bfloat16 has steps of half a pixel
    half = {name: tensors[name].to(dtype) for name in ("input", "weight", "bias")} | {
        name: tensors[name] for name in ("offset", "mask")
    }
    wide = {name: tensor.double() for name, tensor in half.items()}
    expected = with_gradients(deform_conv2d, wide, **case.geometry)
    ours = with_gradients(deform_conv2d, on_device(half), backend="triton", **case.geometry)
    assert ours["output"].dtype == dtype
    assert all(ours[name].dtype == half[name].dtype for name in half)
    # the loss's gradient and the results are rounded too
    assert_same(ours, expected, 4 * rounding)


@where_kernels_run
@pytest.mark.parametrize("groups", [1, 4])
def test_wild_offsets_contribute_nothing(groups: int) -> None:
    tensors = Case(4, 4, (3, 7), (1, 2), groups=groups, n=1).tensors(torch.float32)
    tame = tensors | {"offset": tensors["offset"].clone()}
    tensors["offset"][:, :, 1] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e6])
    tame["offset"][:, :, 1] = -100
    result = with_gradients(deform_conv2d, on_device(tensors), backend="triton")
    expected = with_gradients(deform_conv2d, {name: tensor.double() for name, tensor in tame.items()})
    assert_same(result, expected, 1e-5)
    assert not result["offset"][:, :, 1].any()


@where_kernels_run
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("feature", [math.nan, math.inf])
def test_what_the_map_holds_does_not_reach_a_sample_outside(feature: float, groups: int) -> None:
    tensors = Case(2, 2, (3, 4), (1, 2), groups=groups, n=1).tensors(torch.float32)
    del tensors["bias"]
    tensors["input"][:] = tensors["mask"][:] = feature
    tensors["offset"][:, 1::2] = torch.tensor([math.nan, 100, -100])
    result = with_gradients(deform_conv2d, on_device(tensors), backend="triton")
    assert not any(value.any() for value in result.values())


@where_kernels_run
@pytest.mark.parametrize("wanted", ["input", "offset", "weight", "mask"])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(wanted: str) -> None:
    case = Case(4, 3, (3, 4), (1, 2), n=1)
    tensors = on_device(case.tensors(torch.float32))
    expected = with_gradients(deform_conv2d, tensors, backend="triton")
    leaves = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in tensors.items()}
    output = deform_conv2d(**leaves, backend="triton")
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output))
    torch.testing.assert_close(leaves[wanted].grad, expected[wanted])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@where_kernels_run
def test_deterministic_algorithms_have_the_same_gradients_and_repeat() -> None:
    tensors = on_device(Case(4, 3, (3, 4), (1, 2), offset_groups=2, n=1).tensors(torch.float32))
    expected = with_gradients(deform_conv2d, tensors, backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(deform_conv2d, tensors, backend="triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])


@where_kernels_run
def test_a_compiled_convolution_trains_as_one_graph() -> None:
    case = Case(4, 3, (3, 4), (1, 2), n=1)
    tensors = on_device(case.tensors(torch.float32))

    def compiled(**arguments: Tensor) -> Tensor:
        backend = "aot_eager" if INTERPRETED else "inductor"
        return torch.compile(deform_conv2d, fullgraph=True, backend=backend)(**arguments, backend="triton")

    expected = with_gradients(deform_conv2d, tensors, backend="triton")
    for name, value in with_gradients(compiled, tensors).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@where_kernels_run
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_keep_the_rules_of_custom_operators(masked: bool) -> None:
    from segdcn.ops import triton_conv

    tensors = on_device(Case(2, 3, (2, 4), (1, 2), n=1).tensors(torch.float32))
    arguments = [tensors[name].requires_grad_() for name in ("input", "offset", "weight", "mask")]
    arguments[3:] = arguments[3:] if masked else [None]
    geometry = [[1, 1], [0, 0], [1, 1]]
    torch.library.opcheck(triton_conv.triton_conv2d, (*arguments, *geometry))
    grad = torch.randn(1, 3, 2, 3, device=DEVICE)
    plain = [None if tensor is None else tensor.detach() for tensor in arguments]
    torch.library.opcheck(triton_conv.triton_conv2d_backward_data, (grad, *plain, *geometry, True, True))
    torch.library.opcheck(triton_conv.triton_conv2d_backward_weight, (grad, *plain, *geometry))


# Deformable aggregation

AGGREGATIONS = {
    "two groups": {"size": (3, 4), "images": 1},
    "without its centre": {"remove_center": True, "size": (3, 3), "images": 1},
    "not square": {
        "kernel": (3, 2),
        "stride": (2, 1),
        "padding": (1, 0),
        "dilation": (1, 2),
        "groups": 3,
        "size": (4, 3),
        "images": 1,
    },
    "a group wider than a tile": {"kernel": (1, 2), "padding": (0, 0), "channels": 140, "size": (2, 3), "images": 1},
    "one channel in each group": {"kernel": (2, 2), "padding": (0, 0), "channels": 3, "groups": 3},
    "no images": {"images": 0},
}


def geometry_of(settings: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    defaults = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return tuple(settings.get(name, default) for name, default in defaults.items())


def aggregated(maps: Tensor, offset: Tensor, mask: Tensor, settings: dict[str, Any], backend: Any) -> dict[str, Tensor]:
    geometry, remove_center = geometry_of(settings), settings.get("remove_center", False)

    names = ("kernel_size", "stride", "padding", "dilation")
    given = {"input": maps, "offset": offset, "mask": mask}
    return with_gradients(
        lambda **tensors: deform_aggregate(
            **tensors,
            **dict(zip(names, geometry, strict=True)),
            offset_scale=1.5,
            remove_center=remove_center,
            backend=backend,
        ),
        {name: tensor.detach() for name, tensor in given.items()},
    )


@where_kernels_run
@pytest.mark.parametrize("settings", AGGREGATIONS.values(), ids=AGGREGATIONS)
def test_aggregation_is_its_definition_and_gradients_equal_grid_sample(settings: dict[str, Any]) -> None:
    given = [tensor.detach().float() for tensor in some(**settings)]
    ours = aggregated(*(tensor.to(DEVICE) for tensor in given), settings, "triton")
    assert_same(ours, aggregated(*(tensor.double() for tensor in given), settings, "grid_sample"), 1e-5)
    loop = aggregate_loop(*given, *geometry_of(settings), 1.5, settings.get("remove_center", False))
    assert_same({"output": ours["output"]}, {"output": loop}, 1e-5)


@where_kernels_run
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_maps_are_read_at_exact_points(dtype: torch.dtype, rounding: float) -> None:
    settings = {"kernel": (1, 2), "stride": (1, 17), "padding": (0, 0), "size": (2, 300), "channels": 4}
    maps, offset, mask = (tensor.detach().float() for tensor in some(**settings))
    offset[:, :, :9, ::2] += 60
    expected = aggregated(maps.to(dtype).double(), offset.double(), mask.double(), settings, "grid_sample")
    ours = aggregated(maps.to(DEVICE, dtype), offset.to(DEVICE), mask.to(DEVICE), settings, "triton")
    assert ours["output"].dtype == ours["input"].dtype == dtype
    assert_same(ours, expected, 4 * rounding)


@where_kernels_run
def test_wild_offsets_of_an_aggregation_contribute_nothing() -> None:
    settings = {"kernel": (1, 2), "padding": (0, 0), "size": (3, 3), "images": 1}
    maps, offset, mask = (tensor.detach().float() for tensor in some(**settings))
    maps[:, 1:] = math.inf  # what no sample reads
    offset[..., 1::2] = -100.0
    offset[:, 0, 0, ::2] = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
    result = aggregated(maps.to(DEVICE), offset.to(DEVICE), mask.to(DEVICE), settings, "triton")
    assert not any(value.any() for value in result.values())


@where_kernels_run
def test_a_compiled_aggregation_trains_as_one_graph() -> None:
    inputs = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in some(size=(2, 2), images=1)]
    backend = "aot_eager" if INTERPRETED else "inductor"
    compiled = torch.compile(deform_aggregate, fullgraph=True, backend=backend)
    results = []
    for function in (deform_aggregate, compiled):
        output = function(*inputs, padding=1, backend="triton")
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@where_kernels_run
def test_deterministic_aggregation_is_gather() -> None:
    inputs = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in some(size=(2, 3), images=1)]
    torch.use_deterministic_algorithms(True)
    try:
        outputs = [deform_aggregate(*inputs, padding=1, backend=backend) for backend in ("triton", "gather")]
        gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *gradients))


@where_kernels_run
def test_the_aggregation_operators_keep_the_rules_of_custom_operators() -> None:
    from segdcn.ops import triton_aggregate

    settings = ([1, 2], [1, 1], [0, 0], [1, 1], 1.5, False)
    tensors = some(kernel=(1, 2), padding=(0, 0), size=(2, 3), images=1)
    inputs = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in tensors]
    torch.library.opcheck(triton_aggregate.triton_aggregate, (*inputs, *settings))
    grad = torch.randn(1, 2, 2, 6, device=DEVICE)
    plain = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(triton_aggregate.triton_aggregate_backward, (grad, *plain, *settings, True, True))


# Deformable RoI poolings; settings: size, spatial_scale, sampling_ratio; size, channels, group_size, spatial_scale,
# samples, part_size. What the gradients are compared with is gather's in float64, which finite differences confirm.

ALIGNED = {  # channels, regions, settings
    "about one sample in each pixel": (3, 4, ((2, 3), 0.5, 0)),
    "two by two samples": (2, 3, ((3, 1), 1.0, 2)),
    "more channels than a tile": (70, 2, ((1, 2), 1.0, 1)),
    "no regions": (3, 0, ((2, 2), 1.0, 0)),
    "no channels": (0, 2, ((2, 2), 1.0, 0)),
}
POSITION_SENSITIVE = {  # classes (0: no offsets), regions, settings
    "each class for itself": (2, 3, ((3, 3), 4, 3, 0.5, 2, 2)),
    "not square": (1, 3, ((2, 3), 2, 2, 1.0, 3, 3)),
    "no offsets": (0, 3, ((2, 2), 3, 2, 1.0, 2, 2)),
    "no regions": (1, 0, ((2, 2), 2, 2, 1.0, 2, 2)),
    "no channels": (1, 2, ((2, 2), 0, 2, 1.0, 2, 2)),
}
GAMMA = 0.3


def pooled(
    function: Any, maps: Tensor, rois: Tensor, offset: Tensor | None, settings: Any, backend: Any = "triton"
) -> dict[str, Tensor]:
    given = {"input": maps} if offset is None else {"input": maps, "offset": offset}
    return with_gradients(
        lambda input, offset=None: function(input, rois, offset, *settings, GAMMA, backend=backend), given
    )


def assert_pools(function: Any, given: tuple[Tensor, Tensor, Tensor | None], settings: Any, expected: Tensor) -> None:
    wide = [None if tensor is None else tensor.double() for tensor in given]
    ours = pooled(function, *(None if tensor is None else tensor.to(DEVICE) for tensor in given), settings)
    assert_same(ours, pooled(function, *wide, settings, "gather"), 1e-5)
    assert_same({"output": ours["output"]}, {"output": expected}, 1e-5)


@where_kernels_run
@pytest.mark.parametrize(("channels", "regions", "settings"), ALIGNED.values(), ids=ALIGNED)
def test_aligned_pooling_is_its_definition(channels: int, regions: int, settings: Any) -> None:
    size, scale, ratio = settings
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, channels, 5, 8, generator=generator)
    rois = some_rois(regions, 2, 5 / scale, 8 / scale).float()
    rois[:1, 3:] = rois[:1, 1:3] - 1  # turned inside out
    offset = torch.randn(regions, 2, *size, generator=generator)
    expected = aligned_loop(maps, rois, offset, size, scale, ratio, GAMMA)
    assert_pools(deform_roi_pool, (maps, rois, offset), settings, expected)


@where_kernels_run
@pytest.mark.parametrize(("classes", "regions", "settings"), POSITION_SENSITIVE.values(), ids=POSITION_SENSITIVE)
def test_position_sensitive_pooling_is_its_definition(classes: int, regions: int, settings: Any) -> None:
    size, channels, group, scale, samples, part = settings
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, channels * group**2, 5, 8, generator=generator)
    rois = some_rois(regions, 2, 5 / scale, 8 / scale).float()
    offset = torch.randn(regions, 2 * classes, part, part, generator=generator) if classes else None
    expected = position_sensitive_loop(maps, rois, offset, size, channels, group, scale, samples, part, GAMMA)
    # the function takes part_size before gamma, as the loop does
    assert_pools(deform_ps_roi_pool, (maps, rois, offset), settings, expected)


BOTH_POOLS = {"aligned": (deform_roi_pool, ((2, 2), 1.0, 0)), "ps": (deform_ps_roi_pool, ((2, 2), 2, 2, 1.0, 2, 2))}
both_pools = pytest.mark.parametrize(("function", "settings"), BOTH_POOLS.values(), ids=BOTH_POOLS)


def regions_of_a_map(dtype: torch.dtype = torch.float32, width: int = 9) -> list[Tensor]:
    """Maps of 8 channels, regions in whole pixels, offsets of 2 x 2 bins."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 8, 6, width, generator=generator).to(dtype)
    rois = torch.tensor([[0, width - 8.0, 1, width - 2, 5], [1, 0, 0, 8, 5]])
    return [tensor.to(DEVICE) for tensor in (maps, rois, torch.randn(2, 2, 2, 2, generator=generator))]


@where_kernels_run
@both_pools
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_maps_are_pooled_at_exact_points(
    function: Any, settings: Any, dtype: torch.dtype, rounding: float
) -> None:
    maps, rois, offset = regions_of_a_map(dtype, 2100)
    expected = pooled(function, *(tensor.cpu().double() for tensor in (maps, rois, offset)), settings, "gather")
    ours = pooled(function, maps, rois, offset, settings)
    assert [ours[name].dtype for name in ("output", "input", "offset")] == [dtype, dtype, torch.float32]
    assert_same(ours, expected, 4 * rounding)


@where_kernels_run
@both_pools
def test_wild_offsets_of_a_pooling_contribute_nothing(function: Any, settings: Any) -> None:
    maps, rois, offset = regions_of_a_map()
    wild = torch.tensor([[math.nan, math.inf], [-math.inf, 1e30]])
    offset[0, 0], offset[1, 1] = wild, -1e6 * wild
    result = pooled(function, maps.fill_(math.inf), rois, offset, settings)
    assert not any(value.any() for value in result.values())


@where_kernels_run
@both_pools
@pytest.mark.parametrize("wanted", [0, 2])
def test_a_gradient_of_pooling_does_not_depend_on_the_other(function: Any, settings: Any, wanted: int) -> None:
    tensors = regions_of_a_map()
    expected = pooled(function, *tensors, settings)[("input", "", "offset")[wanted]]
    tensors[wanted].requires_grad_()
    output = function(*tensors, *settings, GAMMA, backend="triton")
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output))
    torch.testing.assert_close(tensors[wanted].grad, expected)


@where_kernels_run
@both_pools
def test_a_compiled_pooling_trains_as_one_graph(function: Any, settings: Any) -> None:
    backend = "aot_eager" if INTERPRETED else "inductor"
    tensors = regions_of_a_map()
    expected = pooled(function, *tensors, settings)
    compiled = pooled(torch.compile(function, fullgraph=True, backend=backend), *tensors, settings)
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-4)


@where_kernels_run
def test_deterministic_pooling_is_gather() -> None:
    tensors = regions_of_a_map()
    torch.use_deterministic_algorithms(True)
    try:
        ours, gather = (pooled(deform_roi_pool, *tensors, ((2, 2), 1.0, 0), each) for each in ("triton", "gather"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours[name], value) for name, value in gather.items())


@where_kernels_run
@pytest.mark.parametrize("layer", [DeformRoIPool(8, 2, backend="triton"), DeformPSRoIPool(8, 4, 2, backend="triton")])
def test_a_layer_pools_by_the_backend_that_it_is_told(layer: torch.nn.Module) -> None:
    layer, (maps, rois, _) = layer.to(DEVICE), regions_of_a_map()
    with pytest.raises(ValueError, match="backend triton computes in float32"):
        layer.double()(maps.double(), rois)
    assert "backend='triton'" in repr(layer)
    ours = layer.float()(maps, rois)
    layer.backend = "auto"
    torch.testing.assert_close(ours, layer(maps, rois), rtol=1e-4, atol=1e-5)


@where_kernels_run
def test_the_pooling_operators_keep_the_rules_of_custom_operators() -> None:
    from segdcn.ops import triton_pool

    points = {
        "plane": torch.tensor([[0, 1], [3, 2]]),
        "first": torch.rand(2, 2, 1, 2),
        "step": torch.rand(2, 2),
        "samples": torch.tensor([[1, 2], [2, 1]]),
    }
    maps = torch.randn(2, 2, 3, 3, 2, device=DEVICE)
    points = on_device(points)
    plain = (maps.clone(), *(tensor.clone() for tensor in points.values()), 0.5, False)
    maps.requires_grad_()
    points["first"].requires_grad_()
    torch.library.opcheck(triton_pool._pool, (maps, *points.values(), 0.5, False))
    torch.library.opcheck(triton_pool._pool_backward, (torch.randn(2, 2, 2, device=DEVICE), *plain, True, True))


# What is refused


@where_kernels_run
def test_float64_is_refused() -> None:
    tensors = on_device(Case(4, 3, (5, 7)).tensors())
    with pytest.raises(ValueError, match=r"backend triton computes in float32 or half precision, got torch.float64"):
        deform_conv2d(**tensors, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="it runs on a CPU")
def test_a_cpu_is_refused() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="backend triton needs input on a CUDA device, got cpu; take another backend"):
        deform_conv2d(**Case(4, 3, (5, 7)).tensors(torch.float32), backend="triton")


def test_a_machine_without_triton_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "segdcn.ops.triton_sampling", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="backend triton needs the package triton, which PyTorch for CUDA brings"):
        deform_conv2d(**Case(4, 3, (5, 7)).tensors(torch.float32), backend="triton")
