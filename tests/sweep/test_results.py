"""The table of a sweep, from folders made here: what it says, what it refuses, what it leaves alone."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FirstRun
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from running import call, one_line, process

from segdcn.commands.sweep import main, parse_arguments
from segdcn.sweep.collect import collect
from segdcn.sweep.estimate import mean_over_seeds, paired_difference
from segdcn.sweep.plan import read_sweep
from segdcn.sweep.publish import KINDS, write
from segdcn.sweep.results import Estimate, Results
from segdcn.sweep.tables import as_rich

PLAIN, DEFORMABLE = "model.deform.layers=0", "model.deform.layers=3"
FACTS = {
    "split": "val",
    "images": 400,
    "protocol": "native",
    "inference": "whole image",
    "checkpoint": "best.ckpt",
    "parameters": 650_000,
    "flops": 80_000_000,
    "flops_input": "[96,64]",
    "training_seconds": 150.0,
    "seconds_per_image": 0.004,
}
ENVIRONMENT: dict[str, Any] = {
    "git": {"commit": "abc1234", "dirty": False},
    "device": "a CPU",
    "devices": 0,
    "threads": 1,
    "python": "3.11",
    "packages": {"torch": "2.7"},
}


def sweep(
    folder: Path,
    figures: Mapping[Sequence[str], Sequence[Any]],
    baseline: list[str] | None = None,
    **changed: Any,
) -> Path:
    """A sweep with a run for each figure of a setting, seeds 0, 1, ...

    A figure is a fraction or null, or "missing", or a dictionary for job.json.
    """
    folder.mkdir(exist_ok=True)
    jobs = []
    for setting, values in figures.items():
        for seed, value in enumerate(values):
            overrides = ["experiment=some", *setting, f"seed={seed}"]
            run = folder / f"{'_'.join(setting).replace('/', '_')}_{seed}"
            jobs.append({"folder": run.name, "overrides": overrides})
            if value == "missing":
                continue
            run.mkdir(parents=True)
            if isinstance(value, dict):
                (run / "job.json").write_text(json.dumps(value))
                continue
            (run / "metrics.json").write_text(json.dumps({"val/miou": value, "val/loss": 0.5, "seed": seed, **FACTS}))
            (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
            (run / "config.yaml").write_text("model: {}\n")
    plan = {"name": "made", "command": "segdcn-train -m", "baseline": baseline, "metric": "val/miou", "jobs": jobs}
    (folder / "sweep.json").write_text(json.dumps(plan | changed))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two settings with three seeds each."""
    return sweep(tmp_path, {(PLAIN,): [0.66, 0.70, 0.68], (DEFORMABLE,): [0.71, 0.73, 0.72]})


def table(results: Results) -> list[dict[str, str]]:
    """results.md's rows, as a Markdown reader splits them."""
    write(results)
    lines = [line for line in (results.folder / f"{results.stem}.md").read_text().splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.replace(r"\|", "\0").split("|")[1:-1]] for line in lines]
    assert len({len(cells) for cells in split}) == 1
    return [dict(zip(split[0], (c.replace("\0", "|") for c in cells), strict=True)) for cells in split[2:]]


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- statistics -------------------------------------------------------------------------------------------------------

T_975_2 = 4.302652729696142  # Student's t with 2 degrees of freedom, from a table


def test_interval_and_paired_test_by_hand() -> None:
    estimate = mean_over_seeds([0.66, 0.70, 0.68])  # standard deviation 0.02
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.68)
    assert estimate.half == pytest.approx(T_975_2 * 0.02 / math.sqrt(3))
    difference = paired_difference({"0": 0.71, "1": 0.73, "2": 0.72}, {"0": 0.66, "1": 0.70, "2": 0.68})
    assert difference is not None
    assert (difference.count, difference.mean) == (3, pytest.approx(0.04))  # 0.05, 0.03, 0.04: deviation 0.01
    assert difference.half == pytest.approx(T_975_2 * 0.01 / math.sqrt(3))
    t = 0.04 / (0.01 / math.sqrt(3))
    assert difference.p == pytest.approx(1 - t / math.sqrt(t * t + 2))  # closed form for 2 degrees of freedom


fractions = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(fractions, fractions), max_size=6), st.randoms())
def test_estimates_are_plain_numbers_or_absent(pairs: list[tuple[float, float]], random: Any) -> None:
    ours = {str(seed): pair[0] for seed, pair in enumerate(pairs)}
    base = {str(seed): pair[1] for seed, pair in enumerate(pairs)}
    shuffled = list(ours.items())
    random.shuffle(shuffled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimates = [mean_over_seeds(list(ours.values())), paired_difference(ours, base)]
        again = paired_difference({**dict(shuffled), "only ours": 0.5}, {"only the baseline's": 0.1, **base})
    for estimate in estimates:
        assert (estimate is None) == (not pairs)
        if estimate is None:
            continue
        assert all(math.isfinite(value) for value in vars(estimate).values() if value is not None)
        assert (estimate.low is None) == (estimate.high is None)
        if estimate.low is not None and estimate.high is not None:
            assert estimate.low <= estimate.mean <= estimate.high
        if estimate.p is not None:  # test and interval say the same
            assert estimate.low is not None
            assert estimate.high is not None
            assert 0 <= estimate.p <= 1
            if abs(estimate.p - 0.05) > 1e-9:
                assert (estimate.p < 0.05) == (not estimate.low <= 0 <= estimate.high)
    # neither the order of the seeds nor one that only one side has matters
    assert (again is None) == (not pairs)
    if again is not None and estimates[1] is not None:
        assert again.mean == pytest.approx(estimates[1].mean, abs=1e-12)
        assert again.count == len(pairs)


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7], [0.1 + 0.2, 0.3]])
def test_one_run_and_equal_runs_have_no_interval(values: list[float]) -> None:
    assert mean_over_seeds(values) == Estimate(len(values), pytest.approx(values[0]))
    ours = {str(seed): value for seed, value in enumerate(values)}
    shifted = {str(seed): value - 0.1 for seed, value in enumerate(values)}
    assert paired_difference(ours, shifted) == Estimate(len(values), pytest.approx(0.1))


# --- what the table says ----------------------------------------------------------------------------------------------


def test_one_row_per_setting(made: Path) -> None:
    plain, deformable = table(collect(made))
    assert plain == {
        "setting": f"`{PLAIN}`",
        "runs": "3/3",
        "val/miou, %": "68.00 ± 4.97",
        "seed 0": "66.00",
        "seed 1": "70.00",
        "seed 2": "68.00",
        "more than baseline": "baseline",
        "p": "",
        "parameters, M": "0.650",
        "GFLOPs": "0.0800",
        "training": "2.5 min",
        "inference, ms per image": "4.00",
    }
    assert deformable["val/miou, %"] == "72.00 ± 2.48"
    assert deformable["more than baseline"] == "4.00 ± 2.48 (3 pairs)"
    assert deformable["p"] == "0.020"
    text = (made / "results.md").read_text()
    for told in ("commit abc1234", "96×64 pixels", "protocol native", "paired t test"):
        assert told in text
    assert "Warning" not in text
    assert "Bonferroni" not in text  # there is one comparison


def test_unfinished_runs_are_shown_and_never_dropped(tmp_path: Path) -> None:
    failed = {"state": "failed", "attempts": 2, "error": "the loss is nan: a|b\nlower `optimizer.lr`"}
    stopped, running = ({"state": state, "attempts": 1, "error": None} for state in ("stopped", "running"))
    folder = sweep(
        tmp_path,
        {
            (PLAIN,): [0.66, "missing", 0.68],
            (DEFORMABLE,): [0.71, 0.73, failed],
            ("model.deform.layers=6",): [stopped, running, "missing"],
            ("model.deform.layers=9",): [None, {"state": "finished"}, 0.7],
        },
    )
    results = collect(folder)
    plain, deformable, six, nine = table(results)
    assert plain["runs"] == "2/3, 1 missing"
    assert [plain[f"seed {seed}"] for seed in range(3)] == ["66.00", "missing", "68.00"]
    assert deformable["runs"] == "2/3, 1 failed"
    assert deformable["seed 2"] == "failed"
    assert deformable["more than baseline"] == "5.00 (1 pair)"  # seed 0 is all that both have
    assert "p" not in deformable  # nobody has one
    assert six["runs"] == "0/3, 1 stopped, 1 running, 1 missing"
    assert six["val/miou, %"] == six["more than baseline"] == "-"
    assert nine["runs"] == "1/3, 1 failed, 1 without a figure"
    assert nine["seed 0"] == "no figure"

    text = (folder / "results.md").read_text()
    assert "failed in attempt 2: the loss is nan: a\\|b lower `optimizer.lr`" in text
    assert "never started" in text
    assert "there is no metrics.json" in text
    written = json.loads((folder / "results.json").read_text())
    assert [run["state"] for run in written["runs"]].count("finished") == 6
    assert len(written["runs"]) == 12
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["planned"], row["finished"], row["failed"], row["missing"]) for row in rows] == [
        ("3", "2", "0", "1"),
        ("3", "2", "1", "0"),
        ("3", "0", "0", "1"),
        ("3", "1", "1", "0"),
    ]
    assert float(rows[1]["mean"]) == 0.72
    assert rows[1]["seed 2"] == rows[2]["mean"] == rows[2]["difference_mean"] == ""
    for name in ("results.csv", "results.json", "results.md"):
        assert "nan" not in (folder / name).read_text().replace("the loss is nan", "").lower()


def test_baseline_is_the_one_asked_for(tmp_path: Path) -> None:
    figures = {(PLAIN, "model.head=aspp"): [0.5], (DEFORMABLE, "model.head=aspp"): [0.6], (PLAIN,): [0.4]}
    folder = sweep(tmp_path, figures, baseline=[DEFORMABLE])
    rows = collect(folder).rows
    assert [row.is_baseline for row in rows] == [False, True, False]
    assert [row.difference and row.difference.mean for row in rows] == [pytest.approx(-0.1), None, pytest.approx(-0.2)]
    # the label leaves out what all settings have
    assert [row.label for row in rows] == [f"{PLAIN} model.head=aspp", f"{DEFORMABLE} model.head=aspp", PLAIN]


@pytest.mark.parametrize(
    ("baseline", "said"), [(["model.deform.layers=5"], "is none of"), (["model.head=aspp"], "is more than one of")]
)
def test_unknown_baseline_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], baseline: list[str], said: str
) -> None:
    sweep(tmp_path, {(PLAIN, "model.head=aspp"): [0.5], (DEFORMABLE, "model.head=aspp"): [0.6]}, baseline=baseline)
    with pytest.raises(ValueError, match=said):
        read_sweep(tmp_path)  # before a sweep is started, too
    assert call(main, "collect", str(tmp_path)) == 1
    message = one_line(capsys.readouterr().err)
    assert said in message
    assert DEFORMABLE in message


def test_seeds_may_be_left_out_and_need_not_be_the_same(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {(PLAIN,): [0.5], (DEFORMABLE,): [0.6]})
    plan = json.loads((folder / "sweep.json").read_text())
    for job in plan["jobs"]:
        job["overrides"].remove("seed=0")
    edit(folder / "sweep.json", jobs=plan["jobs"])
    plain, deformable = table(collect(folder))
    assert plain["runs"] == "1/1"
    assert deformable["more than baseline"] == "10.00 (1 pair)"
    for job, seed in zip(plan["jobs"], (4, 5), strict=True):
        job["overrides"].append(f"+seed={seed}")
    edit(folder / "sweep.json", jobs=plan["jobs"])
    plain, deformable = table(collect(folder))
    assert (plain["seed 4"], plain["seed 5"]) == ("50.00", "")
    assert deformable["more than baseline"] == "-"


def test_published_figures_stand_beside_ours(made: Path) -> None:
    assert "paper, %" not in table(collect(made))[0]
    (made / f"{DEFORMABLE}_1" / "config.yaml").write_text("paper_miou: 75.2\nother: ${seed}\n")
    plain, deformable = table(collect(made))
    assert (plain["paper, %"], deformable["paper, %"]) == ("", "75.20")
    with (made / "results.csv").open(newline="") as file:
        assert [row["paper"] for row in csv.DictReader(file)] == ["", "0.752"]
    assert "paper, %" not in table(collect(made, "val/loss"))[0]


def test_loss_is_no_percentage(made: Path) -> None:
    row = table(collect(made, "val/loss"))[0]
    assert row["val/loss"] == "0.5000"
    assert json.loads((made / "results_val-loss.json").read_text())["metric"] == "val/loss"


def test_comparisons_are_counted(tmp_path: Path) -> None:
    settings = {(f"model.deform.layers={n}",): [0.5 + n / 100, 0.52 + n / 90] for n in range(4)}
    assert "makes 3 comparisons" in " ".join(collect(sweep(tmp_path, settings)).notes)


def test_runs_that_cannot_be_compared_are_warned_about(made: Path) -> None:
    run = made / f"{PLAIN}_0"
    for changed, said in (
        ({"git": {"commit": "def5678", "dirty": False}}, "differ in commit"),
        ({"git": {"commit": "abc1234", "dirty": True}}, "not committed"),
        ({"devices": 2}, "differ in hardware"),
        ({"threads": 8}, "differ in hardware"),
        ({"packages": {"torch": "2.8"}}, "differ in versions"),
    ):
        (run / "environment.json").write_text(json.dumps(ENVIRONMENT | changed))
        assert any(said in warning for warning in collect(made).warnings)
    (run / "environment.json").unlink()
    assert any("environment of 1 finished" in warning for warning in collect(made).warnings)
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    assert not collect(made).warnings
    edit(run / "metrics.json", protocol="paper", flops=1)
    assert len(collect(made).warnings) == 2


def test_names_and_errors_are_no_markup(tmp_path: Path) -> None:
    strange = "dataset.class_names=[a|b,`c`,$d$]"
    error = "`x` | [red]y[/red] <b>"
    folder = sweep(
        tmp_path,
        {(strange,): [0.5], (PLAIN,): [{"state": "failed", "error": error}]},
        name="*a* | <script>",
        command="segdcn-train -m 'a=``b`` | c'",
    )
    results = collect(folder)
    strange_row, _ = table(results)
    assert strange_row["setting"] == f"`` {strange} ``"
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[0] == r"# \*a\* \| \<script\>"
    assert lines[2] == r"``` segdcn-train -m 'a=``b`` \| c' ```"
    console = Console(width=120, record=True, file=sys.stderr)
    console.print(as_rich(results))
    assert error in console.export_text()


def test_same_runs_give_the_same_bytes(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(collect(made))
    other = tmp_path_factory.mktemp("other") / "moved"
    shutil.copytree(made, other)
    for name in [f"results.{kind}" for kind in KINDS]:
        (other / name).unlink()
    write(collect(other))
    for name in [f"results.{kind}" for kind in KINDS]:
        assert (made / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(made.glob(".*"))


def test_picture_shows_each_setting(made: Path) -> None:
    write(collect(made))
    small = Image.open(made / "results.png")
    sweep(made / "more", {(f"model.deform.layers={n}",): ["missing"] if n else [0.5, 0.6] for n in range(8)})
    write(collect(made / "more"))
    large = Image.open(made / "more" / "results.png")
    assert small.width == large.width == 8 * 150
    assert large.height > small.height
    assert np.asarray(small.convert("L")).std() > 10
    sweep(made / "none", {(PLAIN,): ["missing"], (DEFORMABLE,): ["missing"]})
    write(collect(made / "none"))  # nothing to draw is no error


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_prints_the_table_and_writes_the_files(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "collect", str(made)) == 0
    shown = capsys.readouterr()
    assert "72.00 ± 2.48" in shown.out
    assert shown.err == ""
    assert all((made / name).stat().st_size for name in [f"results.{kind}" for kind in KINDS])
    (made / f"{PLAIN}_0" / "metrics.json").unlink()
    assert call(main, "collect", str(made)) == 1  # a script must not take it for complete
    shown = capsys.readouterr()
    assert "2/3, 1 missing" in shown.out
    assert shown.err == "incomplete: 1 of 6 runs have no figure\n"


def test_a_pruned_run_has_no_figure_on_purpose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = {"state": "pruned", "attempts": 1, "error": None}
    folder = sweep(tmp_path, {(PLAIN,): [0.66], (DEFORMABLE,): [pruned]})
    assert call(main, "collect", str(folder)) == 0
    shown = capsys.readouterr()
    assert "0/1, 1 pruned" in shown.out
    assert shown.err == ""


def damage_metrics(folder: Path) -> None:
    path = folder / f"{PLAIN}_1" / "metrics.json"
    path.write_text(path.read_text()[:40])


def damage_environment(folder: Path) -> None:
    (folder / f"{PLAIN}_1" / "environment.json").write_bytes(b"\xff\xfe{}")


def damage_job(folder: Path) -> None:
    (folder / f"{PLAIN}_1" / "metrics.json").unlink()
    (folder / f"{PLAIN}_1" / "job.json").write_text('{"state": "asleep"}')


def damage_attempts(folder: Path) -> None:
    (folder / f"{PLAIN}_1" / "metrics.json").unlink()
    (folder / f"{PLAIN}_1" / "job.json").write_text('{"state": "failed", "attempts": "two"}')


def damage_config(folder: Path) -> None:
    (folder / f"{PLAIN}_1" / "config.yaml").write_text("a: [1, 2")


def damage_paper(folder: Path) -> None:
    (folder / f"{PLAIN}_1" / "config.yaml").write_text("paper_miou: much")


def damage_figure(folder: Path) -> None:
    edit(folder / f"{PLAIN}_1" / "metrics.json", **{"val/miou": "0.7"})


def lose_metric(folder: Path) -> None:
    (folder / f"{PLAIN}_1" / "metrics.json").write_text(json.dumps({"val/iou/car": 0.5}))


def remove_plan(folder: Path) -> None:
    (folder / "sweep.json").unlink()


def truncate_plan(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"jobs": [')


def empty_plan(folder: Path) -> None:
    edit(folder / "sweep.json", jobs=[])


def plan_elsewhere(folder: Path) -> None:
    edit(folder / "sweep.json", jobs=[{"folder": "../other", "overrides": []}])


def plan_twice(folder: Path) -> None:
    edit(folder / "sweep.json", jobs=[{"folder": name, "overrides": ["seed=0", PLAIN]} for name in "ab"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_metrics, "_1/metrics.json cannot be read: it is damaged or truncated"),
        (damage_environment, "_1/environment.json cannot be read"),
        (damage_job, "_1/job.json is no job's record: its state is 'asleep'"),
        (damage_attempts, "_1/job.json is no job's record: its attempts must be a number"),
        (damage_config, "_1/config.yaml cannot be read"),
        (damage_paper, "paper_miou in"),
        (damage_figure, "val/miou in"),
        (lose_metric, "has no figure 'val/miou': the closest are val/iou/car"),
        (remove_plan, "is no sweep: it holds no sweep.json"),
        (truncate_plan, "sweep.json cannot be read"),
        (empty_plan, "sweep.json does not describe a sweep"),
        (plan_elsewhere, "sweep.json does not describe a sweep"),
        (plan_twice, "twice with one seed"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_overwrites_nothing(
    made: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    write(collect(made))
    damage(made)
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert call(main, "collect", str(made)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in one_line(shown.err)
    assert before == {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}


def test_another_baseline_has_a_table_of_its_own(made: Path) -> None:
    write(collect(made))
    before = (made / "results.md").read_bytes()
    plain, deformable = table(collect(made, baseline=[DEFORMABLE]))
    assert (deformable["more than baseline"], plain["more than baseline"][:5]) == ("baseline", "-4.00")
    assert (made / "results.md").read_bytes() == before
    with pytest.raises(ValueError, match="none of the sweep's settings"):
        collect(made, baseline=["model.deform.layers=9"])


def test_the_test_split_counts_where_it_was_evaluated(made: Path) -> None:
    runs = read_sweep(made).jobs
    for number, job in enumerate(runs[:-1]):
        folder = made / job.folder / "evaluation" / "best_test"
        folder.mkdir(parents=True)
        figures = {"test/miou": number / 100, "split": "test", "images": 7, "checkpoint": f"{job.folder}/best.ckpt"}
        (folder / "metrics.json").write_text(json.dumps(figures))
    results = collect(made, "test/miou")
    assert [run.figure for run in results.runs if run.figure is not None] == [n / 100 for n in range(len(runs) - 1)]
    (lacking,) = results.without_figure
    assert f"{runs[-1].folder}/checkpoints/best.ckpt split=test" in str(lacking.error)
    assert any("7 test images, best.ckpt" in note for note in results.notes)
    best = made / runs[0].folder / "checkpoints" / "best.ckpt"  # trained on since then
    best.parent.mkdir(exist_ok=True)
    best.write_bytes(b"other weights")
    assert {run.job.folder for run in collect(made, "test/miou").without_figure} == {runs[0].folder, runs[-1].folder}


@pytest.mark.parametrize("metric", ["val/miuo", "seed", "parameters"])
def test_metric_that_does_not_exist_is_one_line(made: Path, capsys: pytest.CaptureFixture[str], metric: str) -> None:
    assert call(main, "collect", str(made), "--metric", metric) == 1
    message = one_line(capsys.readouterr().err)
    assert f"no figure {metric!r}" in message
    assert "val/miou" in message
    assert not any((made / name).exists() for name in [f"results.{kind}" for kind in KINDS])


def test_real_run_has_all_columns(first_run: FirstRun, tmp_path: Path) -> None:
    shutil.copytree(first_run.folder, tmp_path / "run")
    plan = {"name": "one", "command": "", "baseline": None, "metric": "val/miou", "jobs": []}
    plan["jobs"] = [{"folder": "run", "overrides": ["seed=0"]}]
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    (row,) = table(collect(tmp_path))
    figure = json.loads((tmp_path / "run" / "metrics.json").read_text())["val/miou"]
    assert row["val/miou, %"] == f"{100 * figure:.2f}"
    assert all(row[name] for name in ("parameters, M", "GFLOPs", "training", "inference, ms per image"))
    assert "48×64 pixels" in (tmp_path / "results.md").read_text()


def test_help_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom segdcn.commands.sweep import main\nsys.argv = ['segdcn-sweep', '--help']\ntry:\n    main()\n"
    )
    code += "except SystemExit:\n    print(sorted({'torch', 'matplotlib', 'scipy', 'rich'} & set(sys.modules)))\n"
    shown = process(tmp_path, "-c", code)
    assert shown.returncode == 0, shown.stderr
    assert "collect" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "[]"
    code = "import sys, segdcn.sweep.collect, segdcn.sweep.publish; print('torch' in sys.modules)"
    read = process(tmp_path, "-c", code)
    assert read.stdout == "False\n", read.stderr


def test_wrong_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["colect", "x"], ["collect"]):
        with pytest.raises(SystemExit) as end:
            parse_arguments(arguments)
        assert end.value.code == 2
        capsys.readouterr()
