"""Folders that are put in their place once they have been read again and do what they should."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from deltune.errors import CheckpointError, StateError

__all__ = ["DELTA_FILES", "refuse_existing", "write_checked"]

Result = TypeVar("Result")

#: Names of what exports write, and transformers for a model and its tokenizer: a folder with anything else is not
#: replaced.
_EXPORTED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.gguf",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
)
#: And of a delta in deltune's own format, for what may replace one.
DELTA_FILES = ("delta.safetensors", "deltune.json")


def refuse_existing(
    output: Path,
    overwrite: bool,
    how: str = "--overwrite",
    *,
    keep: Iterable[str | Path] = (),
    known: Iterable[str] = (),
) -> None:
    """Refuse a place where writing would destroy what is not to be replaced.

    Args:
        output: the folder.
        overwrite: whether it may be replaced. Even then never: the working directory and what it lies in, a link, a
            file, what is in ``keep`` and what that lies in, and a folder with files that deltune does not write.
        how: what to set for that, for the message.
        keep: what is read, such as the model and the delta; names that are no path are passed over.
        known: names of further files that may be replaced.

    Raises:
        StateError: if so.
    """
    place = output.resolve()
    if output.is_symlink():
        raise StateError(f"{output} is a link to {place}. Name that folder itself, or choose another one.")
    around = next((item for item in (Path.cwd(), *map(Path, keep)) if item.exists() and _within(item, place)), None)
    if around is not None:
        what = "the working directory" if around == Path.cwd() else f"{around}, which is read,"
        raise StateError(f"{output} cannot be written: {what} is that folder or lies in it. Choose another folder.")
    if not output.exists():
        return
    if not output.is_dir():
        raise StateError(f"{output} exists already, and is no folder. Choose another name.")
    found = sorted(item.name for item in output.iterdir())
    if found and not overwrite:
        raise StateError(f"{output} exists already. Choose another folder, or replace it with {how}.")
    patterns = (*_EXPORTED, *known)
    strange = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise StateError(
            f"{output} is not replaced: it holds {', '.join(strange[:3])}{more}, which would be lost. Choose another "
            "folder, or remove it yourself."
        )


def _within(item: Path, place: Path) -> bool:
    return item.resolve().is_relative_to(place)


def write_checked(output: Path, write: Callable[[Path], Any], check: Callable[[Path], Result]) -> Result:
    """Write a folder beside its place, check it, and put it in its place.

    Args:
        output: the place, which :func:`refuse_existing` has passed; a folder that stands there is replaced.
        write: fills a folder, which it makes.
        check: reads the folder again, and raises if it does not do the same.

    Returns:
        What ``check`` returned.

    Raises:
        CheckpointError: if it cannot be written. Then, and whenever ``write`` or ``check`` raise, what stood at the
            place before is untouched and nothing else is left.
    """
    from deltune.training.snapshot import remove_unfinished

    place = output.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(place.parent, place.name)
        with tempfile.TemporaryDirectory(
            dir=place.parent, prefix=f".{place.name}.", suffix=".part", ignore_cleanup_errors=True
        ) as name:
            folder = Path(name) / "written"
            try:
                write(folder)
            except Exception as error:
                if "No space left" in str(error) and not isinstance(error, OSError):
                    raise OSError(errno.ENOSPC, str(error)) from error
                raise
            found = check(folder)
            _swap(folder, place)
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"Could not write {output}: {'the disk is full' if full else error}. What stood there before is untouched. "
            "Free some space or choose another folder, and run the same command again."
        ) from error
    return found


def _swap(folder: Path, place: Path) -> None:
    """Put ``folder`` at ``place``; what stands there is put aside first, and is put back if that fails.

    Raises:
        OSError: if it fails; ``place`` is as before.
    """
    if not place.exists():
        folder.rename(place)
        return
    # not a name that the next run takes for unfinished: a process killed in between leaves the old one there
    aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".replaced"))
    try:
        place.rename(aside / place.name)
        try:
            folder.rename(place)
        except OSError:
            (aside / place.name).rename(place)
            raise
    except OSError:
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
