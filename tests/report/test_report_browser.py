"""The page in a real browser: the system's Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FirstRun

import segdcn
from segdcn.analysis import last_layers, record, trace
from segdcn.data import Sample, Shapes
from segdcn.evaluation.counts import Counts
from segdcn.report.images import ImageOptions
from segdcn.report.pages import run_page
from segdcn.report.runs import read_finished
from segdcn.runs.figures import read_counts, write_counts

pytestmark = pytest.mark.slow

HOSTILE = "</script><img src=x onerror=alert(1)>"

CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const parse = (text) => {
    const c = channels(text);
    return text.startsWith("color(") ? [255 * c[0], 255 * c[1], 255 * c[2], c[3] ?? 1] : [...c.slice(0, 3), c[3] ?? 1];
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      layers.push(colour);
      if (colour[3] === 1) break;
    }
    const over = (low, [r, g, b, a]) => [r, g, b].map((v, i) => a * v + (1 - a) * low[i]);
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    if (!element.getClientRects().length || element.closest("title, desc, .visually-hidden, .skip, option")) continue;
    const style = getComputedStyle(element);
    const svg = element.namespaceURI.endsWith("svg");
    const ink = light(parse(svg ? style.fill : style.color).slice(0, 3));
    const pair = [ink, light(behind(element))].sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


class HostileShapes(Shapes):
    """Shapes whose first image has a hostile name."""

    def split(self, name: str) -> list[Sample]:
        first, *others = super().split(name)
        return [first._replace(name=HOSTILE), *others]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(first_run: FirstRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose offsets are large, with hostile names of run, class and image."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(first_run.folder, folder, ignore=shutil.ignore_patterns("tensorboard", "panels", "report.html"))
    path = folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for key, value in checkpoint["state_dict"].items():
        if key.endswith(".offset.weight"):
            value += 0.05 * torch.randn(value.shape, generator=generator)
        if key.endswith("layer4.0.conv2.offset.bias"):
            value += 0.5 * torch.randint(-1, 2, value.shape, generator=generator)
    checkpoint["segdcn"]["class_names"][1] = HOSTILE
    torch.save(checkpoint, path)
    for name in ("metrics.json", "config.yaml", "metrics.csv"):
        text = (folder / name).read_text().replace("val/iou/disc", f"val/iou/{HOSTILE}")
        (folder / name).write_text(text.replace("name: shapes", f'name: "{HOSTILE}"'))
    counts = read_counts(folder / "counts.npz")
    names = [HOSTILE, *counts.names[1:]]
    classes = [HOSTILE if name == "disc" else name for name in counts.class_names]
    write_counts(folder / "counts.npz", Counts(names, classes, counts.images, counts.confusion))
    data = HostileShapes(train_images=1, val_images=8)
    page = run_page(read_finished(folder), ImageOptions(lambda _: data, budget=2e10))
    return page.write(folder / "report.html")


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The opened page; whatever it says, asks for or stumbles over fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith(("data:", "file:")) or troubles.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector(".viewer[data-ready]")
    yield page
    context.close()
    assert troubles == []


def click(page: Any, pane: int, row: int, column: int) -> list[list[float]]:
    """Choose a pixel of the 96x96 image; returns the points (y, x) that the pane shows."""
    box = page.locator(".pane canvas").nth(pane).bounding_box()
    position = {"x": (column + 0.5) * box["width"] / 96, "y": (row + 0.5) * box["height"] / 96}
    page.locator(".pane canvas").nth(pane).click(position=position)
    return points(page, pane)


def points(page: Any, pane: int) -> list[list[float]]:
    samples: list[list[float]] = page.locator(".pane").nth(pane).evaluate("pane => pane.samples")
    return samples


def test_a_click_shows_the_points_that_trace_finds(page: Any, report: Path) -> None:
    predictor = segdcn.load(report.parent / "checkpoints" / "best.ckpt")
    name = page.locator(".thumbs img").first.get_attribute("alt")
    index = 0 if name == HOSTILE else int(name.removeprefix("val_"))
    image = predictor.batch(Shapes(train_images=1, val_images=8).split("val")[index].image)
    calls = record(predictor.network, image, last_layers(predictor.network, 3))
    counts = set()
    for row, column in [(48, 55), (50, 41), (0, 0), (95, 95), (30, 70), (66, 12)]:
        for pane, chain in enumerate((calls, [call.undeformed() for call in calls])):
            depths = trace(chain, (row, column), (96, 96))
            for depth in (1, 2, 3):
                page.locator(f'[data-depth="{depth}"]').check()
                shown = click(page, pane, row, column)
                assert np.allclose(shown, depths[depth - 1].numpy(), atol=1e-4)
                assert page.locator(".pane").nth(pane).get_attribute("data-points") == str(len(shown))
                counts.add(len(shown))
    assert {9, 81, 729} <= counts
    assert len(counts) > 3  # and pixels whose points leave the map


def test_the_viewer_answers_with_729_points(page: Any) -> None:
    assert len(click(page, 1, 50, 55)) == 729
    assert page.locator(".pane").nth(1).get_attribute("data-points") == "729"
    note = page.locator(".pane-note").nth(1).text_content()
    assert note.startswith("729 points")
    assert "pixel row 50, column 55" in page.locator(".readout").text_content()


def test_the_keyboard_does_what_the_mouse_does(page: Any) -> None:
    click(page, 0, 40, 40)
    canvas = page.locator(".pane canvas").first
    canvas.focus()
    page.keyboard.press("Tab")  # a focus by keyboard is one that can be seen
    page.keyboard.press("Shift+Tab")
    assert canvas.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "Shift+ArrowLeft"):
        canvas.press(key)
    assert "pixel row 41, column 36" in page.locator(".readout").text_content()
    page.locator('[data-depth="3"]').focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".pane").first.get_attribute("data-points") in ("81", "73", "65", "57", "49")
    page.locator(".thumbs button").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector('.thumbs button:nth-child(2)[aria-pressed="true"]')
    slider = page.locator(".compare input[type=range]").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".stack").first.evaluate("one => one.style.getPropertyValue('--cut')") == "51%"
    page.locator('[data-side="right"][value="errors"]').check()
    assert "wrong" in page.locator(".shown-right").first.get_attribute("alt")


def test_overlays_change_what_is_drawn(page: Any) -> None:
    def drawn() -> str:
        pixels: str = page.locator(".pane canvas").first.evaluate("canvas => canvas.toDataURL()")
        return pixels

    seen = {drawn()}
    for control in ('[data-control="points"]', '[value="both"]', '[value="prediction"]', '[data-control="field"]'):
        page.locator(control).click()
        seen.add(drawn())
    assert len(seen) == 5
    assert "receptive field of this pixel" in page.locator(".pane-note").first.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colour_schemes(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert contrasts[0][0] >= 4.5, contrasts[:5]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"
    assert dark == (scheme == "dark")


def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [page.locator(".pane canvas").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]
    assert len(click(page, 1, 50, 55)) == 729


def test_hostile_names_are_shown_as_they_are(page: Any) -> None:
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("img[src=x]").count() == 0
    assert HOSTILE in page.locator(".bars").text_content()
    click(page, 0, 10, 10)


def test_every_picture_has_a_text_and_every_control_a_name(page: Any) -> None:
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("svg.chart:not(:has(title))").count() == 0
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, button, select, canvas')].filter((one) => !(one.ariaLabel ||"
        " one.closest('label')?.textContent.trim() || one.textContent.trim() || one.querySelector('img')?.alt)).length"
    )
    assert unnamed == 0
