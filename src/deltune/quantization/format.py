"""What a quantised model is stored as, and by which engine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deltune.errors import DeltuneError, MethodError, suggestion

__all__ = ["ENGINES", "NF4", "bitsandbytes"]

ENGINES = ("bitsandbytes", "torch")
#: Scales that share one second scale.
SCALE_BLOCK = 256
_BLOCKS = tuple(2**power for power in range(5, 13))
_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat: blocks of weights as 16 levels of the normal distribution times the block's largest value.

    Args:
        double_quantization: store the scales of the blocks in 8 bits, with a second scale for every 256 of them.
        compute_dtype: type of the products; by default that of the weights before (with bitsandbytes float32 for
            float64). float16 is unstable (the paper's authors lost a fifth of their runs of the 7B model), and bfloat16
            is slow on processors without instructions for it.
        block: weights that share one scale, a power of two from 32 to 4096.
        engine: ``bitsandbytes``, fast and for CPU and CUDA; or ``torch``, slow, which needs no other package.

    Raises:
        MethodError: if an argument makes no sense.

    Source:
        Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """

    double_quantization: bool = True
    compute_dtype: torch.dtype | None = None
    block: int = 64
    engine: str = "bitsandbytes"

    def __post_init__(self) -> None:
        if self.block not in _BLOCKS:
            raise MethodError(f"NF4: block must be a power of two from 32 to 4096, not {self.block!r}.")
        if self.compute_dtype is not None and self.compute_dtype not in _COMPUTE:
            names = ", ".join(str(item) for item in _COMPUTE)
            raise MethodError(f"NF4: compute_dtype must be one of {names}, not {self.compute_dtype!r}.")
        if self.engine not in ENGINES:
            raise MethodError(f"NF4: there is no engine {self.engine!r}. {suggestion(self.engine, ENGINES)}")
        if self.engine == "bitsandbytes" and self.compute_dtype == torch.float64:
            raise MethodError("NF4: bitsandbytes computes in 32 bits at most; float64 needs engine='torch'.")

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values, for files."""
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch.")
        return {**vars(self), "format": "nf4", "compute_dtype": dtype}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NF4:
        """As :meth:`to_dict` wrote it.

        Raises:
            MethodError: if it is another format.
        """
        rest = dict(values)
        if rest.pop("format") != "nf4":
            raise MethodError(f"This deltune knows the format nf4, not {values['format']!r}. Upgrade deltune.")
        dtype = rest["compute_dtype"]
        return cls(**{**rest, "compute_dtype": None if dtype is None else getattr(torch, dtype)})

    def same_levels(self, other: NF4) -> bool:
        """Whether both store a matrix as the same numbers."""
        return (self.block, self.double_quantization) == (other.block, other.double_quantization)

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight of a large matrix, its share of the scales included."""
        if not self.double_quantization:
            return 4 + 32 / self.block
        return 4 + 8 / self.block + 32 / (self.block * SCALE_BLOCK)


def bitsandbytes() -> Any:
    """The module bitsandbytes.

    Raises:
        DeltuneError: if it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise DeltuneError(
            "Quantising needs the package 'bitsandbytes', which is not installed. Install it with: "
            "pip install 'deltune[quant]'. Or choose NF4(engine='torch'), which is slower and needs no other package."
        ) from error
