"""counts.npz: what is written is read, and what cannot be read is told in a line that names the file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from segdcn.evaluation import SegmentationMetrics
from segdcn.evaluation.counts import Counts
from segdcn.evaluation.metrics import count_pairs
from segdcn.runs.figures import read_counts, write_counts


def some_counts() -> Counts:
    generator = torch.Generator().manual_seed(0)
    label, prediction = torch.randint(0, 3, (2, 5, 8, 9), generator=generator)
    label[4] = 255
    pairs = torch.stack([count_pairs(prediction[n : n + 1], label[n : n + 1], 3) for n in range(5)])
    images = torch.stack((pairs.diagonal(dim1=1, dim2=2), pairs.sum(dim=2), pairs.sum(dim=1)), dim=1)
    return Counts(["a", "b/ü", "</script>", "d", "e"], ["sky", "road", "x"], images, pairs.sum(dim=0))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    counts = some_counts()
    write_counts(tmp_path / "counts.npz", counts)
    read = read_counts(tmp_path / "counts.npz")
    assert (read.names, read.class_names) == (counts.names, counts.class_names)
    assert torch.equal(read.images, counts.images)
    assert torch.equal(read.confusion, counts.confusion)


def test_miou_of_images_against_each_image_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    label, prediction = torch.randint(0, 4, (2, 6, 5, 7), generator=generator)
    label[2], prediction[2] = 1, 1  # one class alone
    pairs = torch.stack([count_pairs(prediction[n : n + 1], label[n : n + 1], 6) for n in range(6)])
    images = torch.stack((pairs.diagonal(dim1=1, dim2=2), pairs.sum(dim=2), pairs.sum(dim=1)), dim=1)
    found = Counts(list("abcdef"), list("uvwxyz"), images, pairs.sum(dim=0)).miou_of_images
    for n in range(6):
        metrics = SegmentationMetrics(6)
        metrics.update(prediction[n : n + 1], label[n : n + 1])
        assert found[n].item() == metrics.compute()["miou"].item()
    assert found[2] == 1
    assert some_counts().miou_of_images.isnan().tolist() == [False, False, False, False, True]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    with pytest.raises(FileNotFoundError, match="segdcn-evaluate"):
        read_counts(path)
    write_counts(path, some_counts())
    whole = path.read_bytes()
    hostile = np.array([{"a": 1}], dtype=object)
    for content in (b"", whole[: len(whole) // 2], b"no archive", pickle.dumps(hostile)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"counts\.npz cannot be read"):
            read_counts(path)
    arrays = dict(np.load(Path(_copy(tmp_path, whole))))
    np.savez(path, **{**arrays, "names": hostile})
    with pytest.raises(ValueError, match=r"counts\.npz cannot be read"):
        read_counts(path)
    np.savez(path, **{**arrays, "images": arrays["images"][:3]})
    with pytest.raises(ValueError, match="does not fit together"):
        read_counts(path)


def _copy(folder: Path, content: bytes) -> Path:
    path = folder / "whole.npz"
    path.write_bytes(content)
    return path
