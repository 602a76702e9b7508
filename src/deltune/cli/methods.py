"""``deltune methods``: all methods, the page of one, or methods in the five terms of the unified view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.reporting import print_json
from deltune.errors import MethodError

if TYPE_CHECKING:
    from deltune.methods import Method

__all__ = ["methods"]


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, to see its page; with --unified also one with options, or a sum.")
    ] = None,
    unified: Annotated[
        bool, typer.Option("--unified", help="Print site, form, insertion, combination and control of each method.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --unified: print the table in Markdown.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """List the methods; with a name, show the page of one: when to use it, its cost, its options, its paper.

    With --unified: what each method is in the five terms of the unified view, on an encoder of BERT-base's shape.
    """
    if unified:
        _unified(name, json, markdown)
        return
    if markdown:
        raise MethodError("--markdown is of the unified view: give --unified too.")
    from deltune.methods import Sum, all_methods, all_variants, get

    variants = all_variants()
    if name in variants:
        _variant(name, json)
        return
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


def _variant(name: str, json: bool) -> None:
    """What a variant is, and the pages of what it is made of."""
    from deltune.methods import all_variants

    method = all_variants()[name]
    if json:
        print_json({"name": name, "variant_of": method.to_dict(), "learning_rate": method.learning_rate})
        return
    typer.echo(f"{name} is {method}.\n")
    for kind in dict.fromkeys(type(part) for part in method.parts):
        _page(kind)


def _unified(name: str | None, json: bool, markdown: bool) -> None:
    from deltune.methods import Sum, all_methods, all_variants
    from deltune.methods.unified import COLUMNS, specimen_of, unified_rows, unified_view
    from deltune.methods.unified import markdown as markdown_of

    if json and markdown:
        raise MethodError("--json and --markdown are two ways to print one table. Give one of them.")
    kinds = (kind for kind in all_methods().values() if not issubclass(kind, Sum))
    every = [*(specimen_of(kind) for kind in kinds), *all_variants()]
    rows = unified_rows(name) if name is not None else unified_view(every)
    if json:
        print_json([vars(row) for row in rows])
    elif markdown:
        typer.echo(markdown_of(rows))
    else:
        from rich.console import Console
        from rich.table import Column, Table

        columns = (Column(title, overflow="fold") for title in COLUMNS.values())
        table = Table(*columns, box=None, padding=(0, 2, 1, 0))
        for row in rows:
            table.add_row(*(vars(row)[name] for name in COLUMNS))
        # brackets in formulas are no markup
        Console(markup=False, highlight=False).print(table)


def _list(kinds: list[type[Method]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from deltune.methods import all_variants

    table = Table(
        Column("method", no_wrap=True), Column("branch", no_wrap=True), "paper", "learning rate", "mergeable", box=None
    )
    for kind in kinds:
        paper = f"{kind.paper.authors} {kind.paper.year}" + (f", {kind.paper.arxiv}" if kind.paper.arxiv else "")
        table.add_row(kind.name, kind.branch, paper, f"{kind.learning_rate:g}", "yes" if kind.mergeable else "no")
    console = Console()
    console.print(table)
    console.print()
    variants = Table(Column("variant", no_wrap=True), "is", box=None)
    for name, method in all_variants().items():
        variants.add_row(name, str(method))
    console.print(variants)
    console.print("`deltune methods NAME` shows the page of one.", highlight=False)


def _page(kind: type[Method]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from deltune.methods.page import page

    Console().print(Markdown(page(kind), code_theme="bw", hyperlinks=False))
