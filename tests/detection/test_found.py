"""Kept detections: what is written is what is read, and damage is told in one line."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from made_found import some_found, some_images

from segdcn.detection.found import Found, read_found, write_found
from segdcn.errors import UserError


def assert_same(one: Found, two: Found) -> None:
    assert list(one.names) == list(two.names)
    assert list(one.class_names) == list(two.class_names)
    for kind in ("detections", "objects"):
        for a, b in zip(getattr(one, kind), getattr(two, kind), strict=True):
            assert type(a) is type(b)
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left, right, strict=True)


@given(some_found())
def test_what_is_written_is_read(found: Found) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "found.npz"
        write_found(path, found)
        assert_same(read_found(path), found)
        assert [file.name for file in path.parent.iterdir()] == ["found.npz"]


def test_there_is_no_pickle_in_it(tmp_path: Path) -> None:
    write_found(tmp_path / "found.npz", some_images(3))
    with np.load(tmp_path / "found.npz", allow_pickle=False) as arrays:
        content = {key: arrays[key] for key in arrays.files}
    assert content["detections"].sum() == len(content["detections_scores"])
    assert content["objects_boxes"].shape == (content["objects"].sum(), 4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no detections at .*found\.npz"):
        read_found(tmp_path / "found.npz")


def test_half_a_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    write_found(path, some_images(3))
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:200] + bytes(300) + whole[500:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^.*found\.npz cannot be read: it is damaged .*evaluate again$"):
            read_found(path)


@pytest.mark.parametrize(
    ("key", "change", "what"),
    [
        ("detections", lambda counts: counts[:-1], "boxes of shape"),
        ("detections", lambda counts: counts[:, None], "one of each image"),
        ("objects", lambda counts: counts - 100, "one of each image"),
        ("detections_boxes", lambda boxes: boxes[:, :3], "boxes of shape"),
        ("detections_scores", lambda scores: scores[1:], "scores of shape"),
        ("objects_labels", lambda labels: labels - 1, "the classes are 1 to 3"),
        ("names", lambda names: names[1:], "2 names, detections of 3"),
        ("class_names", lambda names: names[1:], "the classes are 1 to 2"),
    ],
)
def test_parts_that_do_not_fit_are_told(key: str, change: object, what: str, tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    write_found(path, some_images(3))
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    assert callable(change)
    np.savez(path, **(content | {key: change(content[key])}))
    with pytest.raises(UserError, match=rf"^.*found\.npz does not fit together: .*({what}).*; evaluate again$"):
        read_found(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    write_found(path, some_images(3))
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    np.savez(path, **(content | {"names": np.array([object()] * 3)}))
    with pytest.raises(UserError, match="damaged"):
        read_found(path)
