"""Training: settings, the loop, exact resuming, evaluation and prediction.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.training.evaluation import evaluate
    from deltune.training.fitting import fit
    from deltune.training.penalties import AddsPenalty
    from deltune.training.prediction import predict
    from deltune.training.reference import ReferenceModel
    from deltune.training.result import FitResult
    from deltune.training.settings import TrainingSettings, setting_rows
    from deltune.training.trainer import DeltaTrainer

_MODULES = {
    "AddsPenalty": "penalties",
    "DeltaTrainer": "trainer",
    "FitResult": "result",
    "ReferenceModel": "reference",
    "TrainingSettings": "settings",
    "evaluate": "evaluation",
    "fit": "fitting",
    "predict": "prediction",
    "setting_rows": "settings",
}

__all__ = [
    "AddsPenalty",
    "DeltaTrainer",
    "FitResult",
    "ReferenceModel",
    "TrainingSettings",
    "evaluate",
    "fit",
    "predict",
    "setting_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
