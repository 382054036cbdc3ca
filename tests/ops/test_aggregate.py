"""Deformable aggregation against a loop written from the authors' facts, and DCNv3 and DCNv4 built of it."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segdcn.ops import DCNv3, DCNv4, aggregate, deform_aggregate
from segdcn.ops.aggregate import AggregateBackend

BACKENDS = ("gather", "grid_sample")
assert {*BACKENDS, "auto", "triton"} == set(get_args(AggregateBackend))  # test_triton.py has the kernels of Triton


def aggregate_loop(
    maps: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    remove_center: bool,
) -> Tensor:
    """The authors' kernel, position by position: taps run down the columns, offsets are (x, y)."""
    _, height, width, channels = maps.shape
    taps = [
        (x, y)
        for x in range(kernel[1])
        for y in range(kernel[0])
        if not (remove_center and x == kernel[1] // 2 and y == kernel[0] // 2)
    ]
    groups = mask.shape[3] // len(taps)
    per_group = channels // groups
    output = torch.zeros(*offset.shape[:3], channels, dtype=torch.float64)
    centre = [dilation[i] * (kernel[i] - 1) // 2 for i in (0, 1)]
    for image, row, column, group in itertools.product(*map(range, (*offset.shape[:3], groups))):
        for k, (tap_x, tap_y) in enumerate(taps):
            number = group * len(taps) + k
            dx, dy = (offset[image, row, column, 2 * number + axis].item() for axis in (0, 1))
            x = column * stride[1] - padding[1] + centre[1] - centre[1] * scale + (tap_x * dilation[1] + dx) * scale
            y = row * stride[0] - padding[0] + centre[0] - centre[0] * scale + (tap_y * dilation[0] + dy) * scale
            if not (-1 < x < width and -1 < y < height):
                continue
            left, top = math.floor(x), math.floor(y)
            for at_y, at_x in itertools.product((top, top + 1), (left, left + 1)):
                if 0 <= at_y < height and 0 <= at_x < width:
                    weight = (1 - abs(y - at_y)) * (1 - abs(x - at_x)) * mask[image, row, column, number].item()
                    of_group = slice(group * per_group, (group + 1) * per_group)
                    output[image, row, column, of_group] += weight * maps[image, at_y, at_x, of_group].double()
    return output


def some(
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    remove_center: bool = False,
    groups: int = 2,
    images: int = 2,
    size: tuple[int, int] = (5, 6),
    channels: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """A map, offsets of some pixels and masks of both signs, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    points = groups * (kernel[0] * kernel[1] - remove_center)
    shapes = ((images, *size, channels), (images, *out, points * 2), (images, *out, points))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[1] *= 2
    maps, offset, mask = (each.to(dtype).requires_grad_() for each in made)
    return maps, offset, mask


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
    groups=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 999),
)
def test_aggregation_is_its_definition(
    backend: AggregateBackend,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    groups: int,
    seed: int,
) -> None:
    geometry = (kernel, stride, padding, dilation)
    maps, offset, mask = (t.detach() for t in some(*geometry, groups=groups, size=(7, 8), seed=seed))
    ours = deform_aggregate(maps, offset, mask, *geometry, scale, backend=backend)
    torch.testing.assert_close(ours, aggregate_loop(maps, offset, mask, *geometry, scale, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_its_centre_a_kernel_has_one_point_less(backend: AggregateBackend) -> None:
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    maps, offset, mask = (t.detach() for t in some(remove_center=True))
    expected = aggregate_loop(maps, offset, mask, *geometry, 1.5, True)
    ours = deform_aggregate(maps, offset, mask, *geometry, 1.5, remove_center=True, backend=backend)
    torch.testing.assert_close(ours, expected)


def test_equal_masks_without_offsets_average_the_neighbours() -> None:
    maps = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    mask = torch.full((1, 4, 5, 2 * 9), 1 / 9, dtype=torch.float64)
    ours = deform_aggregate(maps, torch.zeros(1, 4, 5, 2 * 18, dtype=torch.float64), mask, padding=1)
    expected = nn.functional.avg_pool2d(maps.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, expected)


def test_an_offset_of_one_pixel_to_the_right_reads_there() -> None:
    maps = torch.arange(20.0).view(1, 4, 5, 1)
    offset = torch.tensor([1.0, 0.0]).expand(1, 4, 5, 2)
    ours = deform_aggregate(maps, offset, torch.ones(1, 4, 5, 1), kernel_size=1)
    expected = torch.cat((maps[:, :, 1:], torch.zeros(1, 4, 1, 1)), dim=2)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("scale", "remove_center"), [(1.0, False), (1.7, True)])
def test_gradients_equal_finite_differences(scale: float, remove_center: bool) -> None:
    inputs = some(remove_center=remove_center, images=1, size=(4, 3), channels=4)
    assert torch.autograd.gradcheck(
        lambda *t: deform_aggregate(*t, 3, 1, 1, offset_scale=scale, remove_center=remove_center), inputs
    )


def test_both_backends_have_the_same_gradients() -> None:
    inputs, gradients = some(stride=(2, 1)), []
    for backend in BACKENDS:
        output = deform_aggregate(*inputs, 3, (2, 1), 1, backend=cast(AggregateBackend, backend))
        gradients.append(torch.autograd.grad(output.square().sum(), inputs))
    torch.testing.assert_close(*gradients)


def test_positions_that_memory_keeps_apart_are_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some()

    def results() -> list[Tensor]:
        output = deform_aggregate(*inputs, padding=1)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    together = results()
    monkeypatch.setattr(aggregate, "TILE", 1)
    torch.testing.assert_close(results(), together)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_wild_offsets_contribute_nothing(backend: AggregateBackend, wild: float) -> None:
    maps, offset, mask = some(dtype=torch.float32)
    with torch.no_grad():
        offset[0, 2, 3, :2] = wild  # of one point, and the map holds what must not reach it
        mask_without = mask.detach().clone()
        mask_without[0, 2, 3, 0] = 0
        tame = offset.detach().clone()
        tame[0, 2, 3, :2] = 0
    output = deform_aggregate(maps, offset, mask, padding=1, backend=backend)
    torch.testing.assert_close(output, deform_aggregate(maps, tame, mask_without, padding=1, backend=backend))
    for gradient in torch.autograd.grad(output.square().sum(), (maps, offset, mask)):
        assert gradient.isfinite().all()


def test_nothing_of_the_map_reaches_a_sample_outside() -> None:
    maps, offset, mask = some()
    with torch.no_grad():
        offset.fill_(100.0)
        maps.fill_(math.inf)
    assert not deform_aggregate(maps, offset, mask, padding=1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_read_at_exact_points(dtype: torch.dtype) -> None:
    maps, offset, mask = (t.detach() for t in some(size=(4, 300), channels=8, dtype=torch.float32))
    expected = deform_aggregate(maps.to(dtype).float(), offset, mask, padding=1)
    ours = deform_aggregate(maps.to(dtype), offset, mask, padding=1)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 0.02)


def test_no_images_give_nothing_and_gradients_of_zeros() -> None:
    inputs = some(images=0)
    output = deform_aggregate(*inputs, padding=1)
    assert output.shape == (0, 5, 6, 6)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
        assert gradient.shape == tensor.shape


def test_the_operator_keeps_the_rules_of_custom_operators() -> None:
    settings = ([3, 3], [1, 1], [1, 1], [1, 1], 1.0, False)
    inputs = some(dtype=torch.float32)
    torch.library.opcheck(aggregate._aggregate, (*inputs, *settings))
    grad = torch.randn(2, 5, 6, 6)
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(aggregate._aggregate_backward, (grad, *detached, *settings, [True, True, True]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2, 5, 6, 17)}, "mask must have 9 channels per group, the groups dividing 6"),
        ({"mask": torch.ones(2, 5, 6, 36)}, "the groups dividing 6 input channels, got 36"),
        ({"offset": torch.ones(2, 5, 6, 18)}, "offset must be"),
        ({"offset": torch.ones(2, 5, 5, 36)}, "offset must be"),
        ({"input": torch.ones(2, 5, 6)}, "channels last"),
        ({"input": torch.ones(2, 0, 6, 6)}, "at least one pixel"),
        ({"stride": 0}, "stride must be 1 or more"),
        ({"padding": -1}, "padding must be 0 or more"),
        ({"kernel_size": 9}, "smaller than the kernel"),
        ({"kernel_size": 2, "remove_center": True}, "odd and not 1 x 1"),
        ({"backend": "cuda"}, "backend must be auto, gather, grid_sample or triton"),
    ],
)
def test_a_wrong_argument_is_told_by_its_name(changes: dict[str, Any], message: str) -> None:
    maps, offset, mask = (t.detach() for t in some(dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        deform_aggregate(**{"input": maps, "offset": offset, "mask": mask, "padding": 1, **changes})


# The layers

LAYERS: dict[str, Any] = {
    "v3": lambda: DCNv3(32, group=4),
    "v3 of InternImage-H": lambda: DCNv3(
        32, group=4, kernel_size=3, dw_kernel_size=5, offset_scale=2.0, center_feature_scale=True
    ),
    "v4": lambda: DCNv4(32, group=2),
    "v4 with all": lambda: DCNv4(
        32, group=4, kernel_size=3, dw_kernel_size=3, center_feature_scale=True, remove_center=True, output_bias=False
    ),
}
layers = pytest.mark.parametrize("name", LAYERS)


def trained(name: str) -> nn.Module:
    """A layer whose branches are no longer at zero."""
    torch.manual_seed(0)
    layer: nn.Module = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


# name -> shape, as in files of the authors
NAMES = {
    "v3": {
        "dw_conv.0.weight": (32, 1, 3, 3),
        "dw_conv.0.bias": (32,),
        "dw_conv.1.1.weight": (32,),
        "dw_conv.1.1.bias": (32,),
        "offset.weight": (72, 32),
        "offset.bias": (72,),
        "mask.weight": (36, 32),
        "mask.bias": (36,),
        "input_proj.weight": (32, 32),
        "input_proj.bias": (32,),
        "output_proj.weight": (32, 32),
        "output_proj.bias": (32,),
    },
    "v4": {
        "offset_mask.weight": (56, 32),  # 54 and 2 of no meaning
        "offset_mask.bias": (56,),
        "value_proj.weight": (32, 32),
        "value_proj.bias": (32,),
        "output_proj.weight": (32, 32),
        "output_proj.bias": (32,),
    },
    "v4 with all": {
        "center_feature_scale_proj_weight": (4, 32),
        "center_feature_scale_proj_bias": (4,),
        "offset_mask_dw.weight": (32, 1, 3, 3),
        "offset_mask_dw.bias": (32,),
        "offset_mask.weight": (96, 32),
        "offset_mask.bias": (96,),
        "value_proj.weight": (32, 32),
        "value_proj.bias": (32,),
        "output_proj.weight": (32, 32),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_authors_names(name: str) -> None:
    assert {key: tuple(value.shape) for key, value in LAYERS[name]().state_dict().items()} == NAMES[name]


def test_an_untrained_v3_averages_the_projected_neighbours() -> None:
    layer, x = DCNv3(32, group=4), torch.randn(2, 5, 6, 32)
    mean = nn.functional.avg_pool2d(layer.input_proj(x).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.output_proj(mean))


@pytest.mark.parametrize("remove_center", [False, True])
def test_v3_is_its_formula(remove_center: bool) -> None:
    torch.manual_seed(0)
    layer = DCNv3(8, group=2, offset_scale=1.5, center_feature_scale=True, remove_center=remove_center)
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        query, projected = layer.dw_conv(x.permute(0, 3, 1, 2)), layer.input_proj(x)
        points = 9 - remove_center
        mask = layer.mask(query).view(1, 4, 5, 2, points).softmax(-1).flatten(3)
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1.5, remove_center)
        aggregated = aggregate_loop(projected, layer.offset(query), mask, *geometry)
        logit = query @ layer.center_feature_scale_proj_weight.T + layer.center_feature_scale_proj_bias
        share = logit.sigmoid()[..., [0] * 4 + [1] * 4]
        expected = layer.output_proj(aggregated * (1 - share) + projected * share)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("remove_center", [False, True])
def test_v4_is_its_formula(remove_center: bool) -> None:
    torch.manual_seed(0)
    layer = DCNv4(
        8, group=2, dw_kernel_size=3, offset_scale=0.5, center_feature_scale=True, remove_center=remove_center
    )
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        projected = layer.value_proj(x)
        assert layer.offset_mask_dw is not None
        values = layer.offset_mask(layer.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        points = 9 - remove_center
        groups = [values[..., group * 3 * points :][..., : 3 * points] for group in (0, 1)]
        offset = torch.cat([each[..., : 2 * points] for each in groups], dim=-1)
        mask = torch.cat([each[..., 2 * points :] for each in groups], dim=-1)  # no softmax
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 0.5, remove_center)
        aggregated = aggregate_loop(projected, offset, mask, *geometry)
        logit = aggregated @ layer.center_feature_scale_proj_weight.T + layer.center_feature_scale_proj_bias
        share = logit.sigmoid()[..., [0] * 4 + [1] * 4]
        expected = layer.output_proj(aggregated * (1 - share) + projected * share)
        torch.testing.assert_close(layer(x), expected)


def test_v4_without_linear_maps_is_the_aggregation_alone() -> None:
    layer = DCNv4(32, group=2, without_pointwise=True)
    assert set(layer.state_dict()) == {"offset_mask.weight", "offset_mask.bias"}
    assert not layer(torch.randn(1, 4, 5, 32)).any()  # masks start at zero


@layers
def test_a_new_layer_learns_where_to_look(name: str) -> None:
    layer = LAYERS[name]()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 7, 32, generator=generator)
    target = x.roll((1, 1), (1, 2))
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    branch = layer.offset if isinstance(layer, DCNv3) else layer.offset_mask
    assert branch.weight.any()


@layers
def test_a_compiled_layer_trains_as_one_graph(name: str) -> None:
    layer, x = trained(name), torch.randn(1, 5, 6, 32)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()), allow_unused=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()), allow_unused=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@layers
def test_an_exported_layer_takes_any_number_of_images_and_any_size(name: str) -> None:
    layer = trained(name).eval()
    dynamic = {"input": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}}
    program = torch.export.export(layer, (torch.randn(2, 5, 6, 32),), dynamic_shapes=dynamic)
    assert not any("segdcn" in str(node.target) for node in program.graph.nodes)  # common operators alone
    for shape in ((2, 5, 6, 32), (3, 8, 4, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


@layers
def test_state_survives_a_file_of_plain_tensors(name: str) -> None:
    layer, file = trained(name), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, x = LAYERS[name](), torch.randn(1, 4, 5, 32)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@layers
def test_autocast_keeps_the_coordinates_exact(name: str) -> None:
    layer, x = trained(name), torch.randn(1, 4, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    exact = layer(x)
    assert (output.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_a_wrong_setting_is_told(kind: Any) -> None:
    with pytest.raises(ValueError, match="group must divide the 30 channels, got 4"):
        kind(30, group=4)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        kind(32, kernel_size=4)
    assert kind(24, group=4)(torch.randn(1, 4, 5, 24)).shape == (1, 4, 5, 24)  # a width that the authors' v4 refuses


def test_a_file_of_v3_does_not_fit_v4() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*offset_mask\.weight"):
        DCNv4(32).load_state_dict(DCNv3(32).state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_repr_tells_how_a_layer_aggregates(name: str) -> None:
    assert "32, kernel_size=3, dilation=1, group=" in repr(LAYERS[name]())
