"""VOC's files; Cityscapes' are read by the official evaluator in test_official_cityscapes.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segdcn.data.dataset import voc_palette
from segdcn.runs.submission import CityscapesSubmission, VocSubmission


def test_voc_files_hold_classes_as_palette_indices(tmp_path: Path) -> None:
    prediction = torch.arange(21, dtype=torch.uint8).view(3, 7)
    VocSubmission(tmp_path, "test", voc_palette(21))("2008_000006", prediction)
    file = tmp_path / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls" / "2008_000006.png"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    with Image.open(file) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), prediction.numpy())
        assert picture.convert("RGB").getpixel((1, 0)) == (128, 0, 0)


def test_cityscapes_files_hold_label_ids(tmp_path: Path) -> None:
    CityscapesSubmission(tmp_path, (7, 8, 33))("berlin_000000_000019", torch.tensor([[0, 2, 1]], dtype=torch.uint8))
    with Image.open(tmp_path / "berlin_000000_000019_labelIds.png") as picture:
        assert picture.mode == "L"
        assert np.asarray(picture).tolist() == [[7, 33, 8]]
