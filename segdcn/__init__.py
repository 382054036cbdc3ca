"""segdcn: semantic segmentation with deformable convolution on PyTorch Lightning and Hydra."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdcn.predictor import Prediction, Predictor, load

__version__ = "0.1.0"
__all__ = ["Prediction", "Predictor", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import segdcn` itself, and every command's --help, need not wait for torch.
    if name in __all__:
        from segdcn import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
