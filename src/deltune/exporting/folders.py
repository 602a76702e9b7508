"""Folders that are put in their place once they have been read again and do what they should."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from deltune.errors import CheckpointError, StateError

__all__ = ["refuse_existing", "write_checked"]

Result = TypeVar("Result")


def refuse_existing(output: Path, overwrite: bool, how: str = "--overwrite") -> None:
    """Refuse to write where something stands already.

    Args:
        output: the folder.
        overwrite: whether it may be replaced.
        how: what to set for that, for the message.

    Raises:
        StateError: if something is there.
    """
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise StateError(f"{output} exists already. Choose another folder, or replace it with {how}.")


def write_checked(output: Path, write: Callable[[Path], None], check: Callable[[Path], Result]) -> Result:
    """Write a folder beside its place, check it, and put it in its place.

    Args:
        output: the place; a folder that stands there is replaced.
        write: fills a folder, which it makes.
        check: reads the folder again, and raises if it does not do the same.

    Returns:
        What ``check`` returned.

    Raises:
        CheckpointError: if it cannot be written. Then, and whenever ``write`` or ``check`` raise, what stood at the
            place before is untouched and nothing else is left.
    """
    from deltune.training.snapshot import remove_unfinished

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output.parent, output.name)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".part") as name:
            folder = Path(name) / "written"
            try:
                write(folder)
            except Exception as error:
                if "No space left" in str(error) and not isinstance(error, OSError):
                    raise OSError(errno.ENOSPC, str(error)) from error
                raise
            found = check(folder)
            if output.exists():
                shutil.rmtree(output)
            folder.rename(output)
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"Could not write {output}: {'the disk is full' if full else error}. What stood there before is untouched. "
            "Free some space or choose another folder, and run the same command again."
        ) from error
    return found
