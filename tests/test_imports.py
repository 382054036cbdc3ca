"""Who may import whom, read from the source: at the top of a file or within a function, it counts alike."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "segdcn"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# The other parts of segdcn that a part may import (beside errors), and the packages beyond the standard library; from
# the ground up.
MAY_IMPORT = {
    "errors": ("", ""),
    "ops": ("", "torch torchvision triton"),
    "models": ("ops", "torch torchvision timm safetensors"),
    "data": ("", "torch numpy cv2 PIL pyspng yaml albumentations rich pytorch_lightning"),
    "drawing": ("data", "numpy cv2 PIL rich matplotlib fontTools"),
    "inference": ("models data drawing", "torch numpy PIL"),
    "evaluation": ("models inference", "torch numpy torchmetrics PIL"),
    "analysis": ("ops models data drawing inference", "torch numpy cv2 matplotlib"),
    "runs": ("models data inference evaluation", "torch numpy PIL yaml"),
    "training": (
        "ops models data drawing inference evaluation analysis runs",
        "torch numpy torchmetrics PIL pytorch_lightning lightning_fabric optuna segmentation_models_pytorch",
    ),
    "interchange": ("ops models", "torch numpy PIL onnx onnxruntime"),
    "sweep": ("drawing runs", "torch rich scipy matplotlib submitit"),
    "report": (
        "models data drawing inference evaluation analysis runs sweep",
        "torch numpy cv2 PIL matplotlib jinja2 markupsafe",
    ),
    "detection": (  # a guest: but for the commands nothing knows of it
        "ops models data drawing evaluation runs training sweep report",
        "torch torchvision numpy cv2 PIL rich pytorch_lightning pycocotools",
    ),
    "benchmarks": ("ops models data runs interchange", "torch torchvision numpy cv2 PIL albumentations openvino"),
    "commands": (
        "ops models data drawing inference evaluation analysis runs training interchange sweep report detection"
        " benchmarks",
        "torch torchvision numpy cv2 PIL yaml rich hydra omegaconf pytorch_lightning optuna",
    ),
}
NEED_TRITON = ("segdcn.ops.triton_",)  # modules that can be imported only where an optional package is
LIGHTNING = (
    "segdcn.training.",
    "segdcn.data.batches",
    "segdcn.data.datamodule",
    "segdcn.detection.",
    "segdcn.commands.",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Full names of the imported modules, without those of the standard library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            found.add(node.module)
            # `from segdcn.sweep import plan` names a module too, `from segdcn import UserError` does not
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name)}
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names} - {"segdcn"}


def is_module(package: str, name: str) -> bool:
    folder = PACKAGE.parent / package.replace(".", "/")
    return (folder / name / "__init__.py").is_file() or (folder / f"{name}.py").is_file()


def ours(path: Path) -> set[str]:
    """The modules of segdcn that a file imports, without the faces of packages whose modules it names."""
    return {name for name in imports(path) if name.startswith("segdcn.")}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import os, hydra.utils\ndef f():\n    from segdcn import UserError, training\n    from torch import nn\n"
    )
    assert imports(file) == {"hydra.utils", "segdcn.training", "torch"}


def test_nothing_but_packages_lies_at_the_top() -> None:
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_part_imports_what_it_may(path: Path) -> None:
    name, imported = module_name(path), imports(path)
    part = name.split(".")[1]
    parts, packages = (set(names.split()) for names in MAY_IMPORT[part])
    assert {other.split(".")[1] for other in imported if other.startswith("segdcn.")} <= {part, "errors", *parts}
    assert {other.partition(".")[0] for other in imported} - {"segdcn"} <= packages
    if not f"{name}.".startswith(LIGHTNING):
        assert not any(other.startswith(("pytorch_lightning", "lightning")) for other in imported)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_stand_at_the_top(path: Path) -> None:
    """But in the commands, whose --help does not wait for torch; others delay packages that are optional or slow."""
    if not module_name(path).startswith("segdcn.commands"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        delayed = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
        names = [str(node.module) for node in delayed if str(node.module).startswith("segdcn")]
        assert not [name for name in names if not name.startswith(NEED_TRITON)]


def test_parts_stand_above_what_they_import() -> None:
    order = list(MAY_IMPORT)
    for number, (part, (below, _)) in enumerate(MAY_IMPORT.items()):
        assert set(below.split()) <= set(order[:number]), part


def test_no_file_imports_one_that_imports_it() -> None:
    TopologicalSorter({module_name(path): ours(path) - {module_name(path)} for path in FILES}).prepare()
