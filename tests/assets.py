"""Real models and real data for tests: a path, or a skip that says plainly what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import assets

_PROJECT = Path(__file__).resolve().parents[1]
_SHARED = _PROJECT.parent / "shared"

# A registry that is out of reach is asked once per process, not once per test.
_unavailable: dict[str, str] = {}


def asset(name: str) -> Path:
    """The folder of an asset (``examples.assets.names()``), downloaded and converted where needed.

    The test is skipped only if the package cannot be obtained; a conversion that fails is a failure.
    """
    if name not in _unavailable:
        try:
            return assets.get(name)
        except assets.PackageUnavailableError as error:
            _unavailable[name] = str(error)
    pytest.skip(_unavailable[name])


def shared_data(name: str) -> Path:
    """The folder ``../shared/data/<name>`` beside the project; the test is skipped where it is absent."""
    return _existing(_SHARED / "data" / name)


def shared_model(name: str) -> Path:
    """The folder ``../shared/models/<name>`` beside the project; the test is skipped where it is absent."""
    return _existing(_SHARED / "models" / name)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"needs the folder ../{folder.relative_to(_PROJECT.parent).as_posix()}, which is not here")
    return folder
