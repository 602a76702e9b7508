"""``deltune methods``: all methods, or the page of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.reporting import paragraphs, print_json

if TYPE_CHECKING:
    from deltune.methods import Method

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """List the methods; with a name, show the page of one: what it does, its options, its paper."""
    from deltune.methods import all_methods, get

    chosen = [get(name)] if name is not None else [kind for kind in all_methods().values() if kind.name != "sum"]
    if json:
        rows = [_row(kind) for kind in chosen]
        print_json(rows[0] if name is not None else rows)
    elif name is not None:
        _page(chosen[0])
    else:
        _list(chosen)


def _row(kind: type[Method]) -> dict[str, Any]:
    return {
        "name": kind.name,
        "class": kind.__name__,
        "branch": kind.branch,
        "insertion": kind.insertion.value,
        "paper": {**vars(kind.paper), "citation": str(kind.paper)},
        "learning_rate": kind.learning_rate,
        "weight_decay": kind.weight_decay,
        "mergeable": kind.mergeable,
        "unchanged_at_start": kind.unchanged_at_start,
        "options": kind.options(),
    }


def _list(kinds: list[type[Method]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("method", no_wrap=True), Column("branch", no_wrap=True), "paper", "learning rate", "mergeable", box=None
    )
    for kind in kinds:
        paper = f"{kind.paper.authors} {kind.paper.year}" + (f", {kind.paper.arxiv}" if kind.paper.arxiv else "")
        table.add_row(kind.name, kind.branch, paper, f"{kind.learning_rate:g}", "yes" if kind.mergeable else "no")
    console = Console()
    console.print(table)
    console.print("`deltune methods NAME` shows the page of one.", highlight=False)


def _page(kind: type[Method]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{kind.name}", style="bold"), Text(f"({kind.branch}, {kind.insertion.value})"))
    console.print()
    console.print(paragraphs(kind.__doc__), markup=False, highlight=False)
    console.print()
    options = kind.options()
    if options:
        table = Table("option", "type", "default", "meaning")
        for row in options:
            table.add_row(*(Text(text) for text in (_flag(row), row["type"], _default(row), _meaning(row))))
        console.print(table)
    else:
        console.print("It has no options.")
    facts = Table(show_header=False, box=None)
    facts.add_row("learning rate", f"{kind.learning_rate:g}")
    facts.add_row("weight decay", f"{kind.weight_decay:g}")
    facts.add_row("mergeable", "yes" if kind.mergeable else "no")
    facts.add_row("unchanged at the start", "yes" if kind.unchanged_at_start else "no")
    facts.add_row("paper", Text(str(kind.paper)))
    facts.add_row("in Python", Text(f"deltune.{kind.__name__}"))
    facts.add_row("source", Text(kind.__module__))
    console.print(facts)


def _flag(row: dict[str, Any]) -> str:
    return f"--{row['name'].replace('_', '-')}"


def _default(row: dict[str, Any]) -> str:
    value = row["default"]
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(row: dict[str, Any]) -> str:
    bounds = []
    if "minimum" in row:
        bounds.append(f"{'above' if row.get('exclusive') else 'at least'} {row['minimum']}")
    if "maximum" in row:
        bounds.append(f"at most {row['maximum']}")
    if "choices" in row:
        bounds.append(" or ".join(row["choices"]))
    return f"{row.get('help', '')}" + (f" ({', '.join(bounds)})" if bounds else "")
