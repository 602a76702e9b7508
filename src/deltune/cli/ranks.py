"""``deltune ranks``: which matrices a delta changes with which rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deltune.cli.reporting import check_picture, drawing, print_json
from deltune.errors import CheckpointError

__all__ = ["ranks"]

#: Methods whose deltas are products of factors A and B; those of others may have factors of these names too.
_LOW_RANK = frozenset({"lora", "qlora", "dylora", "adalora", "increlora"})


def ranks(
    delta: Annotated[Path, typer.Argument(help="Folder that deltune tune wrote.")],
    picture: Annotated[Path | None, typer.Option(help="Draw them into this file: .svg, .png or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Show the rank of the change of each matrix, by layer and kind.

    This is what AdaLoRA and IncreLoRA decide while they train; matrices that ended at rank 0 are not in the delta.
    """
    from deltune.checkpoints import read
    from deltune.measure import rank_picture, rank_table

    check_picture(picture)
    description, tensors = read(delta)
    methods = _methods_of(description["method"])
    prefixes = _prefixes(description["method"])
    found = _ranks_of({key: tuple(value.shape) for key, value in tensors.items() if key.startswith(prefixes)})
    if not found:
        raise CheckpointError(
            f"{delta} has no low-rank changes: its method is {' + '.join(sorted(methods))}. Ranks can be shown of "
            f"deltas of {', '.join(sorted(_LOW_RANK))}."
        )
    if picture is not None:
        with drawing(picture):
            rank_picture(found, picture, title=f"{sum(found.values())} ranks in {len(found)} matrices")
    if json:
        print_json({"ranks": found, "picture": None if picture is None else str(picture)})
        return
    typer.echo(rank_table(found))
    if picture is not None:
        typer.echo(f"drawn in {picture}")


def _methods_of(description: Mapping[str, Any]) -> set[str]:
    """Name of a method, or those of a sum's parts."""
    return {str(part["name"]) for part in description.get("methods", [description])}


def _prefixes(description: Mapping[str, Any]) -> tuple[str, ...]:
    """How keys of low-rank changes begin: those of a sum's parts begin with its number."""
    parts = description.get("methods")
    if parts is None:
        return ("",) if description["name"] in _LOW_RANK else ()
    return tuple(f"{number}." for number, part in enumerate(parts) if part["name"] in _LOW_RANK)


def _ranks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Ranks by key, of all pairs of factors ``A`` (r, d_in) and ``B`` (d_out, r)."""
    found: dict[str, int] = {}
    for key, shape in shapes.items():
        site, _, factor = key.rpartition(".")
        other = shapes.get(f"{site}.B")
        if factor == "A" and other is not None and shape[0] == other[1]:
            found[site] = shape[0]
    return found
