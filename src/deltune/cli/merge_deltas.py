"""The part of ``deltune merge`` that makes one delta of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.cli.loaded import load_delta
from deltune.errors import StateError, suggestion

if TYPE_CHECKING:
    from deltune.merging import Merged
    from deltune.tuned import Tuned

__all__ = ["MergeRequest", "merge_folders"]

_AVERAGE = "average"
_MERGED = "merged"
_INITIAL = "initial"


@dataclass(frozen=True)
class MergeRequest:
    """The options of a merge of deltas as they were typed; None where they were not.

    Attributes:
        strategy: without one a delta is folded into its model, and none of the others means anything.
        weights: numbers joined by commas.
        scale: and the following, see :func:`deltune.merge_deltas`.
        heads: a folder, or ``average``.
        initial: a folder.
    """

    strategy: str | None = None
    weights: str | None = None
    scale: float | None = None
    density: float | None = None
    drop: float | None = None
    seed: int | None = None
    rank: int | None = None
    heads: str | None = None
    initial: Path | None = None
    missing: str | None = None

    def check(self, deltas: Sequence[Path], into: str | None) -> None:
        """Refuse what makes no sense together.

        Raises:
            StateError: if so.
        """
        if not deltas:
            raise StateError("Name the folder of a delta, or several with --strategy.")
        if self.strategy is not None:
            if into is not None:
                raise StateError("--into says how a delta is folded into its model. Leave it out with --strategy.")
            return
        typed = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        if typed:
            raise StateError(f"--{typed[0]} is for merging deltas into a delta. Say how with --strategy linear.")
        if len(deltas) > 1:
            raise StateError(
                f"{len(deltas)} deltas were given. To merge them into one delta, say how with --strategy, such as "
                "--strategy ties; to fold a delta into its model, name one."
            )

    def numbers(self) -> list[float] | None:
        """The weights.

        Raises:
            StateError: if one of them is no number.
        """
        if self.weights is None:
            return None
        try:
            return [float(piece) for piece in self.weights.split(",")]
        except ValueError as error:
            raise StateError(
                f"--weights are numbers joined by commas, such as 1,1,-1, not {self.weights!r}."
            ) from error


def merge_folders(model: str, deltas: Sequence[Path], output: Path, request: MergeRequest) -> Merged:
    """Merge the deltas in folders and write the result into another.

    The model is loaded for the task of the delta whose head is taken, else for that of the first; the heads of the
    others, which may be of other sizes, are left out.

    Raises:
        CheckpointError: if a folder holds no delta of this model.
        StateError: if the deltas or options do not fit each other.
    """
    numbers = request.numbers()
    names = _names(deltas)
    head = _head(names, request.heads)
    first = next((folder for folder, name in names.items() if name == head), deltas[0])
    tuned = load_delta(model, first, "cpu", name=names[first], head=head in (names[first], _AVERAGE)).tuned
    from deltune.checkpoints import read
    from deltune.exporting.folders import write_checked
    from deltune.loading import load
    from deltune.merging import merge_deltas

    with_head = [_trained_head(tuned, folder) for folder in deltas] if head is None else []
    for folder, name in names.items():
        if folder != first:
            load(tuned, folder, name, head=head == _AVERAGE)
    if request.initial is not None:
        load(tuned, request.initial, _INITIAL, head=False)
    options: dict[str, Any] = {
        key: value
        for key in ("scale", "density", "drop", "seed", "rank", "missing")
        if (value := getattr(request, key)) is not None
    }
    merged = merge_deltas(
        tuned,
        [names[folder] for folder in deltas],
        _MERGED,
        strategy=request.strategy or "",
        weights=numbers,
        heads=head,
        initial=None if request.initial is None else _INITIAL,
        **options,
    )
    write_checked(output, lambda folder: tuned.save(folder, _MERGED), read)
    return replace(merged, left_out_heads=any(with_head))


def _trained_head(tuned: Tuned, folder: Path) -> bool:
    """Whether the delta in ``folder``, of any format, has a task head.

    Raises:
        CheckpointError: if it holds no delta of this model.
    """
    from deltune.checkpoints import read_description, recognised

    format = recognised(folder)
    if format.name == "deltune":
        return bool(read_description(folder)["head"])
    with tuned.disabled():
        return bool(format.read(folder, tuned.model, tuned.anatomy, False).head)


def _names(deltas: Sequence[Path]) -> dict[Path, str]:
    """A name for each folder: its own, made fit, with a number where several are called the same.

    Raises:
        StateError: if one is named twice.
    """
    from torch import nn

    names: dict[Path, str] = {}
    for folder in deltas:
        if folder in names:
            raise StateError(f"{folder} is named twice. Name each delta once, and give --weights.")
        base = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")
        base = base if base and not hasattr(nn.Module, base) else f"delta-{base}".rstrip("-")
        taken = {*names.values(), _MERGED, _INITIAL, _AVERAGE}
        numbered = (f"{base}-{number}" for number in range(2, len(deltas) + 5))
        names[folder] = base if base not in taken else next(name for name in numbered if name not in taken)
    return names


def _head(names: dict[Path, str], heads: str | None) -> str | None:
    """The name of the delta whose head is taken.

    Raises:
        StateError: if it is none of them.
    """
    if heads is None or heads == _AVERAGE:
        return heads
    if Path(heads) in names:
        return names[Path(heads)]
    if heads in names.values():
        return heads
    choices = [*map(str, names), _AVERAGE]
    raise StateError(f"--heads cannot be {heads!r}: it is none of the deltas. {suggestion(heads, choices)}")
