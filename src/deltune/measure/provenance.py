"""Where a number comes from: versions, machine, commit and time; no names of users, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import deltune

__all__ = ["cpu_count", "provenance"]

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")


def provenance(device: str = "cpu", *, seed: int | None = None, threads: int | None = None) -> dict[str, Any]:
    """What somebody needs to judge or repeat a measurement, as JSON values.

    Args:
        device: where the model ran, as torch writes it.
        seed: seed of the run.
        threads: how many threads computed.

    Returns:
        ``versions`` (of Python, deltune and the packages that compute), ``platform``, ``cpu_count``,
        ``threads``, ``device`` and ``device_name``, ``commit`` (of deltune, where it runs from a git
        checkout; ``+`` behind it means changed files), ``date`` (UTC) and ``seed``.
    """
    return {
        "versions": {"python": platform.python_version(), "deltune": deltune.__version__, **_versions()},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": cpu_count(),
        "threads": threads,
        "device": device,
        "device_name": _device_name(device),
        "commit": _commit(Path(__file__).parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
    }


def cpu_count() -> int:
    """Processors that this process may use, at least one."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    present = {distribution.name.lower() for distribution in distributions()}
    return {package: version(package) for package in _PACKAGES if package in present}


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """Commit of the checkout that tracks this package; None if git or such a checkout is missing.

    An environment often lies inside another project's checkout, so it must really track this file.
    """
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "") if commit else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
