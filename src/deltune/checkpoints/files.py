"""Files that are whole or absent: written beside their place, then moved there in one step. Folders that one has."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from deltune.errors import CheckpointError, StateError

__all__ = ["claimed", "staged", "write_atomically", "write_json", "write_tensors"]


@contextmanager
def claimed(folder: Path, refusal: str) -> Iterator[None]:
    """Keep others out of ``folder``; the system lets go of the lock even if this process is killed.

    Where the file system knows no locks, nothing is kept out.

    Raises:
        StateError: with the text ``refusal``, if another has it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(refusal) from error
        except OSError:
            pass
        yield


@contextmanager
def staged(folder: Path, stale: Iterable[str]) -> Iterator[Path]:
    """A place in which to write files, below one another if need be, that belong together in ``folder``.

    When all are whole, what an earlier save left is removed, and they are moved to ``folder``: weights first, then
    what says what these mean, that of ``folder`` itself last. A process that is killed then leaves a folder that is
    refused, not one whose weights are read with the meaning of others.

    Args:
        folder: made if it does not exist.
        stale: names of files that an earlier save may have left, removed from each folder that is written to, in this
            order: what makes a folder readable comes first.

    Raises:
        CheckpointError: if the disk is full or the place cannot be written to. Then, and whenever the block raises
            while it writes, what stood there before is untouched.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder, prefix=".staged.", suffix=".part"))
    except OSError as error:
        _refuse(folder, error)
    try:
        try:
            yield place
        except CheckpointError as error:
            # people know the folder, not the place
            if str(place) not in str(error):
                raise
            raise CheckpointError(str(error).replace(str(place), str(folder))) from error
        written = [item for item in place.rglob("*") if item.is_file()]
        written.sort(key=lambda item: (item.suffix == ".json", -len(item.relative_to(place).parts)))
        owners = dict.fromkeys((folder, *(folder / item.relative_to(place).parent for item in reversed(written))))
        try:
            for owner in owners:
                owner.mkdir(parents=True, exist_ok=True)
            for owner in owners:
                for name in stale:
                    (owner / name).unlink(missing_ok=True)
            for item in written:
                item.replace(folder / item.relative_to(place))
        except OSError as error:
            raise CheckpointError(
                f"Could not put all files in {folder} ({error}). It holds no whole delta now: remove it, or save to "
                "another folder."
            ) from error
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(place, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, then put it at ``path``; on failure ``path`` is untouched.

    Raises:
        CheckpointError: if the disk is full or the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        if not isinstance(error, OSError) and "rror" not in type(error).__name__:
            raise
        _refuse(path, error)


def _refuse(path: Path, error: Exception) -> NoReturn:
    """Say that ``path`` could not be written.

    Raises:
        CheckpointError: if the disk is full or the place cannot be written to; else ``error`` itself.
    """
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if not full and not isinstance(error, OSError):
        raise error
    reason = "the disk is full" if full else str(error)
    raise CheckpointError(
        f"Could not write {path}: {reason}. What stood there before is untouched. "
        "Free some space or choose another folder, and run the same command again."
    ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` as safetensors, atomically; each is stored once, contiguous, from the CPU."""
    from safetensors.torch import save_file

    ready: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory
        ready[name] = value.clone() if storage in seen else value
        seen.add(storage)
    write_atomically(path, lambda temporary: save_file(ready, str(temporary), metadata=dict(metadata)))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
