"""``deltune changes``: which of a model's own parameters a delta changes, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.reporting import check_picture, drawing, print_json
from deltune.errors import DeltuneError

__all__ = ["changes"]


def changes(
    delta: Annotated[Path, typer.Argument(help="Folder that deltune tune wrote.")],
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    count: Annotated[bool, typer.Option("--count", help="Number of changed entries, not their mean change.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw them into this file: .svg, .png or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Show how much each parameter moved, by layer and kind: the mean of |tuned - original| over its entries.

    This is how BitFit's authors found which biases matter. With --count: how many entries differ, which is what
    u-bitfit, s-bitfit and the masks choose. Parameters that did not move are left out, and the task head.
    """
    check_picture(picture)
    tuned = load_delta(model, delta, "cpu").tuned
    from deltune.measure import site_picture, site_table

    found = tuned.changes()
    numbers = {
        tuned.anatomy.parameter_key(name): number
        for name, number in (found.counts() if count else found.means()).items()
    }
    if not numbers:
        raise DeltuneError(f"{delta} changes none of the model's own parameters, besides the task head.")
    write = "{:,.0f}".format if count else "{:.1e}".format
    if picture is not None:
        with drawing(picture):
            title = "changed entries" if count else "mean absolute change"
            site_picture(numbers, "entries", picture, title, write)
    if json:
        result = {"entries": found.count, "parameters": numbers}
        print_json({**result, "picture": None if picture is None else str(picture)})
        return
    if count:
        typer.echo(site_table(numbers, "entries", write))
    else:
        typer.echo(site_table(numbers, "change", write, "mean", lambda values: sum(values) / len(values)))
    if picture is not None:
        typer.echo(f"drawn in {picture}")
