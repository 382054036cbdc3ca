"""segdcn.load: images of any kind and size to labels, without Hydra and Lightning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FirstRun
from handmade import tiff
from miniatures import noise
from numpy.typing import NDArray
from PIL import Image
from running import process

import segdcn
from segdcn.data.transforms import EvalTransform
from segdcn.inference import Inference
from segdcn.inference.photographs import as_rgb, read_photo
from segdcn.inference.predictor import Predictor
from segdcn.inference.windows import slide_classes

Array = NDArray[Any]


@pytest.fixture(scope="module")
def checkpoint(first_run: FirstRun) -> Path:
    return first_run.folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return segdcn.load(checkpoint, device="cpu")


def test_importing_segdcn_is_light_and_predicting_needs_no_hydra(checkpoint: Path, tmp_path: Path) -> None:
    script = f"""
import json, sys
import segdcn
light = set(sys.modules)
import numpy as np
segdcn.load({str(checkpoint)!r}, device="cpu")(np.zeros((40, 50, 3), np.uint8))
heavy = ("torch", "numpy", "cv2", "PIL", "hydra", "omegaconf", "pytorch_lightning", "lightning_fabric")
print(json.dumps([[m for m in heavy if m in found] for found in (light, set(sys.modules))]))
"""
    ended = process(tmp_path, "-c", script)
    assert ended.returncode == 0, ended.stderr
    after_import, after_prediction = json.loads(ended.stdout)
    assert after_import == []
    assert after_prediction == ["torch", "numpy", "cv2", "PIL"]


def test_labels_and_probabilities_are_those_of_the_network(predictor: Predictor) -> None:
    image = noise(72, 96)
    with torch.inference_mode():
        tensor, _ = EvalTransform()(image, np.zeros(image.shape[:2], np.uint8))
        logits = predictor.network(tensor[None])[0]
    result = predictor(image)
    np.testing.assert_array_equal(result.labels, logits.argmax(0).numpy())
    assert result.labels.dtype == np.uint8
    assert len(np.unique(result.labels)) > 1
    assert result.probabilities.dtype == np.float32
    np.testing.assert_allclose(result.probabilities, logits.softmax(0).numpy(), atol=1e-6)
    np.testing.assert_array_equal(predictor(image, probabilities=True).probabilities, result.probabilities)
    assert result.inference == "whole image, single scale"
    assert result.class_names[0] == "background"


def test_probabilities_are_computed_once_and_only_when_asked_for(checkpoint: Path) -> None:
    predictor, runs = segdcn.load(checkpoint, device="cpu"), []
    predictor.network.register_forward_hook(lambda *_: runs.append(1))
    result = predictor(noise(40, 40))
    assert len(runs) == 1
    assert result.probabilities is result.probabilities
    assert len(runs) == 2
    assert predictor(noise(40, 40), probabilities=True).probabilities.shape == (6, 40, 40)
    assert len(runs) == 3


def test_a_list_may_mix_kinds_and_sizes(predictor: Predictor, tmp_path: Path) -> None:
    image, other = noise(40, 64), noise(56, 48, seed=1)
    Image.fromarray(other).save(tmp_path / "other.png")
    results = predictor([image, tmp_path / "other.png", str(tmp_path / "other.png")])
    for result, pixels in zip(results, (image, other, other), strict=True):
        np.testing.assert_array_equal(result.labels, predictor(pixels).labels)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 70), (33, 47)])
def test_any_size(predictor: Predictor, size: tuple[int, int]) -> None:
    result = predictor(noise(*size))
    assert result.labels.shape == size
    assert result.overlay().width >= size[1]
    assert result.overlay(legend="none").size == size[::-1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "RGB"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_every_kind_of_file_is_its_rgb_image(tmp_path: Path, mode: str, suffix: str) -> None:
    if suffix == ".jpg" and mode in ("RGBA", "LA", "P", "1", "I;16"):
        return
    if suffix == ".png" and mode == "CMYK":
        return
    rgb, path = noise(40, 56), tmp_path / f"image{suffix}"
    grey = noise(40, 56, 1)[..., 0]
    alpha = Image.fromarray(noise(40, 56, 1, seed=3)[..., 0])
    if mode == "L":
        picture, expected = Image.fromarray(grey), np.repeat(grey[..., None], 3, 2)
    elif mode == "I;16":
        picture, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)
    elif mode == "1":
        bits = grey > 127
        picture, expected = Image.fromarray(bits), np.repeat(255 * bits[..., None].astype(np.uint8), 3, 2)
    elif mode == "LA":
        picture, expected = Image.merge("LA", (Image.fromarray(grey), alpha)), np.repeat(grey[..., None], 3, 2)
    elif mode == "RGBA":
        picture, expected = Image.merge("RGBA", (*Image.fromarray(rgb).split(), alpha)), rgb
    elif mode == "P":
        picture = Image.fromarray(grey // 16)
        table = np.random.default_rng(2).integers(0, 256, (16, 3), np.uint8)
        picture.putpalette(table.ravel().tolist())
        expected = table[grey // 16]
    elif mode == "CMYK":
        picture = Image.fromarray(255 - np.dstack([rgb, np.full(grey.shape, 255, np.uint8)]), "CMYK")
        expected = rgb
    else:
        picture, expected = Image.fromarray(rgb), rgb
    assert picture.mode == mode
    picture.save(path, **({"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}))
    difference = np.abs(read_photo(path).astype(int) - expected)
    assert difference.max() <= (6 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    """What a camera stores for an upright scene, by the meaning of each number in the EXIF standard."""
    upright = noise(40, 64)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_photo(tmp_path / "turned.png"), upright)


def test_arrays_of_every_kind_are_their_rgb_image() -> None:
    rgb, grey = noise(40, 56), noise(40, 56, 1)
    alpha = np.dstack([rgb, grey])
    np.testing.assert_array_equal(as_rgb(alpha), rgb)
    np.testing.assert_array_equal(as_rgb(rgb.astype(np.uint16) * 257), rgb)
    for one in (grey, grey[..., 0]):
        np.testing.assert_array_equal(as_rgb(one), np.repeat(grey, 3, 2))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)],
)
def test_other_arrays_are_refused(predictor: Predictor, pixels: Array) -> None:
    with pytest.raises(ValueError, match=r"must be .* uint8 or uint16 of shape .* got an array: (float64|uint8) \("):
        predictor(pixels)


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (torch.zeros(3, 4, 4), r"a tensor: torch\.float32 \(3, 4, 4\); multiply values of 0\.\.1 by 255"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"a tensor: torch\.uint8 \(4, 4, 3\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"a tensor: torch\.uint8 \(1, 3, 4, 4\)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), r"an array: uint8 \(0, 4, 3\)"),
        (Image.new("RGB", (0, 4)), r"an array: uint8 \(4, 0, 3\)"),
        (b"photo.jpg", "bytes"),
        (None, "NoneType"),
    ],
)
def test_what_else_is_given_is_refused_by_what_is_taken(predictor: Predictor, image: Any, got: str) -> None:
    kinds = r"^an image must be a file's path, a PIL image, an array .*, or a tensor that is uint8 of shape \(3, H, W\)"
    with pytest.raises(ValueError, match=rf"{kinds}.*, got {got}$"):
        predictor(image)


def test_a_pil_image_is_its_file(predictor: Predictor, tmp_path: Path) -> None:
    """Orientation, palette, alpha, 16 bits; opened, loaded or made."""
    rgb, grey = noise(40, 64), noise(40, 64, 1)[..., 0]
    indexed = Image.fromarray(grey // 16)
    indexed.putpalette(np.random.default_rng(2).integers(0, 256, (16, 3), np.uint8).ravel().tolist())
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "turned.png": Image.fromarray(rgb),
        "turned.tif": Image.fromarray(rgb),
        "palette.png": indexed,
        "alpha.png": Image.fromarray(np.dstack([rgb, grey])),
        "wide.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, picture in pictures.items():
        path = tmp_path / name
        picture.save(
            path, **({"exif": exif} if name.startswith("turned") else {"transparency": 3} if name[0] == "p" else {})
        )
        expected = read_photo(path)
        with Image.open(path) as image:
            np.testing.assert_array_equal(predictor(image).image, expected)
            np.testing.assert_array_equal(predictor(image).image, expected)  # it is loaded now
        if not name.startswith("turned"):
            np.testing.assert_array_equal(predictor(picture).image, expected)
    (tmp_path / "bands.tif").write_bytes(tiff(noise(8, 8, 5), photometric=2, tags={338: [0, 0]}))
    (tmp_path / "short.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:-200])
    for name, reason in {"bands.tif": r"holds 5 band\(s\)", "short.png": "cannot be read as an image"}.items():
        with pytest.raises(ValueError, match=f"^the PIL image {reason}"), Image.open(tmp_path / name) as image:
            predictor(image)


def test_a_page_of_a_stack_is_the_one_where_the_pil_image_stands(predictor: Predictor, tmp_path: Path) -> None:
    pages = [noise(24, 32, seed=number) for number in range(3)]
    (tmp_path / "stack.tif").write_bytes(tiff(pages, photometric=2))
    with Image.open(tmp_path / "stack.tif") as image:
        for number in (2, 0, 1):
            image.seek(number)
            np.testing.assert_array_equal(predictor(image).image, pages[number])


def test_a_tensor_is_its_array(predictor: Predictor) -> None:
    rgb = torch.from_numpy(noise(40, 64)).permute(2, 0, 1)
    for tensor in (rgb, rgb[:1], rgb[0], rgb[:, ::2].requires_grad_(False)):
        array = tensor.numpy() if tensor.ndim == 2 else tensor.permute(1, 2, 0).numpy()
        result = predictor(tensor)
        np.testing.assert_array_equal(result.image, as_rgb(array))
        np.testing.assert_array_equal(result.labels, predictor(array).labels)


def test_bits_of_the_training_are_those_of_the_prediction(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    for bits, known in ((12, 12), ("many", None)):  # of a user's own data set it may mean anything
        state["segdcn"]["groups"]["dataset"]["bits"] = bits
        torch.save(state, tmp_path / "other.ckpt")
        assert segdcn.load(tmp_path / "other.ckpt", device="cpu").bits == known
    predictor = segdcn.load(tmp_path / "other.ckpt", device="cpu")
    predictor.bits = 12
    pixels = noise(40, 64, 1)[..., 0].astype(np.uint16) * 16
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    expected = np.repeat((pixels.astype(int) * 255 // 4095)[..., None], 3, axis=2)
    with Image.open(tmp_path / "scan.png") as image:
        for one in (tmp_path / "scan.png", str(tmp_path / "scan.png"), image, pixels):
            np.testing.assert_array_equal(predictor(one).image, expected)
    with pytest.raises(ValueError, match=r"^the array holds a pixel of 5000, beyond the 0\.\.4095 of bits=12"):
        predictor(np.full((4, 4), 5000, np.uint16))


@pytest.mark.parametrize("size", [(200, 250), (100, 65), (64, 300), (65, 64)])
def test_large_images_are_seen_by_windows_with_the_classes_of_the_averaged_logits(
    checkpoint: Path, size: tuple[int, int]
) -> None:
    predictor = segdcn.load(checkpoint, device="cpu", max_pixels=64 * 64)
    image = noise(*size)
    result = predictor(image)
    assert result.inference == "window 64×64, stride 43×43, single scale"
    expected = segdcn.load(checkpoint, device="cpu", inference=Inference(window=(64, 64)))(image, probabilities=True)
    np.testing.assert_array_equal(result.labels, expected.probabilities.argmax(0))
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)


@pytest.mark.slow
def test_an_image_beyond_pillows_limit_takes_little_more_than_its_own_pixels(tmp_path: Path) -> None:
    """180 megapixels by windows, in a process of their own; a network that tells dark from bright."""
    bright = np.zeros((13_400, 13_400), bool)
    bright[5000:6000, 7000:] = True
    Image.fromarray(bright).save(tmp_path / "large.png")
    np.save(tmp_path / "bright.npy", bright)
    script = """
import resource, sys
import numpy as np, torch
from segdcn.data.transforms import EvalTransform
from segdcn.inference.predictor import Predictor
network = torch.nn.Conv2d(3, 2, 1)
with torch.no_grad():
    network.weight[0], network.weight[1], network.bias[:] = -1, 1, 0
predictor = Predictor(network, ["dark", "bright"], [(0, 0, 0), (9, 9, 9)], EvalTransform(), max_pixels=1024**2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = predictor("large.png")
taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / result.labels.size
assert (result.labels == np.load("bright.npy")).all()
print(result.inference, taken)
"""
    ended = process(tmp_path, "-c", script)
    assert ended.returncode == 0, ended.stderr
    words, _, taken = ended.stdout.rpartition(" ")
    assert words == "window 1024×1024, stride 683×683, single scale"
    assert float(taken) < 8  # bytes a pixel, of which three are the image's and one is the labels'


def test_maps_that_no_memory_holds_are_refused_before_they_are_made(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = segdcn.load(checkpoint, device="cpu", inference=Inference(window=(64, 64)))
    monkeypatch.setattr("segdcn.inference.predictor.free_memory", lambda device: 1_000_000)
    image = noise(200, 250)
    result = predictor(image)  # its labels need no such maps
    with pytest.raises(ValueError, match=r"^too large: 250×200 pixels need about 0\.0 GB .*: leave out probabilities"):
        _ = result.probabilities
    with pytest.raises(ValueError, match=r"^too large: 250×200 pixels"):
        predictor(image, probabilities=True)


def test_windows_leave_no_seam_where_the_network_looks_at_single_pixels() -> None:
    """The one network whose windows must agree with the whole image everywhere."""
    network = torch.nn.Conv2d(3, 5, 1).double()
    image = torch.randn(2, 3, 45, 71, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = network(image).argmax(1)
        for window, stride in (((16, 16), (11, 11)), ((16, 100), (16, 100)), ((100, 9), (5, 2)), ((45, 71), (3, 3))):
            assert torch.equal(slide_classes(network, image, window, stride).long(), whole)


def test_a_window_is_chosen_by_the_memory_that_is_free(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segdcn.inference.predictor.free_memory", lambda device: 8 << 30)
    assert predictor._inference_for(2000, 1500).window is None
    monkeypatch.setattr("segdcn.inference.predictor.free_memory", lambda device: 0)
    assert predictor._inference_for(2000, 1500).window == (512, 512)
    assert predictor._inference_for(512, 512).window is None
    half = 2 * 2000 * 750 * predictor._bytes_per_pixel
    monkeypatch.setattr("segdcn.inference.predictor.free_memory", lambda device: half)
    window = predictor._inference_for(2000, 1500).window
    assert window is not None
    assert 1150 < window[0] == window[1] <= np.sqrt(2000 * 750)


def test_the_overlay_blends_and_names_the_classes(predictor: Predictor) -> None:
    result = predictor(noise(96, 128))
    picture = np.asarray(result.overlay(alpha=1))
    palette = np.asarray(result.palette, np.uint8)
    np.testing.assert_array_equal(picture[:96, :128], palette[result.labels])
    assert picture.shape[0] > 96
    legend = picture[96:]
    for label, colour in enumerate(palette):
        shown = (legend == colour).all(axis=2).sum() >= 100
        assert shown == (label in result.labels)
    np.testing.assert_array_equal(np.asarray(result.overlay(alpha=0, legend="none")), result.image)
    with pytest.raises(ValueError, match="alpha must be in"):
        result.overlay(alpha=2)


def test_bad_checkpoints_and_devices_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint file at nowhere"):
        segdcn.load("nowhere.ckpt")
    (tmp_path / "short.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short.ckpt cannot be read as a checkpoint"):
        segdcn.load(tmp_path / "short.ckpt")
    with pytest.raises(ValueError, match=r"^device=abacus cannot be used here: .*$"):
        segdcn.load(checkpoint, device="abacus")
    state = torch.load(checkpoint, weights_only=True)
    state["segdcn"]["groups"]["model"]["head_channels"] = 24
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt does not fit its network, [^\n]*head[^\n]*$"):
        segdcn.load(tmp_path / "other.ckpt")


def test_a_checkpoint_calls_nothing_but_our_networks(checkpoint: Path, tmp_path: Path, predictor: Predictor) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["segdcn"]["groups"]["model"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'called'}"}
    torch.save(state, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"own.ckpt .*os.system.*trust"):
        segdcn.load(tmp_path / "own.ckpt")
    assert not (tmp_path / "called").exists()
    own = segdcn.load(tmp_path / "own.ckpt", device="cpu", network=predictor.network)
    np.testing.assert_array_equal(own(noise(40, 40)).labels, predictor(noise(40, 40)).labels)


def test_normalisation_of_the_training_is_that_of_the_prediction(
    checkpoint: Path, tmp_path: Path, predictor: Predictor
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["segdcn"]["groups"]["datamodule"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    torch.save(state, tmp_path / "other.ckpt")
    image = noise(48, 48)
    with torch.inference_mode():
        tensor = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        expected = predictor.network(tensor).softmax(1)[0].numpy()
    found = segdcn.load(tmp_path / "other.ckpt", device="cpu")(image).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - predictor(image).probabilities).max() > 1e-3
