"""The random numbers of training, kept apart from everybody else's.

Dropout draws from global generators. Evaluation, data loading, callbacks and the caller draw from them too, so
that a run that was killed and went on would see other numbers. Therefore each step starts from the state in
which the step before left the generators, whatever happened in between.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["RandomStream", "kept_apart"]


def _capture() -> dict[str, Any]:
    """The states of all generators."""
    import numpy as np

    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    # asking a GPU that nobody uses for its state would take memory there
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _restore(states: dict[str, Any]) -> None:
    import numpy as np

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


@contextmanager
def kept_apart() -> Iterator[None]:
    """Leave the generators as they were before the block."""
    states = _capture()
    try:
        yield
    finally:
        _restore(states)


class RandomStream:
    """A course of random numbers that can be left, entered again, saved and loaded.

    Args:
        seed: where it starts.
    """

    def __init__(self, seed: int) -> None:
        import numpy as np

        with kept_apart():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            self._states = _capture()

    def enter(self) -> None:
        """Put the global generators where the stream was left."""
        _restore(self._states)

    def leave(self) -> None:
        """Remember where the global generators are."""
        self._states = _capture()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as values that ``torch.load`` reads without running code."""
        name, keys, *rest = self._states["numpy"]
        return {**self._states, "numpy": (name, keys.tolist(), *rest)}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Go to where :meth:`state_dict` was."""
        import numpy as np

        name, keys, *rest = states["numpy"]
        numpy = (name, np.array(keys, dtype=np.uint32), *rest)
        self._states = {**states, "numpy": numpy, "python": tuple(states["python"])}
