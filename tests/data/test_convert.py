"""segdcn-data convert: polygons that were drawn by hand become masks, and whatever cannot be is named first."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image, ImageOps
from running import call, process, waiting

from segdcn.commands.data import main
from segdcn.data import ImageFolder
from segdcn.data.dataset import ImageMaskFiles, ImageMaskPair

HEIGHT, WIDTH = 40, 60


def convert(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit status, standard output, and the lines of errors."""
    status = call(main, "convert", *arguments)
    shown = capsys.readouterr()
    return status, shown.out, shown.err.splitlines()


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def inside(*polygons: list[float]) -> np.ndarray:
    """The pixels whose centres lie in any of some polygons [x, y, ...]."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    centres = np.stack([columns, rows], axis=-1).reshape(-1, 2)
    return np.logical_or.reduce(
        [Outline(np.reshape(one, (-1, 2))).contains_points(centres).reshape(HEIGHT, WIDTH) for one in polygons]
    )


DOG, CAT, EAR = (
    [5.2, 4.1, 50.3, 6.4, 44.9, 35.2, 8.7, 30.6],
    [20.3, 10.1, 35.7, 12.2, 28.4, 28.9],
    [1.1, 1.2, 9.3, 2.4, 3.3, 9.7],
)


def coco(**changed: Any) -> dict[str, Any]:
    """Four images: a dog with a cat before it in two parts, a crowd, nothing, a box without a polygon."""
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 3 * HEIGHT, HEIGHT * (WIDTH - 3)]}
    annotations = [
        {"id": 11, "image_id": 1, "category_id": 9, "segmentation": [CAT, EAR], "iscrowd": 0},
        {"id": 12, "image_id": 1, "category_id": 4, "segmentation": [DOG], "iscrowd": 0},
        {"id": 13, "image_id": 2, "category_id": 4, "segmentation": crowd, "iscrowd": 1},
        {"id": 14, "image_id": 2, "category_id": 9, "segmentation": [[-1.5, -1, 20, -1, 20, 20]], "iscrowd": 0},
        {"id": 15, "image_id": 4, "category_id": 9, "segmentation": [], "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {"id": 16, "image_id": 1, "category_id": 4, "segmentation": [[5.6, 5.6, 5.9, 5.6, 5.9, 5.9]], "iscrowd": 0},
        {"id": 17, "image_id": 1, "category_id": 4, "segmentation": [[5, 5, 6, 6]], "iscrowd": 0},
    ]
    images = [{"id": k, "file_name": f"{k}.png", "height": HEIGHT, "width": WIDTH} for k in (1, 2, 3, 4)]
    # neither by name nor in order of the ids
    categories = [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories, **changed}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with ``photos`` and ``all.json``."""
    for number in range(1, 6):
        photo(tmp_path / "photos" / f"{number}.png", number)
    (tmp_path / "all.json").write_text(json.dumps(coco()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = ("annotations=all.json", "image_root=photos", "output=out")


def test_coco_becomes_masks_of_class_numbers(root: Path) -> None:
    before = {path.name: path.read_bytes() for path in (root / "photos").iterdir()}
    ended = process(root, "-m", "segdcn.commands.data", "convert", *GIVEN)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (root / "out/classes.txt").read_text() == "background\ndog\ncat\n"
    assert sorted(path.name for path in (root / "out").iterdir()) == ["classes.txt", "images", "masks"]
    for part in ("images", "masks"):
        assert sorted(path.name for path in (root / "out" / part).iterdir()) == [f"{k}.png" for k in (1, 2, 3, 4)]

    first = np.where(inside(DOG), 1, 0)
    first[inside(CAT, EAR)] = 2  # smaller, and so before it, although it stands first
    np.testing.assert_array_equal(mask_of(root / "out/masks/1.png"), first)
    triangle = inside([-1.5, -1, 20, -1, 20, 20])
    second = np.where(triangle, 2, 0)
    second[:, :3] = 255
    assert triangle.sum() > 3 * HEIGHT
    np.testing.assert_array_equal(mask_of(root / "out/masks/2.png"), second)
    for name in ("3", "4"):
        assert not mask_of(root / f"out/masks/{name}.png").any()

    beneath = int((inside(DOG) & inside(CAT, EAR)).sum())
    crowded = int((triangle & (second == 255)).sum())
    for line in (
        "COCO: 4 image(s), 4 annotation(s) drawn, 3 classes",
        f"  1 dog: {100 * (first == 1).sum() / (4 * HEIGHT * WIDTH):.2f} % of the pixels, in 1 image(s)",
        "left out: 1 annotation(s) without a polygon (a box alone)",
        "left out: 1 annotation(s) of fewer than three points",
        "left out: 1 annotation(s) that cover no pixel's centre",
        "ignored: 1 annotation(s) that are marked as iscrowd; ignore_crowd=false draws them as what they are named",
        "no annotation that is drawn: 2 file(s) (3.png, 4.png), all of whose pixels are background; empty=false leaves"
        " them out",
        "left out: 1 image file(s) that the annotations do not name",
        f"overlap: {beneath} pixels of dog lie under cat, the smaller",
        f"overlap: {crowded} pixels of cat lie under ignored, the smaller",
        "wrote out; look at it with segdcn-data check dataset=folder dataset.root=out",
    ):
        assert line in ended.stdout.splitlines(), ended.stdout
    assert {path.name: path.read_bytes() for path in (root / "photos").iterdir()} == before
    assert "images: 4 hard links to the given files" in ended.stdout
    assert (root / "out/images/1.png").samefile(root / "photos/1.png")


def test_converting_again_gives_the_same_bytes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output in ("one", "two"):
        assert convert(capsys, *GIVEN[:2], f"output={output}")[0] == 0
    for path in (root / "one/masks").iterdir():
        assert path.read_bytes() == (root / "two/masks" / path.name).read_bytes()


def test_classes_are_chosen_and_ordered(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, errors = convert(capsys, *GIVEN, "classes=[cat,background]", "empty=false", "link=false")
    assert (status, errors) == (0, [])
    assert (root / "out/classes.txt").read_text() == "cat\nbackground\n"
    np.testing.assert_array_equal(mask_of(root / "out/masks/1.png"), np.where(inside(CAT, EAR), 0, 1))
    assert sorted(path.name for path in (root / "out/images").iterdir()) == ["1.png", "2.png"]
    assert "left out: 2 annotation(s) of classes that were not chosen (dog)" in shown  # one of them of no pixel
    assert "images: 2 copies of the given files" in shown
    assert not (root / "out/images/1.png").samefile(root / "photos/1.png")
    assert (root / "out/images/1.png").read_bytes() == (root / "photos/1.png").read_bytes()


def test_what_no_annotation_covers_is_ignored_where_that_is_asked(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(capsys, *GIVEN, "background=null")[0] == 0
    assert (root / "out/classes.txt").read_text() == "dog\ncat\n"
    expected = np.where(inside(DOG), 0, 255)
    expected[inside(CAT, EAR)] = 1
    np.testing.assert_array_equal(mask_of(root / "out/masks/1.png"), expected)


def test_a_crowd_is_drawn_where_that_is_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = convert(capsys, *GIVEN, "ignore_crowd=false")
    assert "ignored" not in shown
    assert (mask_of(root / "out/masks/2.png")[:, :3] == 1).all()


def test_splits_share_their_classes_and_the_check_has_no_problem(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = coco()
    for split, numbers in {"train": (1, 2), "val": (3, 4)}.items():
        images = [image for image in whole["images"] if image["id"] in numbers]
        annotations = [{**one, "image_id": numbers[one["image_id"] % 2]} for one in whole["annotations"]]
        content = {**whole, "images": images, "annotations": annotations}
        if split == "val":  # where the categories stand in another order
            content["categories"] = [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}]
        (root / f"{split}.json").write_text(json.dumps(content))
        status, _, errors = convert(
            capsys, f"annotations={split}.json", "image_root=photos", "output=out", f"split={split}"
        )
        assert (status, errors) == (0, [])
    assert sorted(path.name for path in (root / "out").iterdir()) == ["classes.txt", "train", "val"]
    assert (root / "out/classes.txt").read_text() == "background\ndog\ncat\n"
    assert call(main, "check", "workers=0", "picture=null", "dataset=folder", "dataset.root=out") == 0
    shown = capsys.readouterr().out
    assert "4 images, 0 problem(s)" in shown

    (root / "more.json").write_text(json.dumps(coco(categories=[{"id": 9, "name": "cat"}, {"id": 4, "name": "cow"}])))
    arguments = ("annotations=more.json", "image_root=photos", "output=out", "split=test")
    status, _, (error,) = convert(capsys, *arguments)
    assert status == 1
    assert "out/classes.txt has no cow" in error
    assert "'classes=[background,dog,cat]' leaves them out; to have them, convert all splits anew" in error
    assert not (root / "out/test").exists()
    status, _, (wrong,) = convert(capsys, *arguments, "classes=[background,cat,dog]")
    assert (status, "out/classes.txt has background, dog, cat: classes and background must agree" in wrong) == (1, True)
    assert convert(capsys, *arguments, "classes=[dog,cat]")[0] == 0  # background is the first by itself
    status, _, (error,) = convert(capsys, *GIVEN)
    assert (status, "out is there already" in error) == (1, True)


@pytest.mark.slow
def test_from_coco_to_a_trained_network(root: Path) -> None:
    for split in ("train", "val"):
        for number in range(1, 6):
            photo(root / split / f"{number}.png", 10 * number + len(split))
        (root / f"{split}.json").write_text(json.dumps(coco()))
        arguments = (f"annotations={split}.json", f"image_root={split}", "output=out", f"split={split}")
        assert process(root, "-m", "segdcn.commands.data", "convert", *arguments).returncode == 0
    small = ("model=tiny", "datamodule.crop_size=[32,32]", "datamodule.batch_size=4", "trainer.max_epochs=1")
    bare = ("trainer.accelerator=cpu", "report=false", "output_dir=run")
    ended = process(
        root, "-m", "segdcn.commands.train", "experiment=finetune", "dataset=folder", "dataset.root=out", *small, *bare
    )
    assert ended.returncode == 0, ended.stderr
    assert "background, dog, cat" in ended.stdout
    assert 0 <= json.loads((root / "run/metrics.json").read_text())["val/miou"] <= 1


# --- labelme ----------------------------------------------------------------------------------------------------------


def labelme(path: Path, image: str, *shapes: dict[str, Any], size: tuple[int, int] | None = (HEIGHT, WIDTH)) -> None:
    content: dict[str, Any] = {"version": "5.5.0", "imagePath": image, "imageData": None, "shapes": list(shapes)}
    if size:
        content |= {"imageHeight": size[0], "imageWidth": size[1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def shape(label: str, points: list[float], kind: str | None = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": np.reshape(points, (-1, 2)).tolist(), "shape_type": kind, **more}


def test_labelme_becomes_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        photo(tmp_path / f"drawn/{number}.png", number)
    stamp = np.zeros((6, 8), np.uint8)
    stamp[1:5, 2:7] = 1
    encoded = io.BytesIO()
    Image.fromarray(stamp).save(encoded, "PNG")
    labelme(
        tmp_path / "drawn/0.json",
        "..\\elsewhere\\0.png",
        shape("dog", DOG),
        shape("cat", [40, 30, 50, 38], "rectangle"),
        shape("ball", [12.0, 30.0, 15.0, 34.0], "circle"),
        shape("cat", [50, 2, 57, 7], "mask", mask=base64.b64encode(encoded.getvalue()).decode()),
        shape("_background_", CAT, None),
        shape("__ignore__", EAR),
        shape("leash", [1, 1, 9, 9], "line"),
        shape("leash", [1, 1, 9, 9, 3, 3], "linestrip"),
        shape("nose", [4, 4], "point"),
    )
    labelme(tmp_path / "drawn/1.json", "1.png", size=None)
    status, shown, errors = convert(capsys, "annotations=drawn", "output=out")
    assert (status, errors) == (0, [])
    assert (tmp_path / "out/classes.txt").read_text() == "background\nball\ncat\ndog\n"
    expected = np.where(inside(DOG), 3, 0)
    expected[inside(CAT)] = 0
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    expected[30:38, 40:50] = 2
    expected[(columns - 12) ** 2 + (rows - 30) ** 2 <= 25] = 1
    expected[inside(EAR)] = 255
    expected[2:8, 50:58][stamp > 0] = 2
    np.testing.assert_array_equal(mask_of(tmp_path / "out/masks/0.png"), expected)
    assert not mask_of(tmp_path / "out/masks/1.png").any()
    for line in (
        "labelme: 2 image(s), 6 annotation(s) drawn, 4 classes",
        "left out: 1 annotation(s) that are no area (line)",
        "left out: 1 annotation(s) that are no area (linestrip)",
        "left out: 1 annotation(s) that are no area (point)",
        "left out: 1 image file(s) that the annotations do not name",
        f"overlap: {(inside(DOG) & inside(CAT)).sum()} pixels of dog lie under background, the smaller",
    ):
        assert line in shown.splitlines(), shown


def test_labelme_draws_on_the_turned_image_and_masks_are_of_stored_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a camera that was held otherwise stores it; Pillow turns it for the eye."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    stored = np.full((30, 50, 3), 40, np.uint8)
    stored[3:12, 5:31] = (200, 30, 30)
    for orientation in range(1, 9):
        for suffix in ("png", "tif"):
            file = tmp_path / f"a/{suffix}{orientation}.{suffix}"
            tag = Image.Exif()
            tag[0x0112] = orientation
            Image.fromarray(stored).save(file, exif=tag)
            with Image.open(file) as image:
                upright = np.array(ImageOps.exif_transpose(image))
            rows, columns = np.nonzero(upright[..., 0] == 200)
            corners = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
            box = shape("box", corners, "rectangle")
            labelme(file.with_suffix(".json"), file.name, box, size=upright.shape[:2])
    status, _, errors = convert(capsys, "annotations=a", "output=out")
    assert (status, errors) == (0, [])
    pairs = [
        ImageMaskPair(path, tmp_path / f"out/masks/{path.stem}.png", "") for path in (tmp_path / "out/images").iterdir()
    ]
    assert len(pairs) == 16
    for image, label, _ in ImageMaskFiles(pairs, 2):
        np.testing.assert_array_equal(label == 1, image[..., 0] == 200)


def test_a_class_of_another_split_alone_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (split, name) in enumerate((("train", "dog"), ("val", "cat"))):
        photo(tmp_path / f"{split}/{number}.png", number)
        labelme(tmp_path / f"{split}/{number}.json", f"{number}.png", shape(name, DOG))
        status, shown, errors = convert(
            capsys, f"annotations={split}", "output=out", f"split={split}", "classes=[cat,dog]"
        )
        assert (status, errors) == (0, [])
        assert f"  {2 - number} {name}: {100 * inside(DOG).mean():.2f} % of the pixels, in 1 image(s)" in shown
    assert (tmp_path / "out/classes.txt").read_text() == "background\ncat\ndog\n"


def test_no_copy_has_a_name_that_hides_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, wanted = coco()["images"], [".a.png", "../x/b.png", "../y/b.png", "c.png"]
    for image, name in zip(images, wanted, strict=True):
        image["file_name"] = name
        photo(root / "photos" / name, image["id"])
    (root / "all.json").write_text(json.dumps(coco(images=images)))
    assert convert(capsys, *GIVEN)[0] == 0
    assert {pair.name for pair in ImageFolder("out").split("train").pairs} <= {"a", "x_b", "y_b", "c"}
    assert sum(len(ImageFolder("out").split(name)) for name in ("train", "val")) == 4


def test_a_full_disk_is_told_of_the_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, copy: Path) -> None:
        raise OSError(28, "No space left on device", str(source), None, str(copy))

    monkeypatch.setattr(shutil, "copyfile", full)
    status, _, (error,) = convert(capsys, *GIVEN, "link=false")
    assert (status, "photos/1.png -> " in error, "/images/1.png: No space left" in error) == (75, True, True), error


def test_files_of_one_name_in_several_folders_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a/0", "b/0", "b/1")):
        photo(tmp_path / f"drawn/{name}.png", number)
        labelme(tmp_path / f"drawn/{name}.json", f"{name[2:]}.png", shape("dog", [number, 0, 30, 30], "rectangle"))
    assert convert(capsys, "annotations=drawn", "output=out")[0] == 0
    for name, number in {"a_0": 0, "b_0": 1, "1": 2}.items():
        assert mask_of(tmp_path / f"out/masks/{name}.png")[:30].sum() == 30 * (30 - number)
    photo(tmp_path / "drawn/b/b_0.png")
    labelme(tmp_path / "drawn/b/b_0.json", "b_0.png", shape("dog", DOG))
    status, _, (error,) = convert(capsys, "annotations=drawn", "output=again")
    assert (status, "b/0.png and b/b_0.png would have the same mask b_0.png" in error) == (1, True)


# --- what is wrong is told before anything is written ---------------------------------------------------------------


FILES = {
    "broken off": (json.dumps(coco())[:-40], "all.json is no JSON that can be read"),
    "a list": ("[1, 2]", "all.json is neither COCO's JSON, .*: it is no object"),
    "no images": ('{"annotations": []}', "all.json is neither COCO's JSON, .*: it holds annotations, and lacks images"),
    "other keys": ('{"version": 1}', "all.json is neither COCO's JSON, .*: it holds version"),
    "no categories": (json.dumps(coco(categories=None)), "all.json has no list of categories"),
    "no name": (json.dumps(coco(categories=[{"id": 4, "name": ""}])), "all.json: category 4 has no name"),
    "a blank name": (
        json.dumps(coco(categories=[{"id": 4, "name": " \ufeff"}])),
        "all.json: category 4 has a name that",
    ),
    "two of one id": (
        json.dumps(coco(categories=[{"id": 4, "name": "dog"}, {"id": 4, "name": "cat"}])),
        "all.json: category 4 stands there twice",
    ),
    "no entries": (json.dumps(coco(images=[], annotations=[])), "all.json lists no image"),
}


VARIANTS = ("a list", "no images", "other keys")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] if fault in VARIANTS else []) for fault in FILES]
)
def test_a_file_of_no_annotations_is_one_line(root: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    text, words = FILES[fault]
    (root / "all.json").write_text(text)
    before = sorted(root.rglob("*"))
    status, _, (error,) = convert(capsys, *GIVEN)
    assert status == 1
    assert re.match(f"error: {words}", error), error
    assert sorted(root.rglob("*")) == before


def polygon(*values: Any) -> dict[str, Any]:
    return {"segmentation": [list(values)]}


def runs(counts: Any, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"segmentation": {"size": list(size), "counts": counts}}


ANNOTATIONS: list[tuple[dict[str, Any], str]] = [
    ({"category_id": 5}, "is of category 5, which is not among the categories"),
    ({"category_id": None}, "has no category_id"),
    ({"image_id": 77}, "is of image 77, which is not among the images"),
    (
        polygon(5, 5, 90.5, 5, 30, 30),
        r"reaches 31 pixels beyond its image 1.png \(60x40, width x height\): mend it, or add outside=31 to cut off",
    ),
    (polygon(105, 105, 120, 105, 130, 130), "reaches 90 pixels beyond its image 1.png"),
    (polygon(-2.1, 5, 9, 5, 9, 9), "reaches 3 pixels beyond its image 1.png"),
    (polygon(1, 2, 3, 4, 5), "has points that are not pairs of numbers"),
    (polygon("a", 2, 3, 4), "has points that are not pairs of numbers"),
    (polygon(1, 2, 3, float("nan"), 5, 6), "has points that are not pairs of numbers"),
    (polygon(1, 2, 3, 10**400, 5, 6), "has points that are not pairs of numbers"),
    (polygon(1, 2, 3, -1e308, 5, 6), r"has a point at 1e\+308 pixels, which is in no image$"),
    (polygon(1, 2, [3, 4], 5), "has points that are not pairs of numbers"),
    ({"segmentation": "x"}, "has a segmentation that is neither polygons nor run lengths"),
    (runs([2400], (60, 40)), r"has run lengths of size \[60, 40\], and its image 1.png is \[40, 60\]"),
    (runs([5, 6]), "has run lengths of 11 pixels in an image of 2,400"),
    (runs([2401, -1]), "has run lengths below 0"),
    (runs("\n"), "has run lengths that cannot be read"),
    (runs("\ud800"), "has run lengths that cannot be read"),
]


def test_each_wrong_annotation_is_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"image_id": 1, "category_id": 4, "segmentation": [DOG], "iscrowd": 0}
    annotations = [{**good, **wrong, "id": 100 + place} for place, (wrong, _) in enumerate(ANNOTATIONS)]
    (root / "all.json").write_text(json.dumps(coco(annotations=annotations)))
    before = sorted(root.rglob("*"))
    status, _, errors = convert(capsys, *GIVEN)
    assert status == 1
    for place, (error, (_, words)) in enumerate(zip(errors, ANNOTATIONS, strict=True)):
        assert re.match(f"error: all.json: annotation {100 + place} {words}", error), error
    assert sorted(root.rglob("*")) == before


def test_each_wrong_image_is_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "photos/text.png").write_text("no picture")
    (root / "photos/2.gif").write_bytes(b"")
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "photos/turned.jpg", exif=turned)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"file_name": "9.png"}, "has no file photos/9.png: give the folder of the images with image_root=PATH"),
        ({"width": 61}, "is given as 61x40 pixels .* but photos/1.png is 60x40"),
        ({"width": None}, "has no width, which must be a whole number"),
        ({"file_name": "text.png"}, "photos/text.png cannot be read as an image"),
        ({"file_name": "2.gif"}, "is photos/2.gif, whose kind is not read"),
        ({"file_name": "turned.jpg"}, r"is photos/turned.jpg, which asks to be turned \(EXIF orientation 3\)"),
    ]
    images = [{**coco()["images"][0], **values, "id": 100 + place} for place, (values, _) in enumerate(wrong)]
    (root / "all.json").write_text(json.dumps(coco(images=images, annotations=[])))
    status, _, errors = convert(capsys, *GIVEN)
    assert status == 1
    for place, (error, (_, words)) in enumerate(zip(errors, wrong, strict=True)):
        assert re.match(f"error: all.json: image {100 + place} {words}", error), error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("annotations=nowhere.json", "output=out"), "there is no nowhere.json: give COCO's JSON file"),
        (("annotations=photos", "output=out"), "no .json in photos"),
        ((*GIVEN[::2], "image_root=nowhere"), "there is no folder nowhere"),
        ((*GIVEN[:2], "output=photos"), "photos is there already: give another output=DIR"),
        ((*GIVEN, "split=training"), "split must be train, val, test or null"),
        ((*GIVEN, "classes=cat"), "classes must be a list of names"),
        ((*GIVEN, "classes=[cat,cow]"), "asks for cow, which no annotation names: there are dog, cat"),
        ((*GIVEN, "classes=[cat,cat]"), "names a class twice"),
        ((*GIVEN, "classes=[cat]", "background=null"), "there are 1 classes"),
        ((*GIVEN, "background="), "background must be a class's name"),
        ((*GIVEN, 'background=" "'), "background must be a class's name"),
        ((*GIVEN, "outside=x"), "outside must be a number"),
        pytest.param((*GIVEN, "link=3"), "link must be true or false", marks=pytest.mark.slow),
        pytest.param(("output=out",), "annotations must be given", marks=pytest.mark.slow),
    ],
)
def test_wrong_settings(root: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    status, _, (error,) = convert(capsys, *arguments)
    assert (status, words in error) == (1, True), error
    assert not (root / "out").exists()


def test_more_lies_outside_where_that_is_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = [5, 5, 90.5, 5, 30, 30]
    annotation = {"id": 1, "image_id": 3, "category_id": 9, "segmentation": [outside]}
    (root / "all.json").write_text(json.dumps(coco(annotations=[annotation])))
    assert convert(capsys, *GIVEN, "outside=31")[0] == 0
    np.testing.assert_array_equal(mask_of(root / "out/masks/3.png"), np.where(inside(outside), 2, 0))


def test_labelme_faults_name_file_and_shape(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "drawn").mkdir()
    (root / "drawn/.0.json").write_text("hidden")
    (root / "drawn/00.json").write_text("{")
    labelme(root / "drawn/0.json", "0.png", shape("dog", DOG))
    labelme(root / "drawn/1.json", "1.png", shape("dog", [0, 0, 99, 9], "rectangle"), shape("cat", [1, 2], "circle"))
    labelme(root / "drawn/2.json", "2.png", shape("dog", [5, 5, 9, 9], "mask", mask="AAAA"))
    labelme(root / "drawn/3.json", "3.png", size=(WIDTH, HEIGHT))
    (root / "drawn/4.json").write_text("{}")
    (root / "drawn/5.json").write_text(json.dumps(coco()))
    labelme(root / "drawn/7.json", "1.png", size=(HEIGHT + 0.5, WIDTH))
    labelme(root / "drawn/6.json", "5.png", {"label": "", "points": []}, shape("dog", DOG))
    status, shown, errors = convert(capsys, "annotations=drawn", "image_root=photos", "output=out")
    assert (status, shown) == (1, "10 problem(s), nothing was written\n")
    for error, part in zip(
        errors,
        (
            "0.json: has no file photos/0.png",
            "00.json is no JSON that can be read",
            "1.json: shape 0 (dog) reaches 39 pixels beyond its image 1.png",
            "1.json: shape 1 (cat) is a circle of 1 points",
            "2.json: shape 0 (dog) has a mask that cannot be read as an image",
            "3.json: is given as 40x60 pixels",
            "4.json is neither",
            "5.json is COCO's JSON and lies among labelme's",
            "6.json: shape 0 () has no label",
            "7.json: has no imageHeight, which must be a whole number",
        ),
        strict=True,
    ):
        assert f"error: drawn/{part}" in error
    assert not (root / "out").exists()


def test_labelme_without_an_area_says_what_was_left_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelme(root / "drawn/1.json", "1.png", shape("dog", [1, 2, 3, 4], "line"), shape("cat", [1, 2], "point"))
    status, _, (error,) = convert(capsys, "annotations=drawn", "image_root=photos", "output=out")
    words = "error: drawn has no annotation that can be drawn: all are left out, 1 that are no area (line), 1 that are"
    assert (status, error.startswith(words)) == (1, True), error


def test_many_problems_are_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "all.json").write_text(json.dumps(coco(annotations=[{"id": k, "image_id": 9} for k in range(50)])))
    status, shown, errors = convert(capsys, *GIVEN)
    assert (status, len(errors), errors[-1]) == (1, 21, "error: and 30 more of such lines")
    assert shown == "50 problem(s), nothing was written\n"


def test_an_output_is_whole_or_is_not_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from segdcn.runs import files

    before = sorted(root.rglob("*"))
    whole = files.write_png

    def full(path: Path, picture: Image.Image) -> None:
        if path.name == "2.png":
            raise OSError(28, "No space left on device", str(path))
        whole(path, picture)

    monkeypatch.setattr(files, "write_png", full)
    status, shown, (error,) = convert(capsys, *GIVEN)
    assert (status, shown, "No space left on device" in error) == (75, "", True)
    assert sorted(root.rglob("*")) == before
    monkeypatch.undo()
    monkeypatch.chdir(root)
    (root / ".out.partial/masks").mkdir(parents=True)  # as a killed process leaves it
    (root / ".out.partial/masks/9.png").write_text("half")
    (root / "out").mkdir()  # empty, as it may be
    assert convert(capsys, *GIVEN)[0] == 0
    assert not (root / ".out.partial").exists()
    assert sorted(path.name for path in (root / "out/masks").iterdir()) == ["1.png", "2.png", "3.png", "4.png"]
    assert sorted(path.name for path in (root / "out").iterdir()) == ["classes.txt", "images", "masks"]


def test_two_processes_do_not_fill_one_output(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = """
import sys, time
from pathlib import Path
from segdcn.runs.folder import whole_folder
with whole_folder(Path(sys.argv[1]), "output=DIR") as made:
    (made / "masks").mkdir()
    print("filling", flush=True)
    time.sleep(600)
"""
    other = waiting(script, root / "out", "filling")
    try:
        status, _, (error,) = convert(capsys, *GIVEN)
        assert (status, "out is being written by another process" in error) == (1, True)
        assert (root / ".out.partial/masks").is_dir()
    finally:
        other.kill()
        other.wait()
    assert convert(capsys, *GIVEN)[0] == 0
    assert sorted(path.name for path in root.iterdir()) == ["all.json", "out", "photos"]
