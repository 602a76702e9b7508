"""Reading data from files or by name, splitting them, and telling whether two are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltune.errors import DataError, suggestion
from deltune.tasks._columns import require_columns, require_rows
from deltune.tasks._optional import require
from deltune.tasks._readers import READERS

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Cleaned", "Split", "drop_empty_rows", "fingerprint", "read_dataset", "split_dataset"]


def read_dataset(source: str | Path, split: str | None = None, limit: int | None = None) -> Dataset:
    """Reads a dataset.

    Args:
        source: A file that ends in .csv, .tsv, .json, .jsonl, .parquet or .conll (also .bio, .iob, .iob2: a word
            a line, its tag in the last column); a folder written by ``Dataset.save_to_disk``; or a name for
            ``datasets.load_dataset``, such as ``"glue:sst2"`` with a configuration behind the colon.
        split: Which split of a folder or a named dataset; not needed where there is only one. Files have
            none.
        limit: How many rows to keep from the beginning; all by default.

    Returns:
        The rows, in memory or memory-mapped.

    Raises:
        DataError: There is no such file, folder, name or split, or its content cannot be used.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit must be a whole number of at least 1, not {limit!r}.")
    dataset = _read(str(source), split)
    require_rows(dataset)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _read(source: str, split: str | None) -> Dataset:
    path = Path(source).expanduser()
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{path} has the ending {path.suffix or 'none'!r}; data files end in {', '.join(READERS)}. "
                "Convert the file, or rename it if it has one of these formats."
            )
        if split is not None:
            raise DataError(f"{path} is a file and has no splits. Leave split {split!r} out.")
        return reader(path)
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix.lower() in READERS or source.startswith((".", "/", "~")) or "\\" in source:
        raise _missing(path)
    return _read_named(source, split)


def _read_folder(path: Path, split: str | None) -> Dataset:
    datasets = require("datasets")
    try:
        return _one_split(datasets.load_from_disk(str(path)), str(path), split)
    except FileNotFoundError as error:
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        hint = f"Name one of its files: {', '.join(files[:8])}." if files else "It holds no data file either."
        raise DataError(f"{path} is a folder that no dataset was saved to. {hint}") from error


def _read_named(source: str, split: str | None) -> Dataset:
    datasets = require("datasets")
    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # Whatever the network, the hub and the dataset's own files can raise.
        raise DataError(
            f"{source!r} is neither a file here nor a dataset that can be loaded by name: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__} "
            f"Give a file that ends in {', '.join(READERS)}, or the name of a dataset on the hub."
        ) from error
    return _one_split(loaded, source, split)


def _one_split(loaded: Any, source: str, split: str | None) -> Dataset:
    """The asked-for split of a ``DatasetDict``, or its only one."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise DataError(f"{source} has no splits. Leave split {split!r} out.")
        return loaded
    if split is None:
        if len(loaded) == 1:
            return next(iter(loaded.values()))
        raise DataError(f"{source} has the splits {', '.join(loaded)}. Say which one with split.")
    if split not in loaded:
        raise DataError(f"{source} has no split {split!r}. {suggestion(split, loaded)}")
    return loaded[split]


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"There is no file {path}: its folder {folder} does not exist. Check the path.")
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)
    if not files:
        return DataError(f"There is no file {path}, nor any data file in that folder. Check the path.")
    return DataError(f"There is no file {path}. {suggestion(path.name, files)}")


class Cleaned(NamedTuple):
    """A dataset without its empty rows, and the positions from 0 that those had."""

    dataset: Dataset
    dropped: tuple[int, ...]


def drop_empty_rows(dataset: Dataset, columns: Sequence[str]) -> Cleaned:
    """Removes the rows that lack text.

    Encoding refuses such rows, because leaving out data is for the user to decide.

    Args:
        dataset: The rows.
        columns: Columns that must hold text, such as ``task.required_texts()``.

    Returns:
        The other rows, and the positions of those removed.

    Raises:
        DataError: A column is missing, or no row is left.
    """
    require_columns(dataset, columns, "drop_empty_rows")
    empty: set[int] = set()
    for name in columns:
        for row, value in enumerate(dataset[name]):
            if value is None or (isinstance(value, str) and not value.strip()):
                empty.add(row)
    if len(empty) == len(dataset):
        raise DataError(f"Every row is empty in one of the columns {', '.join(columns)}. Check their names.")
    if not empty:
        return Cleaned(dataset, ())
    kept = [row for row in range(len(dataset)) if row not in empty]
    return Cleaned(dataset.select(kept), tuple(sorted(empty)))


class Split(NamedTuple):
    """Two parts of a dataset that share no row and no text."""

    train: Dataset
    evaluation: Dataset


def split_dataset(
    dataset: Dataset,
    evaluation: float | int = 0.1,
    *,
    seed: int = 0,
    stratify: str | None = None,
    texts: Sequence[str] | None = None,
) -> Split:
    """Divides a dataset into training and evaluation data.

    Rows with the same texts (white space and case aside) stay on one side. Which side a text falls on depends
    on its content and the seed alone, so it is the same on every machine and in any order of the rows, which
    both parts keep.

    Args:
        dataset: The rows.
        evaluation: Share of the rows, between 0 and 1, or their number if it is a whole number; 0.1 by
            default. The number is met exactly unless repeated texts prevent it.
        seed: Any whole number; 0 by default.
        stratify: Column whose values shall have the same shares on both sides, such as the label; none by
            default.
        texts: Columns that make two rows the same; by default all but ``stratify``. Pass
            ``task.columns(...)`` where the data have numbers or names of rows besides.

    Returns:
        The two parts.

    Raises:
        DataError: ``evaluation`` makes no sense, a column is missing, or a side would have no rows.
    """
    require_rows(dataset)
    count = _evaluation_rows(evaluation, len(dataset))
    columns = [name for name in dataset.column_names if name != stratify] if texts is None else list(texts)
    require_columns(dataset, columns if stratify is None else [*columns, stratify], "split")
    if not columns:
        raise DataError("There is no column to tell rows apart by. Name some with texts.")

    groups: dict[str, list[int]] = {}
    strata: dict[str, list[str]] = {}
    for row, values in enumerate(_plain_rows(dataset)):
        content = _canonical([_normalized(values[name]) for name in columns])
        key = hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest()
        if key not in groups:
            stratum = "" if stratify is None else _canonical(values[stratify])
            strata.setdefault(stratum, []).append(key)
        groups.setdefault(key, []).append(row)

    sizes = {stratum: sum(len(groups[key]) for key in keys) for stratum, keys in strata.items()}
    chosen: set[int] = set()
    for stratum, wanted in _shares(sizes, count).items():
        taken = 0
        for key in sorted(strata[stratum]):
            size = len(groups[key])
            if abs(taken + size - wanted) < abs(taken - wanted):
                chosen.update(groups[key])
                taken += size
    if not chosen:
        # every stratum with a share has texts that come too often for it: one text of the nearest number of rows
        nearest = min(groups, key=lambda key: (abs(len(groups[key]) - count), key))
        chosen.update(groups[nearest] if abs(len(groups[nearest]) - count) < count else ())
    if not chosen or len(chosen) == len(dataset):
        side = "evaluation" if not chosen else "training"
        raise DataError(
            f"Splitting {len(dataset)} rows ({len(groups)} different texts) leaves no {side} data. "
            "Give more rows, or another share for evaluation."
        )
    return Split(
        train=dataset.select([row for row in range(len(dataset)) if row not in chosen]),
        evaluation=dataset.select(sorted(chosen)),
    )


def _evaluation_rows(evaluation: float | int, rows: int) -> int:
    whole = isinstance(evaluation, int) and not isinstance(evaluation, bool)
    valid = 1 <= evaluation < rows if whole else isinstance(evaluation, float) and 0 < evaluation < 1
    if not valid:
        raise DataError(
            f"evaluation must be a share between 0 and 1 or a number of rows from 1 to {rows - 1}, "
            f"not {evaluation!r}: the data have {rows} rows."
        )
    return int(evaluation) if whole else max(1, round(evaluation * rows))


def _shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Divides ``count`` in proportion to ``sizes``, largest remainders first, so that the sum is exact."""
    total = sum(sizes.values())
    shares = {name: size * count // total for name, size in sizes.items()}
    remainders = sorted(sizes, key=lambda name: (-(sizes[name] * count % total), name))
    for name in remainders[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def fingerprint(dataset: Dataset) -> str:
    """A hash of the content of a dataset.

    It depends on the names of the columns, the values and the order of the rows; not on the order of the
    columns, the file, its format, or the process.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for row in _plain_rows(dataset):
        digest.update(_canonical(row).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _plain_rows(dataset: Dataset) -> Any:
    """Rows as plain Python values; pictures and sound stay undecoded."""
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _normalized(value: Any) -> Any:
    """Text without differences in white space and case; other values unchanged."""
    return " ".join(value.split()).casefold() if isinstance(value, str) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> str:
    """What JSON cannot write: bytes by their hash, others (such as dates) by their text."""
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    return f"{type(value).__name__}:{value}"
