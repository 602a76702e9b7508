"""Text files with one word a line, as of the CoNLL shared tasks.

The word stands in the first column and its tag in the last one; a blank line ends a sentence. Columns are separated by
tabs, or by blanks.
"""

from __future__ import annotations

import re
from pathlib import Path

from deltune.errors import DataError

__all__ = ["conll_columns"]

_BLANKS = re.compile(r"[ \t]+")
#: CoNLL 2003 marks the beginning of a document by a sentence of this word alone.
_DOCUMENT = "-DOCSTART-"


def conll_columns(text: str, path: Path) -> dict[str, list[list[str]]]:
    """The sentences of a file.

    Args:
        text: what the file holds.
        path: the file, for messages.

    Returns:
        ``words`` and, where the file has more than one column, ``tags``: one list a sentence.

    Raises:
        DataError: A line has more or fewer columns than the first one, an empty word or an empty tag; or there is no
            sentence.
    """
    # only line feeds end a line here: other separators of lines may stand inside a word
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    tabs = any("\t" in line.strip() for line in lines)
    words: list[list[str]] = []
    tags: list[list[str]] = []
    columns: int | None = None
    fresh = True
    for number, line in enumerate(lines, start=1):
        if not line.strip(" \t"):
            fresh = True
            continue
        fields = line.split("\t") if tabs else _BLANKS.split(line.strip(" "))
        if fields[0] == _DOCUMENT:
            fresh = True
            continue
        columns = columns or len(fields)
        if len(fields) != columns:
            raise DataError(
                f"{path}, line {number}: {len(fields)} columns where earlier lines have {columns}. Write one word a "
                f"line with its tag in the last column, separated by {'tabs' if tabs else 'blanks'} throughout; remove "
                "comments."
            )
        if not fields[0].strip() or not fields[-1].strip():
            what = "word (first column)" if not fields[0].strip() else "tag (last column)"
            raise DataError(f"{path}, line {number}: the {what} is empty. Fill it in or remove the line.")
        if fresh:
            words.append([])
            tags.append([])
            fresh = False
        words[-1].append(fields[0])
        tags[-1].append(fields[-1].strip())
    if not words:
        raise DataError(f"{path} has no sentence. Give a file with at least one word.")
    return {"words": words} if columns == 1 else {"words": words, "tags": tags}
