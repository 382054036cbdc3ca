"""Check a download of PASCAL VOC 2012 and turn the masks of SBD into PNGs, once.

    python scripts/prepare_voc.py PATH/TO/VOCdevkit [--sbd PATH/TO/benchmark_RELEASE/dataset] [--workers 2]

With --sbd, SBD's masks of train_aug are written to VOC2012/SegmentationClassAug as palette PNGs like VOC's own, for
dataset=voc dataset.root=... dataset.sbd_root=... A conversion that was stopped goes on where it was. The exit status is
1 where something is missing or cannot be read.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy.io import loadmat

from segdcn.data.dataset import voc_palette
from segdcn.data.voc import TRAIN_AUG_IMAGES, VOC

PALETTE = [value for color in voc_palette(256) for value in color]


def read_mat(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The class mask of one of SBD's cls/NAME.mat: GTcls.Segmentation, (H, W) with 0..20."""
    label = loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    if label.ndim != 2 or label.size == 0 or not ((label >= 0) & (label <= 20)).all():
        raise ValueError(f"GTcls.Segmentation must be a mask of 0..20, got shape {label.shape}")
    return np.asarray(label, np.uint8)


def is_mask(path: Path) -> bool:
    """Whether the file is a whole palette image, as a finished conversion leaves it."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.mode == "P"
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        return False


def convert(name: str, source: Path, target: Path) -> str | None:
    """Write one mask, whole or not at all; an error is returned as a line that names the file."""
    mat, png = source / f"{name}.mat", target / f"{name}.png"
    if is_mask(png):
        return None
    partial_file = target / f".{name}.{os.getpid()}.partial"
    try:
        image = Image.fromarray(read_mat(mat))
        image.putpalette(PALETTE)
        image.save(partial_file, format="PNG")
        partial_file.replace(png)
    except FileNotFoundError:
        return f"{mat} does not exist"
    except Exception as error:  # loadmat raises many kinds for a damaged file
        return f"{mat} cannot be converted: {' '.join(str(error).split()) or type(error).__name__}"
    finally:
        partial_file.unlink(missing_ok=True)
    return None


def prepare(root: Path, sbd: Path | None, workers: int, console: Console) -> list[str]:
    """Check, convert and check again; the problems, one line each."""
    problems = []
    voc = VOC(root, sbd)
    if sbd is not None:
        names = voc.sbd_names()
        voc.sbd_masks.mkdir(exist_ok=True)
        for leftover in voc.sbd_masks.glob(".*.partial"):
            leftover.unlink()
        with ProcessPoolExecutor(workers) as pool:
            results = pool.map(partial(convert, source=sbd / "cls", target=voc.sbd_masks), names, chunksize=16)
            shown = track(results, "SBD masks", total=len(names), console=console)
            problems += [problem for problem in shown if problem is not None]
    for split in ("train", "val"):
        if split not in voc.splits:
            problems.append(f"{voc.list_file(split)} does not exist: unpack VOC's archive again")
    for split in voc.splits:
        if split == "train" and problems:
            continue  # its masks are not complete, which was said
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                count = len(voc.split(split))
            except (OSError, ValueError) as error:
                problems.append(str(error))
                continue
        aug = split == "train" and sbd is not None
        console.print(f"{'train_aug' if aug else split}: {count:,} images", highlight=False)
        if aug and count != TRAIN_AUG_IMAGES:
            console.print(
                f"  {count - TRAIN_AUG_IMAGES:+,} to the {TRAIN_AUG_IMAGES:,} of the literature", highlight=False
            )
        elif caught:
            console.print(f"  {caught[0].message}", highlight=False)
    return problems


def main() -> None:
    """Print counts and, at the end, every problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="VOC2012, or a folder that holds it or VOCdevkit/VOC2012")
    parser.add_argument("--sbd", type=Path, help="SBD's benchmark_RELEASE/dataset")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    arguments = parser.parse_args()
    try:
        problems = prepare(arguments.root, arguments.sbd, arguments.workers, Console(soft_wrap=True))
    except (OSError, ValueError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
