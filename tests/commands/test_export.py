"""segdcn-export: files that run without this package, what they say of themselves, and what is left when they fail."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import FirstRun
from miniatures import noise
from PIL import Image
from running import call, one_line, process, real_camvid
from test_predict import trained

import segdcn
from segdcn.commands.errors import TRY_AGAIN
from segdcn.commands.export import main
from segdcn.data import CamVid, Shapes
from segdcn.inference.predictor import Predictor
from segdcn.interchange import onnx as onnx_files
from segdcn.interchange.program import program_bytes
from segdcn.interchange.verification import compare
from segdcn.models import Deform, build_deeplab, deformable_layers

onnxruntime = pytest.importorskip("onnxruntime", minversion="1.25", reason="the first with a DeformConv")
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_onnx.py"
# python -c BLOCKED NAMES FILE ARGUMENTS: runs the file where importing one of the packages is an error
BLOCKED = """
import runpy, sys
blocked, sys.argv = sys.argv[1].split(","), sys.argv[2:]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(first_run: FirstRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run folder, with its network as ONNX."""
    folder = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(first_run.folder, folder)
    assert call(main, f"checkpoint={folder}/checkpoints/best.ckpt") == 0
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return segdcn.load(run / "checkpoints" / "best.ckpt", device="cpu")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_file_and_its_verification_lie_beside_the_checkpoint(run: Path, predictor: Predictor) -> None:
    assert files(run / "export") == ["best.onnx", "best.onnx.json"]
    content = (run / "export" / "best.onnx").read_bytes()
    report = json.loads((run / "export" / "best.onnx.json").read_text())
    assert report["file_sha256"] == hashlib.sha256(content).hexdigest()
    assert (report["bytes"], report["image"], report["opset"]) == (len(content), "val_0000", 19)
    assert {"onnx", "onnxruntime", "torch"} <= report["environment"]["packages"].keys()
    assert [(case["size"], case["batch"]) for case in report["cases"]] == [
        (size, batch) for size in ([96, 96], [73, 121]) for batch in (1, 2)
    ]
    # the first case, worked out again
    image = predictor.transform.image(Shapes(val_images=1).split("val")[0].image)[None]
    with torch.inference_mode():
        expected = predictor.network(image)
    logits = onnx_files.open_onnx(run / "export" / "best.onnx")(image)
    case = report["cases"][0]
    assert case["span"] == pytest.approx([expected.min().item(), expected.max().item()])
    assert case["difference"] == pytest.approx((logits - expected).abs().max().item())
    assert case["pixels"] == 96 * 96
    shares = [c["difference"] / (c["span"][1] - c["span"][0]) for c in report["cases"]]
    assert report["relative_logit_difference"] == pytest.approx(max(shares))
    assert report["relative_logit_difference"] < 1e-4


def test_the_model_is_standard_and_tells_what_it_needs(run: Path, predictor: Predictor) -> None:
    content = (run / "export" / "best.onnx").read_bytes()
    model = onnx.load_from_string(content)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]
    layers = list(deformable_layers(predictor.network))
    assert [node.op_type for node in model.graph.node].count("DeformConv") == len(layers) == 3
    for value, name, channels in ((model.graph.input[0], "image", 3), (model.graph.output[0], "logits", 6)):
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, shape) == (name, ["batch", channels, "height", "width"])
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["class_names"]) == predictor.class_names == list(Shapes.class_names)
    assert json.loads(about["palette"]) == [list(colour) for colour in Shapes.palette]
    assert json.loads(about["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(about["std"]) == [0.229, 0.224, 0.225]
    assert json.loads(about["deformable_layers"]) == layers
    checkpoint = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert about["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    told = {"output_stride": "16", "protocol": "native", "dataset": "Shapes", "deform": "standard"}
    assert told.items() <= about.items()
    for folder in (Path(torch.__file__).parent, Path(segdcn.__file__).parent):  # of the machine that wrote it
        assert str(folder).encode() not in content


@pytest.mark.parametrize("size", [(3, 96, 96), (1, 97, 131), (2, 33, 200)])
def test_any_batch_and_size_has_pytorchs_logits(run: Path, predictor: Predictor, size: tuple[int, int, int]) -> None:
    images = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = predictor.network(images)
    logits = onnx_files.open_onnx(run / "export" / "best.onnx")(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_example_needs_neither_segdcn_nor_torch(run: Path, predictor: Predictor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    Image.fromarray(noise(75, 110)).save(tmp_path / "photo.png", exif=exif)
    arguments = (str(SCRIPT), str(run / "export" / "best.onnx"), "photo.png", "labels.png")
    ended = process(tmp_path, "-c", BLOCKED, "torch,torchvision,segdcn,cv2,albumentations", *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    expected = predictor(tmp_path / "photo.png")
    with Image.open(tmp_path / "labels.png") as labels:
        assert labels.size == (75, 110)
        assert (np.asarray(labels) == expected.labels).mean() >= 0.999
        shares = [f"{(np.asarray(labels) == k).mean():7.2%}  {name}" for k, name in enumerate(Shapes.class_names)]
        coloured = np.asarray(Shapes.palette, np.uint8)[np.asarray(labels)]
        np.testing.assert_array_equal(np.asarray(labels.convert("RGB")), coloured)
    assert ended.stdout.splitlines() == shares


RUN_PROGRAM = """
import json, sys, torch, torchvision
about = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=about)
logits = program.module()(torch.load(sys.argv[2], weights_only=True))
torch.save(logits.detach(), sys.argv[3])
print(json.dumps(json.loads(about["metadata.json"])["class_names"]))
"""


@pytest.mark.slow
def test_a_torch_program_needs_torch_and_torchvision_alone(run: Path, predictor: Predictor, tmp_path: Path) -> None:
    target = tmp_path / "network.pt2"
    assert call(main, f"checkpoint={run}/checkpoints/best.ckpt", "format=torch", f"output={target}") == 0
    images = torch.randn(3, 3, 97, 131, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "use.py").write_text(RUN_PROGRAM)
    ended = process(
        tmp_path, "-c", BLOCKED, "segdcn,hydra,omegaconf", "use.py", "network.pt2", "images.pt", "logits.pt"
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(json.loads(ended.stdout)) == predictor.class_names
    with torch.inference_mode():
        expected = predictor.network(images)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)
    for folder in (Path(torch.__file__).parent, Path(segdcn.__file__).parent):
        assert str(folder).encode() not in target.read_bytes()


def stop(*_: Any) -> Any:
    raise KeyboardInterrupt


def other_weights(run: Path) -> bytes:
    """The run's model with one class's bias moved."""
    model = onnx.load(run / "export" / "best.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "head.classifier.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[2] += 100
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    return bytes(model.SerializeToString())


@pytest.fixture
def written(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], None]:
    """What stands in for the exporter, which takes seconds: the run's own model, or the given one."""

    def give(content: bytes | None) -> None:
        content = content or (run / "export" / "best.onnx").read_bytes()
        monkeypatch.setattr(onnx_files, "onnx_bytes", lambda *_: content)

    return give


@pytest.mark.parametrize("case", ["tolerance", "weights", "not finite", "interrupt", "full disk"])
def test_a_failed_export_leaves_nothing(
    case: str,
    run: Path,
    tmp_path: Path,
    written: Callable[[bytes | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(other_weights(run) if case == "weights" else None)
    arguments = [f"checkpoint={run}/checkpoints/best.ckpt", f"output={tmp_path / 'made' / 'here' / 'x.onnx'}"]
    if case == "tolerance":
        arguments.append("tolerance.logits=1e-12")
        expected = "nothing was written: under onnxruntime logits differ"
    elif case == "weights":
        arguments.append("tolerance.logits=1e9")
        expected = "nothing was written: under onnxruntime labels differ from PyTorch's in"
    elif case == "not finite":
        monkeypatch.setattr(
            onnx_files, "open_onnx", lambda _: lambda x: torch.full((len(x), 6, *x.shape[2:]), torch.nan)
        )
        expected = "nothing was written: under onnxruntime logits differ from PyTorch's by nan"
    elif case == "interrupt":
        monkeypatch.setattr(onnx_files, "open_onnx", stop)
        with pytest.raises(KeyboardInterrupt):
            call(main, *arguments)
    else:
        expected = "File too large"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    if case != "interrupt":
        try:
            assert call(main, *arguments) == (TRY_AGAIN if case == "full disk" else 1)
        finally:
            if case == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert expected in one_line(capsys.readouterr().err)
    assert files(tmp_path) == []


def test_a_failed_export_keeps_the_one_before(
    run: Path, tmp_path: Path, written: Callable[[bytes | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    written(None)
    arguments = (f"checkpoint={run}/checkpoints/best.ckpt", f"output={tmp_path / 'x.onnx'}")
    assert call(main, *arguments) == 0
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert call(main, *arguments, "tolerance.labels=-1") == 1
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert before.keys() == {"x.onnx", "x.onnx.json"}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("format=tflite",), ("format must be onnx or torch, got 'tflite'",)),
        (("deform=gather",), ("deform must be standard or grid_sample, got 'gather'",)),
        (("opset=18",), ("opset must be 19 or more", "18")),
        (("opset=new",), ("opset must be 19 or more", "new")),
        (("output=x.pt2",), ("output=x.pt2 must be a file that ends in .onnx, since format=onnx",)),
        (("image=nowhere.png",), ("no image at nowhere.png",)),
        (("checkpoint=nowhere.ckpt",), ("no checkpoint file at nowhere.ckpt",)),
        (("checkpoint=moved.ckpt",), ("data set is not at hand", "nowhere", "give an image with image=PATH")),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    state["segdcn"]["groups"]["dataset"] = {"_target_": "segdcn.data.CamVid", "root": "nowhere"}
    torch.save(state, "moved.ckpt")
    given = () if arguments[0].startswith("checkpoint") else (f"checkpoint={run}/checkpoints/best.ckpt",)
    before = files(run)
    assert call(main, *given, *arguments) == 1
    message = one_line(capsys.readouterr().err)
    for part in parts:
        assert part in message
    assert files(tmp_path) == ["moved.ckpt"]
    assert files(run) == before


class Undecided(torch.nn.Module):
    """What it computes depends on the image's values."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image if image.sum() > 0 else -image


class OneSize(torch.nn.Module):
    """It has learned something for each pixel of an image of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1, 3, 96, 128))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.place


@pytest.mark.parametrize("network", [Undecided(), OneSize()], ids=["values", "one size"])
@pytest.mark.parametrize("write", [onnx_files.onnx_bytes, program_bytes])
def test_a_network_that_cannot_leave_is_one_line(network: torch.nn.Module, write: Callable[..., bytes]) -> None:
    with pytest.raises(ValueError, match="cannot be exported for images of any size: ") as caught:
        write(network, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(
    missing: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert call(main, f"checkpoint={run}/checkpoints/best.ckpt") == 1
    assert f'{missing}, not installed here: pip install -e ".[onnx]"' in one_line(capsys.readouterr().err)


def test_an_image_of_ones_own_verifies(
    run: Path, tmp_path: Path, written: Callable[[bytes | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    written(None)
    photo = tmp_path / "photo.png"
    Image.fromarray(noise(40, 100)).save(photo)
    out = tmp_path / "x.onnx"
    assert call(main, f"checkpoint={run}/checkpoints/best.ckpt", f"image={photo}", f"output={out}") == 0
    assert f"onnxruntime against PyTorch on {photo}:" in capsys.readouterr().out
    report = json.loads(out.with_name("x.onnx.json").read_text())
    assert [case["size"] for case in report["cases"]] == [[64, 160], [64, 160], [49, 201], [49, 201]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "head", "stride", "options"),
    [
        ("resnet_tiny", "aspp", 16, {"deform": Deform(0)}),
        ("resnet_tiny", "paper", 8, {"frozen_batch_norm": True, "deform": Deform(layers=3, offset_groups=2)}),
        ("resnet_tiny", "v3plus", 32, {"auxiliary": True, "deform": Deform(layers=2, modulated=True)}),
        ("mobilenet_v2", "aspp", 16, {"deform": Deform(layers=1, modulated=True)}),
        ("mobilenet_v2", "fpn", 32, {"frozen_stages": 1, "deform": Deform(layers=3), "evaluation_scale": 1.5}),
    ],
    ids=["plain", "paper", "v3plus", "depthwise", "fpn"],
)
def test_every_kind_of_network_is_exported(
    backbone: str, head: str, stride: int, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build_deeplab(6, backbone, head, stride, weights=None, head_channels=16, **options).eval()
    for layer in deformable_layers(network).values():
        torch.nn.init.normal_(layer.offset.bias, std=2.0)
    file = tmp_path / "x.onnx"
    file.write_bytes(onnx_files.onnx_bytes(network, {}))
    batches = [torch.randn(batch, 3, *size) for batch, size in ((1, (97, 131)), (2, (64, 200)))]
    for found in compare(network, onnx_files.open_onnx(file), batches):
        assert found.relative < 1e-4
    assert {layer.backend for layer in deformable_layers(network).values()} <= {"auto"}


@pytest.mark.slow
def test_label_maps_of_camvid_are_those_of_onnxruntime(tmp_path: Path) -> None:
    root = real_camvid()
    checkpoint, out = trained(root, tmp_path / "run"), tmp_path / "network.onnx"
    assert call(main, f"checkpoint={checkpoint}", f"output={out}") == 0
    predictor = segdcn.load(checkpoint, device="cpu")
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    samples = CamVid(root).split("val")
    equal = []
    for sample in samples:
        image = sample.image
        expected = predictor(image).labels
        normalised = ((image / 255 - predictor.transform.mean) / predictor.transform.std).astype(np.float32)
        (logits,) = session.run(["logits"], {"image": normalised.transpose(2, 0, 1)[None]})
        equal.append((logits[0].argmax(axis=0) == expected).mean())
    print(f"agreement {np.mean(equal):.8f}, worst image {min(equal):.8f}")
    assert len(equal) == 101
    assert np.mean(equal) >= 0.9999
