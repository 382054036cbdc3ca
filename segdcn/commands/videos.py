"""Videos by OpenCV: frames to read one by one, and an MP4 to write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from segdcn.data.dataset import printable
from segdcn.errors import UserError
from segdcn.runs.files import replacing


class Video:
    """A video that is open.

    rate: frames per second. expected: how many frames the container says it has; 0 where it does not.
    """

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture
        self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.expected = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.read = 0

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Frames, uint8 (H, W, 3) RGB; one is in memory at a time.

        Raises: UserError where there is none.
        """
        while (found := self._capture.read())[0]:
            self.read += 1
            yield np.asarray(cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB), np.uint8)
        if self.read == 0:
            raise UserError("holds no frame that can be read")

    def check_whole(self) -> None:
        """Raises: UserError where frames are missing, by more than a container's count may be off."""
        if self.read < self.expected - max(2, self.expected // 50):
            raise UserError(f"only {self.read} of {self.expected} frames could be read; those were predicted")


@contextmanager
def opened_video(path: Path) -> Iterator[Video]:
    """Raises: UserError for a file that is no video."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file is said once, at the end
    with _alias(path) as plain:
        capture = cv2.VideoCapture(str(plain))
    try:
        if not capture.isOpened():
            raise UserError("cannot be read as a video")
        yield Video(capture)
    finally:
        capture.release()


@contextmanager
def _alias(path: Path, suffix: str | None = None) -> Iterator[Path]:
    """The file under a name that OpenCV can open it by, which takes UTF-8 alone; with a suffix that is given."""
    if suffix is None and str(path) == printable(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"link{path.suffix if suffix is None else suffix}")
        link.symlink_to(path.absolute())
        yield link


@contextmanager
def mp4(path: Path, rate: float) -> Iterator[Any]:
    """A function that appends RGB frames to an MP4, which appears under its name when it is whole.

    MP4 wants even sides: an odd one is given a white row or column.
    """
    writer: cv2.VideoWriter | None = None
    with ExitStack() as stack:

        def write(frame: Any) -> None:
            nonlocal writer
            height, width = frame.shape[:2]
            frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            if writer is None:
                file = stack.enter_context(replacing(path))
                fourcc = cv2.VideoWriter.fourcc(*"mp4v")
                with _alias(Path(file.name), ".mp4") as plain:  # which tells OpenCV the format
                    writer = cv2.VideoWriter(str(plain), fourcc, rate, (frame.shape[1], frame.shape[0]))
                stack.callback(writer.release)  # before the file gets its name
                if not writer.isOpened():
                    raise UserError(f"OpenCV cannot write {path}: its build lacks the mp4v codec")
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

        yield write
