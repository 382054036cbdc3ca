"""segdcn: semantic segmentation with deformable convolution on PyTorch Lightning and Hydra."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdcn.predictor import Prediction, Predictor, load

__version__ = "0.1.0"
__all__ = ["MissingFileError", "MissingPackageError", "Prediction", "Predictor", "UserError", "load"]


class UserError(ValueError):
    """What whoever called can mend: a setting, an argument, a file. The message is one line: what, where, what to do.

    A command prints it as that line, and a sweep does not try such a job again. Everything else that is raised is a
    fault of the moment or a bug of ours.
    """

    def __init__(self, message: str = "") -> None:
        # a DataLoader raises its worker's error anew with the worker's whole traceback as the message
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2] if "\n" in message else message)


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not where it was said to be."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is not installed."""


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import segdcn` itself, and every command's --help, need not wait for torch.
    if name in __all__:
        from segdcn import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
