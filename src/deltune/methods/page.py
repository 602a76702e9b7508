"""The page of a method, made from its own class: docstring, options, defaults, paper.

``page`` gives the Markdown that `deltune methods NAME` shows and that stands in ``docs/methods``. To write these
files, and the table of methods in other files that have the marks for it::

    python -m deltune.methods.page docs/methods README.md

A class docstring begins with what the method does; then come the sections of :data:`SECTIONS`, each a line
``Title:`` with an indented text below. Lines ``Name: text`` of a section become a list. An example has the
prompts of doctest for Python, and ``$`` for a command line.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.methods.base import Method

__all__ = ["SECTIONS", "TERMS", "docstring_sections", "index", "page", "table", "write_pages"]

#: What the docstring of every method says, in this order.
SECTIONS = ("When to use", "Cost", "Terms", "Example", "Differs from the paper", "Source")
#: What the section "Terms" answers; the insertion stands in the class itself.
TERMS = ("Site", "Form", "Combination", "Control")

_BEGIN, _END = "<!-- methods -->", "<!-- end methods -->"
_COUNT = re.compile(r"(?<=<!-- count -->)\d+(?=<!-- end count -->)")
_TITLE = re.compile(r"([A-Z][A-Za-z ]*):$")
_ITEM = re.compile(r"([A-Z][A-Za-z ]*): ")
_INSERTIONS = {
    "weight": "changes a weight matrix",
    "parallel": "reads the input of a sublayer and adds to its result",
    "sequential": "reads the result of a sublayer and adds to it",
    "key_value": "gives attention more keys and values",
    "tokens": "gives the model more input positions",
    "replace": "takes the place of a part of the model",
    "select": "changes some of the model's own parameters",
}


def docstring_sections(kind: type[Method]) -> tuple[str, dict[str, str]]:
    """The description of a method, and the text of each section by title."""
    lead: list[str] = []
    sections: dict[str, list[str]] = {}
    current = lead
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        title = _TITLE.fullmatch(line)
        if title is not None:
            current = sections.setdefault(title[1], [])
        else:
            current.append(line)
    return "\n".join(lead).strip(), {title: inspect.cleandoc("\n".join(lines)) for title, lines in sections.items()}


def page(kind: type[Method]) -> str:
    """The page of a method in Markdown.

    Args:
        kind: the method's class. Sections that its docstring lacks are left out.
    """
    lead, sections = docstring_sections(kind)
    parts = [f"# {kind.name}", f"`deltune.{kind.__name__}`: {_text(lead, items=False)}"]
    for title in SECTIONS:
        if title == "Example":
            parts += ["## Options", _options(kind)]
        text = _source(kind, sections.get(title, "")) if title == "Source" else sections.get(title, "")
        if not text:
            continue
        if title == "Terms":
            parts += ["## In five terms", _terms(kind, text)]
        else:
            parts += [f"## {title}", _example(text) if title == "Example" else _text(text)]
    for title, text in sections.items():
        if title not in SECTIONS:
            parts += [f"## {title}", _text(text)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(kinds: Iterable[type[Method]], folder: str = "") -> str:
    """A table of methods in Markdown.

    Args:
        kinds: their classes.
        folder: where the pages are, seen from where the table is, such as ``docs/methods/``.
    """
    rows = [("method", "in Python", "branch", "what it does", "mergeable", "learning rate", "paper")]
    for kind in kinds:
        insertion = "; ".join(_INSERTIONS[insertion.value] for insertion in kind.insertions())
        mergeable = "yes" if kind.mergeable else "no"
        paper = _link(f"{kind.paper.authors} {kind.paper.year}", kind.paper.arxiv)
        name = f"[{kind.name}]({folder}{kind.name}.md)"
        rate = f"{kind.learning_rate:g}"
        rows.append((name, f"`{kind.__name__}`", kind.branch, insertion, mergeable, rate, paper))
    return _table(rows)


def index(kinds: Sequence[type[Method]]) -> str:
    """The page that lists all pages."""
    return (
        "# Methods\n\n"
        "Each page is made from the method's own file by `python -m deltune.methods.page docs/methods`, and "
        "`deltune methods NAME` shows it in the terminal. The learning rate is the default for AdamW.\n\n"
        f"{table(kinds)}\n"
    )


def write_pages(folder: Path, others: Iterable[Path] = ()) -> None:
    """Write the page of every method of this package, their index, and their table and number into other files.

    Args:
        folder: where the pages go; made if it does not exist.
        others: Markdown files in which the table stands between the marks for it; the number may stand between its own.

    Raises:
        ValueError: if one of the other files has no marks.
    """
    kinds = own_methods()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        (folder / f"{kind.name}.md").write_text(page(kind), encoding="utf-8")
    (folder / "README.md").write_text(index(kinds), encoding="utf-8")
    for file in others:
        text = file.read_text(encoding="utf-8")
        if _BEGIN not in text or _END not in text:
            raise ValueError(f"{file} has no place for the table of methods: write {_BEGIN} and {_END} into it.")
        before, after = text.split(_BEGIN)[0], text.split(_END)[1]
        place = folder.resolve().relative_to(file.resolve().parent).as_posix()
        before, after = (_COUNT.sub(str(len(kinds)), around) for around in (before, after))
        file.write_text(f"{before}{_BEGIN}\n{table(kinds, f'{place}/')}\n{_END}{after}", encoding="utf-8")


def own_methods() -> list[type[Method]]:
    """The methods that have a file in this package."""
    from deltune.methods import Sum, all_methods

    return [
        kind for kind in all_methods().values() if kind.__module__.startswith("deltune.") and not issubclass(kind, Sum)
    ]


def _options(kind: type[Method]) -> str:
    rows = [("option", "type", "default", "meaning")]
    for row in kind.options():
        meaning = row.get("help", "")
        bounds = "; ".join(_bounds(row))
        name = f"`--{row['name'].replace('_', '-')}`"
        rows.append((name, row["type"], f"`{_plain(row['default'])}`", f"{meaning} ({bounds})" if bounds else meaning))
    facts = [
        ("learning rate", f"`{kind.learning_rate:g}` by default"),
        ("weight decay", f"`{kind.weight_decay:g}` by default"),
        ("leaves the model unchanged at the start", "yes" if kind.unchanged_at_start else "no"),
        ("can be merged into the model's weights", "yes" if kind.mergeable else "no"),
    ]
    use = "As typed on the command line; in Python, an argument of the class with underscores for the dashes."
    options = f"{use}\n\n{_table(rows)}" if len(rows) > 1 else "It has none."
    return f"{options}\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts)


def _bounds(row: dict[str, Any]) -> list[str]:
    bounds = []
    if "minimum" in row:
        bounds.append(f"{'above' if row.get('exclusive') else 'at least'} {row['minimum']:g}")
    if "maximum" in row:
        bounds.append(f"at most {row['maximum']:g}")
    if "choices" in row:
        bounds.append(" or ".join(f"`{choice}`" for choice in row["choices"]))
    return bounds


def _plain(value: Any) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(",", ", ") or "none"


def _terms(kind: type[Method], text: str) -> str:
    """The items of the section, with the insertion in its place behind the form."""
    named = "; ".join(f"`{found.value}`: {_INSERTIONS[found.value]}" for found in kind.insertions())
    insertion = f"- **Insertion**: {named}."
    lines = _text(text).splitlines()
    place = next((number + 1 for number, line in enumerate(lines) if line.startswith("- **Form**")), len(lines))
    return "\n".join([*lines[:place], insertion, *lines[place:]])


def _source(kind: type[Method], text: str) -> str:
    title = _link(f"*{kind.paper.title}*", kind.paper.arxiv)
    return f"{title}. {_text(text) or f'{kind.paper.authors} {kind.paper.year}.'}"


def _text(text: str, items: bool = True) -> str:
    """Paragraphs on one line each, lists of named items unless there are none, and code in single backticks."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        starts = [line for line in lines if not line.startswith(" ")]
        if items and starts and all(_ITEM.match(line) for line in starts):
            joined = re.sub(r"\n +", " ", paragraph)
            blocks.append("\n".join(_ITEM.sub(r"- **\1**: ", line, count=1) for line in joined.splitlines()))
        else:
            blocks.append(" ".join(" ".join(lines).split()))
    return "\n\n".join(blocks).replace("``", "`").replace("`None`", "`none`")


def _example(text: str) -> str:
    """Doctest as Python without prompts, its results as comments; command lines as they are typed."""
    blocks: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if lines[0].startswith(">>> "):
            code = "\n".join(line[4:] if line.startswith((">>> ", "... ")) else f"# {line}" for line in lines)
            blocks.append(f"```python\n{code}\n```")
        elif lines[0].startswith("$ "):
            code = "\n".join(line.removeprefix("$ ") for line in lines)
            blocks.append(f"```bash\n{code}\n```")
        else:
            blocks.append(_text(paragraph))
    return "\n\n".join(blocks)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _link(text: str, arxiv: str) -> str:
    return f"[{text}](https://arxiv.org/abs/{arxiv})" if arxiv else text


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("Say where the pages go: python -m deltune.methods.page docs/methods")
    write_pages(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
