"""Peak memory of the own process, and of the accelerator where there is one.

*Resident* memory is what the operating system keeps of this process in main memory: the interpreter, the loaded
libraries, weights, gradients, optimizer state and activations together. It is only true for one method if that
method has a process of its own.

Two observers watch it, because neither is enough alone. The kernel's own high-water mark misses nothing, but where
it cannot be set back it covers the whole life of the process. A thread that looks every few milliseconds covers just
the measured block, but can miss a short peak. So the mark counts where it rose inside the block, and the thread's
figure where it did not.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deltune.errors import DeltuneError

if TYPE_CHECKING:
    import torch

__all__ = ["MemoryUse", "PeakMemory", "optimizer_state_bytes", "release_memory", "resident_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFERENCES = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryUse:
    """What a block of work needed, in bytes.

    Attributes:
        resident_peak: highest resident memory of the process inside the block.
        resident_baseline: resident memory when the block began, that is of the interpreter and what was loaded.
        device_peak: highest memory that tensors took on the accelerator inside the block; None without one.
    """

    resident_peak: int
    resident_baseline: int
    device_peak: int | None = None

    @property
    def peak(self) -> int:
        """The accelerator's peak where there is one, else the resident peak."""
        return self.resident_peak if self.device_peak is None else self.device_peak

    def to_dict(self) -> dict[str, Any]:
        """The values and the peak, for files."""
        return {"peak": self.peak, **asdict(self)}


class PeakMemory:
    """Context manager that measures the memory of the block inside it; ``use`` holds the result afterwards.

    Args:
        device: the accelerator to watch besides, as torch writes it; only CUDA devices are.
        interval: seconds between two looks of the sampling thread.

    Example:
        >>> with PeakMemory() as memory:
        ...     values = bytearray(50_000_000)
        >>> memory.use.resident_peak >= memory.use.resident_baseline
        True
    """

    def __init__(self, device: torch.device | str | None = None, interval: float = 0.01) -> None:
        self._device = str(device) if device is not None and str(device).startswith("cuda") else None
        self._interval = interval
        self._stop = threading.Event()
        self._sampled = 0
        self._baseline = 0
        self._mark = 0
        self._thread: threading.Thread | None = None
        self._use: MemoryUse | None = None

    @property
    def use(self) -> MemoryUse:
        """The result; inside the block, the state so far."""
        return self._use if self._use is not None else self._measure()

    def __enter__(self) -> PeakMemory:
        self._use = None
        self._stop.clear()
        if self._device is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        self._baseline = self._sampled = resident_bytes()
        _reset_high_water_mark()
        self._mark = _high_water_mark()
        self._thread = threading.Thread(target=self._watch, name="deltune-peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._use = self._measure()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sampled = max(self._sampled, resident_bytes())

    def _measure(self) -> MemoryUse:
        self._sampled = max(self._sampled, resident_bytes())
        mark = _high_water_mark()
        peak = mark if mark > max(self._mark, self._sampled) else self._sampled
        device_peak = None
        if self._device is not None:
            import torch

            device_peak = int(torch.cuda.max_memory_allocated(self._device))
        return MemoryUse(peak, self._baseline, device_peak)


def resident_bytes() -> int:
    """Resident memory of this process now.

    Raises:
        DeltuneError: if psutil is not installed.
    """
    return int(_process().memory_info().rss)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps from step to step: its moments, and what counts its steps."""
    import torch

    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def release_memory() -> None:
    """Give memory that is free inside this process back to the system, so that the next block starts low."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library than glibc: it decides by itself


def _process() -> Any:
    try:
        import psutil
    except ModuleNotFoundError as error:
        raise DeltuneError(
            "Measuring memory needs the package 'psutil', which is not installed. "
            "Install what training needs with: pip install 'deltune[train]'"
        ) from error
    return psutil.Process()


def _high_water_mark() -> int:
    """Highest resident memory that the kernel remembers of this process; 0 where it does not say."""
    if sys.platform == "win32":
        return int(_process().memory_info().peak_wset)
    elif sys.platform == "linux":  # noqa: RET505
        # not getrusage: its mark starts with the memory of the process that started this one
        with _STATUS.open(encoding="utf-8") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes


def _reset_high_water_mark() -> None:
    """Set the mark back to the memory in use, where the kernel lets us."""
    if sys.platform == "linux":
        try:
            _CLEAR_REFERENCES.write_text("5", encoding="utf-8")
        except OSError:
            return  # a container may forbid it: then the mark counts only if it rises
