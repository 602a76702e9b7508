"""``deltune methods``: all methods, or the page of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.reporting import print_json

if TYPE_CHECKING:
    from deltune.methods import Method

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """List the methods; with a name, show the page of one: when to use it, its cost, its options, its paper."""
    from deltune.methods import Sum, all_methods, get

    chosen = [get(name)] if name is not None else [kind for kind in all_methods().values() if not issubclass(kind, Sum)]
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
    from rich.markdown import Markdown

    from deltune.methods.page import page

    Console().print(Markdown(page(kind), code_theme="bw", hyperlinks=False))
