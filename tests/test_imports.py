"""Who may import whom, read from the source: at the top of a file or within a function, it counts alike."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "segdcn"
COMMANDS = {
    "segdcn.train",
    "segdcn.evaluate",
    "segdcn.predict",
    "segdcn.analyze",
    "segdcn.export",
    "segdcn.data.__main__",
    "segdcn.benchmark",
    "segdcn.report.__main__",
    "segdcn.sweep.__main__",
}
FILES = sorted(PACKAGE.rglob("*.py"))

# Everything outside the standard library that a part may import; the longest matching name counts.
ALLOWED = {
    "segdcn.ops": {"torch", "torchvision", "segdcn.ops"},
    "segdcn.models": {"torch", "torchvision", "timm", "safetensors", "segdcn.ops", "segdcn.models"},
    "segdcn.models.weights": {"torch", "torchvision", "safetensors", "segdcn.models", "segdcn.runs.folder"},
    "segdcn.losses": {"torch"},
    "segdcn.runs": {"torch", "segdcn.models", "segdcn.runs"},
    "segdcn.runs.folder": set(),
    "segdcn.runs.overrides": set(),
    "segdcn.drawing.decoration": set(),
    "segdcn.drawing.console": {"rich"},
    "segdcn.drawing.figures": {"rich", "segdcn.drawing", "segdcn.evaluation"},
    "segdcn.evaluation": {"torch", "torchmetrics", "numpy", "PIL", "segdcn.evaluation", "segdcn.runs"},
    "segdcn.evaluation.metrics": {"torch", "torchmetrics"},
    "segdcn.evaluation.bootstrap": {"torch", "segdcn.evaluation.metrics"},
    "segdcn.evaluation.inference": {"torch"},
    "segdcn.evaluation.protocols": {"torch", "segdcn.evaluation.inference"},
    "segdcn.evaluation.submission": {"torch", "numpy", "PIL", "segdcn.runs.folder"},
    "segdcn.data": {"torch", "numpy", "cv2", "PIL", "pyspng", "albumentations", "segdcn.data", "segdcn.runs.folder"},
    "segdcn.data.check": {"torch", "numpy", "rich", "segdcn.data"},
    "segdcn.data.__main__": {"hydra", "omegaconf", "rich", "segdcn.commands", "segdcn.data"},
    "segdcn.data.datamodule": {"torch", "numpy", "pytorch_lightning", "segdcn.data"},
    "segdcn.predictor": {
        "torch",
        "numpy",
        "PIL",
        "segdcn.data",
        "segdcn.evaluation",
        "segdcn.models",
        "segdcn.panels",
        "segdcn.runs",
    },
    "segdcn.analysis": {"torch", "segdcn.analysis", "segdcn.models", "segdcn.ops"},
    "segdcn.analysis.cost": {"torch", "segdcn.models", "segdcn.stopwatch"},
    "segdcn.analysis.tables": set(),
    "segdcn.analysis.pictures": {"numpy", "matplotlib", "segdcn.drawing.fonts"},
    "segdcn.analysis.objects": {"numpy", "cv2"},
    "segdcn.analysis.offset_study": {"torch", "numpy", "segdcn.analysis", "segdcn.data", "segdcn.ops"},
    "segdcn.drawing.fonts": {"matplotlib", "fontTools", "PIL"},
    "segdcn.exchange": {"torch", "onnx", "onnxruntime", "segdcn.models", "segdcn.ops"},
    "segdcn.models.cost": {"torch", "segdcn.models", "segdcn.ops"},
    "segdcn.report": {"segdcn.drawing", "segdcn.report", "segdcn.runs"},
    "segdcn.report.charts": {"matplotlib", "markupsafe"},
    "segdcn.report.choice": set(),
    "segdcn.report.comparison": {"segdcn.report", "segdcn.runs", "segdcn.sweep"},
    "segdcn.report.images": {
        "numpy",
        "segdcn.analysis",
        "segdcn.data",
        "segdcn.drawing.decoration",
        "segdcn.models",
        "segdcn.panels",
        "segdcn.predictor",
        "segdcn.report",
        "segdcn.runs",
    },
    "segdcn.report.page": {"jinja2", "markupsafe", "segdcn.report"},
    "segdcn.report.pictures": {"numpy", "cv2", "PIL", "segdcn.data", "segdcn.panels"},
    "segdcn.report.records": {"yaml", "segdcn.evaluation", "segdcn.runs", "segdcn.sweep.plan"},
    "segdcn.report.tables": {"torch", "segdcn.evaluation", "segdcn.report", "segdcn.runs"},
    "segdcn.report.viewer": {"torch", "segdcn.analysis", "segdcn.models", "segdcn.report"},
    "segdcn.report.__main__": {"segdcn.commands", "segdcn.report", "segdcn.runs"},
    "segdcn.sweep": {"rich", "segdcn.sweep", "segdcn.runs"},
    "segdcn.sweep.plan": {"segdcn.runs"},
    "segdcn.sweep.jobs": {"segdcn.runs", "segdcn.sweep.plan"},
    "segdcn.sweep.local": {"torch", "segdcn.sweep", "segdcn.runs"},
    "segdcn.sweep.__main__": {"segdcn.commands", "segdcn.sweep"},
    "segdcn.sweep.slurm": {"submitit", "segdcn.sweep", "segdcn.runs"},
    "segdcn.sweep.runs": {"yaml", "segdcn.sweep", "segdcn.runs"},
    "segdcn.sweep.estimate": {"scipy"},
    "segdcn.sweep.plot": {"matplotlib", "segdcn.drawing.fonts", "segdcn.sweep"},
}
LIGHTNING = {"segdcn.task", "segdcn.callbacks", "segdcn.data.datamodule", "segdcn.commands", *COMMANDS}
HYDRA = {"segdcn.commands", *COMMANDS}


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
            # `from segdcn import task` names a module too, `from segdcn import UserError` does not
            found |= {
                f"segdcn.{alias.name}" for alias in node.names if node.module == "segdcn" and is_module(alias.name)
            }
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names} - {"segdcn"}


def is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import os, hydra.utils\ndef f():\n    from segdcn import UserError, task\n    from torch import nn\n"
    )
    assert imports(file) == {"hydra.utils", "segdcn.task", "torch"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_part_imports_what_it_may(path: Path) -> None:
    name, imported = module_name(path), imports(path)
    rule = max((part for part in ALLOWED if within(name, {part})), key=len, default=None)
    if rule is not None:
        assert not {other for other in imported if not within(other, ALLOWED[rule])}
    if not within(name, LIGHTNING):
        assert not {other for other in imported if within(other, {"pytorch_lightning", "lightning"})}
    if not within(name, HYDRA):
        assert not {other for other in imported if within(other, {"hydra", "omegaconf"})}
    assert not imported & COMMANDS, "nothing imports a command"
    if name == "segdcn.task":
        ours = {other for other in imported if other.startswith("segdcn.")}
        assert ours <= {"segdcn.losses", "segdcn.evaluation", "segdcn.optim"}


def test_the_table_speaks_of_modules_that_exist() -> None:
    names = {module_name(path) for path in FILES}
    assert {*ALLOWED, *LIGHTNING, *HYDRA} <= names
