"""Reading CSV, TSV, JSON, Parquet and CoNLL files; every message names the file and the place in it."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.errors import DataError
from deltune.tasks._conll import conll_columns
from deltune.tasks._optional import require

if TYPE_CHECKING:
    from datasets import Dataset

_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LONGEST_FIELD = 2**31 - 1
_csv_lock = threading.Lock()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: The file cannot be opened, holds nothing, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the file's permissions.") from error
    if not content.strip():
        raise DataError(f"{path} is empty. Give a file with at least one row.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Columns of the error count from behind the byte order mark, which such a file can hardly have.
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at position {error.start} (line "
            f"{line}) "
            "has no meaning there. Save the file as UTF-8, for example with: "
            "iconv -f ISO-8859-1 -t UTF-8 FILE > NEW_FILE"
        ) from error


def read_separated(path: Path) -> Dataset:
    """A CSV or TSV file whose first line names the columns.

    CSV fields may be quoted with double quotes. TSV fields are taken as they are: a quote is a character like
    any other. Lines without any character are skipped. A column of numbers becomes numbers; empty fields in
    it have no value.

    Raises:
        DataError: There is no header, no row, a row with too few or too many fields, or broken quoting.
    """
    tabs = path.suffix.lower() == ".tsv"
    lines = _separated_lines(path, tabs)
    _, header = lines[0]
    names = _column_names(path, header)
    for line, fields in lines[1:]:
        if len(fields) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(fields)} fields where the header names {len(names)} columns "
                f"({', '.join(names)}). "
                + (
                    "Fields are separated by tabs."
                    if tabs
                    else "Put fields that hold commas, quotes or line breaks in double quotes."
                )
            )
    if len(lines) == 1:
        raise DataError(f"{path} has a header but no rows. Give a file with at least one row.")
    rows = [fields for _, fields in lines[1:]]
    return dataset_from_columns({name: _typed([row[place] for row in rows]) for place, name in enumerate(names)}, path)


def _separated_lines(path: Path, tabs: bool) -> list[tuple[int, list[str]]]:
    """All lines that hold something, each with the number of the line it starts on."""
    text = read_text(path)
    found = []
    line = 1
    with _csv_lock:  # The size limit belongs to the whole csv module.
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            source = io.StringIO(text, newline="")
            reader = (
                csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(source, strict=True)
            )
            for fields in reader:
                if fields:
                    found.append((line, fields))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, from line {line} on: {error}. Check that every double quote that opens a field is "
                f"closed, "
                'and that double quotes inside it are doubled ("").'
            ) from error
        finally:
            csv.field_size_limit(before)
    return found


def _column_names(path: Path, header: list[str]) -> list[str]:
    names = [name.strip() for name in header]
    if len(names) > 1 and not names[0] and "index" not in names:
        names[0] = "index"  # A table that pandas has written with its row numbers.
    problem = None
    for place, name in enumerate(names, start=1):
        if not name:
            problem = f"field {place} is empty"
        elif _NUMBER.fullmatch(name):
            problem = f"field {place} is the number {name}"
        elif names.count(name) > 1:
            problem = f"the name {name!r} occurs more than once"
    if problem is not None:
        raise DataError(
            f"{path} seems to have no header: the first line must name the columns, but {problem}. "
            f"Put a first line such as {'text<TAB>label' if path.suffix.lower() == '.tsv' else 'text,label'} "
            "into the file."
        )
    return names


def _typed(values: list[str]) -> list[Any]:
    """Numbers where every field that is not empty is one, else the text unchanged."""
    filled = [value for value in values if value]
    for pattern, convert in ((_WHOLE_NUMBER, int), (_NUMBER, float)):
        if filled and all(pattern.fullmatch(value) for value in filled):
            return [convert(value) if value else None for value in values]
    return values


def read_json(path: Path) -> Dataset:
    """A file of JSON objects: one a line, or all in one array.

    A field that a row lacks has no value there.

    Raises:
        DataError: The text is not JSON, or holds something else than objects.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise _bad_json(path, error.lineno, error.colno, error.msg) from error
        places = [f"element {place}" for place in range(1, len(records) + 1)]
    else:
        records, places = [], []
        # Only line feeds end a line here; other line separators may stand inside JSON text.
        for line, content in enumerate(text.split("\n"), start=1):
            if content.strip():
                try:
                    records.append(json.loads(content))
                except json.JSONDecodeError as error:
                    raise _bad_json(path, line, error.colno, error.msg) from error
                places.append(f"line {line}")
    if not records:
        raise DataError(f"{path} holds an empty array. Give a file with at least one row.")
    names: dict[str, None] = {}
    for place, record in zip(places, records, strict=True):
        if not isinstance(record, dict):
            raise DataError(
                f'{path}, {place}: {_short(record)} where an object such as {{"text": "...", "label": 0}} is expected.'
            )
        names.update(dict.fromkeys(record))
    if not names:
        raise DataError(f'{path}: no row has a field. Give objects such as {{"text": "...", "label": 0}}.')
    return dataset_from_columns({name: [record.get(name) for record in records] for name in names}, path)


def _bad_json(path: Path, line: int, column: int, problem: str) -> DataError:
    return DataError(
        f"{path}, line {line}, column {column}: not JSON ({problem}). Write one JSON object a line, or one "
        f"array "
        "of objects without a comma behind the last."
    )


def read_parquet(path: Path) -> Dataset:
    """A Parquet file.

    Raises:
        DataError: The file is no Parquet file or has no rows.
    """
    arrow = require("pyarrow")
    parquet = require("pyarrow.parquet")
    datasets = require("datasets")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Give a file with at least one row.")
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}. "
            "Write it again, or rename it if it has another format."
        ) from error
    if table.num_rows == 0:
        raise DataError(f"{path} has columns but no rows. Give a file with at least one row.")
    return datasets.Dataset(table)


def read_conll(path: Path) -> Dataset:
    """A file of sentences, one word a line, as lists in the columns ``words`` and ``tags``.

    Raises:
        DataError: The lines do not have the same columns, or a word or a tag is empty.
    """
    return dataset_from_columns(conll_columns(read_text(path), path), path)


def dataset_from_columns(columns: Mapping[str, list[Any]], path: Path) -> Dataset:
    """A dataset in memory.

    Raises:
        DataError: A column mixes types; the message names the first row that differs.
    """
    arrow = require("pyarrow")
    datasets = require("datasets")
    try:
        return datasets.Dataset.from_dict(dict(columns))
    except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError) as error:
        for name, values in columns.items():
            first: type | None = None
            for row, value in enumerate(values, start=1):
                first = first or (None if value is None else type(value))
                if value is not None and first is not None and type(value) is not first:
                    raise DataError(
                        f"{path}, row {row}, column {name!r}: {_short(value)} is {type(value).__name__} "
                        f"where earlier "
                        f"rows have {first.__name__}. Give all rows of a column the same type."
                    ) from error
            items = ((row, item) for row, value in enumerate(values, start=1) if type(value) is list for item in value)
            kinds = ((row, item) for row, item in items if item is not None)
            _, known = next(kinds, (0, None))
            for row, item in kinds:
                if type(item) is not type(known):
                    raise DataError(
                        f"{path}, row {row}, column {name!r}: the list holds {_short(item)}, {type(item).__name__} "
                        f"where earlier items are {type(known).__name__}. Give all items the same type."
                    ) from error
        raise DataError(f"{path}: a column holds values of different types ({error}). Make them alike.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".csv": read_separated,
    ".tsv": read_separated,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
    ".conll": read_conll,
    ".bio": read_conll,
    ".iob": read_conll,
    ".iob2": read_conll,
}
"""Reader by file ending."""
