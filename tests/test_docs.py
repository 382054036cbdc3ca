"""What README.md, the pages of docs/ and the headings of conf/ name exists.

Their commands are composed in tests/test_commands.py. The examples of a user's own data set and sweep are run in
tests/data/test_own_dataset.py and tests/sweep.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from running import call, compose, one_line
from test_imports import MAY_IMPORT

import segdcn
from segdcn.commands import train
from segdcn.commands.configs import CONFIG_PATH

ROOT, CONF = Path(__file__).parents[1], Path(CONFIG_PATH)
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HISTORY = ROOT / "CHANGELOG.md"  # names what there was
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}

PAGE_TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
CURRENT = "\n".join(text for path, text in PAGE_TEXTS.items() if path != HISTORY)
COMMENTS = "\n".join(
    line.partition("#")[2] for path in sorted(CONF.rglob("*.yaml")) for line in path.read_text("utf-8").splitlines()
)
INLINE = re.findall(r"`([^`\n]+)`", FENCED.sub("", CURRENT))


@cache
def configs() -> list[DictConfig]:
    """The config of each command, that of a training with each data set and of a detector's."""
    datasets = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
    trainings = [compose("train", f"dataset={dataset}", "name=test", "output_dir=x") for dataset in datasets]
    trainings.append(compose("train", "experiment=boxes_rfcn", "name=test", "output_dir=x"))  # of a detector
    return [*trainings, *(compose(name) for name in ("evaluate", "predict", "analyze", "export", "check", "convert"))]


def test_the_pages_were_read() -> None:
    assert len(INLINE) > 200
    assert len(PAGES) > 20


def test_the_readme_is_short() -> None:
    assert len(PAGE_TEXTS[README].splitlines()) <= 250


def test_the_map_has_each_package_above_what_it_imports() -> None:
    named = re.findall(r"^\| `segdcn/(\w+)/` \|", PAGE_TEXTS[README], re.MULTILINE)
    assert named == list(reversed(MAY_IMPORT))


def test_experiments_exist() -> None:
    named = set(re.findall(r"experiment=(\w+)", CURRENT + COMMENTS)) - {"NAME", "mine"}  # mine is a user's own
    assert named
    for name in named:
        assert (CONF / "experiment" / f"{name}.yaml").is_file(), name


# --- paths and links ------------------------------------------------------------------------------------------


def paths() -> list[str]:
    """Files and folders of this repository, wherever they are named."""
    top = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != ".git")
    text = CURRENT + COMMENTS
    named = re.findall(rf"(?<![\w/.-])((?:{top})/[\w./-]*|[\w-]+\.toml|\.[\w-]+\.yaml)", text)
    made = ("runs/", "sweeps/", "build/")
    return sorted({path.rstrip(".") for path in named if not path.startswith(made)})


@pytest.mark.parametrize("path", paths())
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", PAGE_TEXTS[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(FENCED.sub("", PAGE_TEXTS[page])):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_page_is_linked_or_in_the_navigation() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page in PAGE_TEXTS:
            reached.add(page)
            waiting += [(page.parent / target).resolve() for target, _ in LINK.findall(PAGE_TEXTS[page]) if target]
    assert README.parent / "docs/own_images.md" in reached
    for index in (ROOT / "docs").rglob("index.md"):
        reached.add(index)
        for kind, block in FENCED.findall(PAGE_TEXTS[index]):
            reached |= {index.parent / f"{name}.md" for name in block.split() if kind == "{toctree}"}
    assert set(PAGES) - reached == set()


# --- settings and extras --------------------------------------------------------------------------------------


def keys() -> list[str]:
    """Dotted config keys in the text; ``.groups`` after ``model.deform.layers`` means ``model.deform.groups``."""
    first = {str(key) for config in configs() for key in config} - {"name", "report", "output"}
    found, previous = set(), ""
    for code in (part for one in INLINE if not one.startswith("segdcn.") for part in one.split()):
        name = code.lstrip("'").partition("=")[0]
        if name.endswith((".csv", ".safetensors", ".txt")):
            continue
        if re.fullmatch(r"\w+(\.\w+)+", name) and name.partition(".")[0] in first:
            previous = name
            found.add(name)
        elif re.fullmatch(r"\.\w+", name) and previous:
            found.add(previous.rpartition(".")[0] + name)
    return sorted(found)


@pytest.mark.parametrize("key", keys())
def test_key_exists(key: str) -> None:
    parent, _, last = key.rpartition(".")
    assert any(last in (OmegaConf.select(config, parent) or ()) for config in configs())


def test_options_in_the_table_of_groups_exist() -> None:
    checked = 0
    for line in CURRENT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        groups = [group for group in re.findall(r"`(\w+)`", cells[0]) if group in GROUPS] if len(cells) == 2 else []
        if not groups:
            continue
        existing = {path.stem for group in groups for path in (CONF / group).glob("*.yaml")}
        named = set(re.findall(r"`(\w+)`", cells[1]))
        assert named == existing, f"{groups}: {named} are named, {existing} exist"
        checked += len(groups)
    assert checked > 5


def test_extras_exist() -> None:
    named = set(re.findall(r"\.\[(\w+)\]", CURRENT))
    assert named
    assert named <= set(metadata("segdcn").get_all("Provides-Extra", []))


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", segdcn.__version__)
    assert [one["title"] for one in citation["references"]] == ["Deformable Convolutional Networks"]


# --- messages -------------------------------------------------------------------------------------------------

FOREIGN = {  # messages of Hydra and Lightning, and what one has to type to see them
    "Key … is not in struct": "model.depth=3",
    "Ambiguous value for argument …": "name=a,b",
    "CUDAAccelerator can not run on your system since the accelerator is not available": "trainer.accelerator=cuda",
}


@cache
def texts_of_the_code() -> list[str]:
    """Every text in the source, with a line feed in place of each value that is put in."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) or "\n" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    files = [*(ROOT / "segdcn").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    found = (text(node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return [one for one in found if one]


def messages() -> list[str]:
    return re.findall(r"^### (.*)$", PAGE_TEXTS[ROOT / "docs/troubleshooting.md"], re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_message_is_one_of_the_code(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in re.split(r"\s*…\s*", message)), re.DOTALL)
    if message not in FOREIGN:
        assert any(pattern.search(text) for text in texts_of_the_code())
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call(train.main, FOREIGN[message]) == 1
    assert pattern.search(one_line(capsys.readouterr().err).replace("`", ""))


# --- Python ---------------------------------------------------------------------------------------------------


def test_python_examples_import_what_exists() -> None:
    for kind, block in FENCED.findall(CURRENT):
        for node in ast.walk(ast.parse(block)) if kind == "python" else ():
            if isinstance(node, ast.ImportFrom):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_a_backbone_and_a_head_of_ones_own_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = FENCED.findall(PAGE_TEXTS[ROOT / "docs/extend.md"])
    for name, kind, part in (("mine.py", "python", "class SumHead"), ("my_conf/model/mine.yaml", "yaml", "mine.build")):
        (text,) = [block for language, block in blocks if language == kind and part in block]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    small = ("dataset.train_images=8", "dataset.val_images=2", "dataset.test_images=2", "datamodule.batch_size=4")
    plain = ("trainer.accelerator=cpu", "trainer.max_epochs=1", "logger=none", "callbacks.panels=null", "report=false")
    command = ("--config-dir", "my_conf", "model=mine", "output_dir=run", *small, *plain)
    assert call(train.main, *command) == 0
    assert "miou" in (tmp_path / "run/metrics.json").read_text()
