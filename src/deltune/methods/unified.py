"""Every method in the five terms of the unified view: site, form, insertion, combination, control.

They are the columns of He et al. 2022 (arXiv 2110.04366, table 1): the form is the functional form of dh, the site the
modified representation, the combination the composition function. Nothing of it is typed for a method: the method is
placed on a model, and the forms, the sites and the method's own class are asked. To write the table into a page that
has the marks for it::

    python -m deltune.methods.unified docs/unified_view.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltune.backbone import Anatomy, Part, anatomy_of
from deltune.errors import DeltuneError
from deltune.methods.base import Method, Placement, Sum
from deltune.methods.registry import all_methods, all_variants, parse
from deltune.sites import Form, GateForm, ParameterSite, SelectionForm

__all__ = ["COLUMNS", "Terms", "markdown", "specimen_of", "unified_rows", "unified_view", "write_table"]

#: The title of each term in tables, with the words of He et al. where these are others.
COLUMNS = {
    "method": "method",
    "form": "form (dh)",
    "insertion": "insertion",
    "site": "site (modified representation)",
    "combination": "combination (composition function)",
    "control": "control",
}
_BEGIN, _END = "<!-- unified -->", "<!-- end unified -->"
#: What overriding one of these says of a method's control.
_HOOKS = {
    ("prepare",): "set up from data",
    ("begin", "before_step", "after_step"): "a schedule follows the optimizer",
    ("penalty",): "a penalty in the loss",
}


@dataclass(frozen=True)
class Terms:
    """One row: a method, or what a part of it does at one kind of site.

    Attributes:
        method: as it is typed; of a method of several parts with the part behind a colon.
        site: what is changed.
        form: dh as text, without biases.
        insertion: the word of :class:`deltune.sites.Insertion`.
        combination: how dh and h are combined.
        control: when it is live, and what changes as training goes.
    """

    method: str
    site: str
    form: str
    insertion: str
    combination: str
    control: str


def unified_view(methods: Iterable[Method | str], model: nn.Module | None = None) -> list[Terms]:
    """The rows of several methods; one that cannot act on the model says so in its row.

    Args:
        methods: methods, or their text.
        model: by default an encoder of BERT-base's shape, without values.
    """
    rows: list[Terms] = []
    for text in methods:
        method = parse(text)
        try:
            rows += unified_rows(text, model)
        except DeltuneError as error:
            rows.append(Terms(str(method), f"none here: {error}", "", method.insertion.value, "", ""))
    return rows


def unified_rows(method: Method | str, model: nn.Module | None = None) -> list[Terms]:
    """The rows of one method: one for each part, form and kind of site.

    Args:
        method: a method, or its text.
        model: as for :func:`unified_view`.

    Raises:
        MethodError: if it cannot be built, or does not fit the model.
        TargetError: if a target selects nothing in the model.
    """
    title = method if isinstance(method, str) and method in all_variants() else ""
    method = parse(method)
    model = _bert_base() if model is None else model
    anatomy = anatomy_of(model)
    with torch.random.fork_rng(devices=[]):
        placements = list(method.place(model, anatomy))
    by_part: dict[str, list[Placement]] = {}
    for placement in placements:
        by_part.setdefault(placement.part, []).append(placement)
    parts = _methods_of(method, by_part)
    rows = []
    for path, placed in by_part.items():
        part = parts[path]
        name = f"{title or _title(method)}: {part}" if title or len(method.parts) > 1 else str(part)
        rows += [Terms(name, *terms, _control(part, placed)) for terms in _terms(placed, model, anatomy)]
    return rows


def specimen_of(kind: type[Method]) -> str:
    """The text of a method with its defaults, and with ``specimen`` where it cannot be built from these."""
    return f"{kind.name}({kind.specimen})" if kind.specimen else kind.name


def markdown(rows: Sequence[Terms]) -> str:
    """The rows as a table in Markdown."""
    lines = [list(COLUMNS.values())]
    for row in rows:
        values = vars(row)
        lines.append([f"`{values[name]}`" if name in _CODE and values[name] else values[name] for name in COLUMNS])
    # a bar would end the cell, in code too
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(COLUMNS), *texts[1:]])


_CODE = ("method", "form", "combination")


def write_table(file: Path) -> None:
    """Write the table of all methods of this package between the marks for it in a Markdown file.

    Raises:
        ValueError: if the file has no marks.
    """
    text = file.read_text(encoding="utf-8")
    if _BEGIN not in text or _END not in text:
        raise ValueError(f"{file} has no place for the unified view: write {_BEGIN} and {_END} into it.")
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    table = markdown(unified_view(own_specifications()))
    file.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


def own_specifications() -> list[str]:
    """The methods that have a file in this package, with defaults, and the variants."""
    kinds = (kind for kind in all_methods().values() if kind.__module__.startswith("deltune."))
    return [*(specimen_of(kind) for kind in kinds if not issubclass(kind, Sum)), *all_variants()]


@cache
def _bert_base() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model: nn.Module = BertForSequenceClassification(BertConfig())
    return model


def _title(method: Method) -> str:
    """The name of a method of several parts; of a sum, whose parts say everything, only what it is."""
    return str(method) if method.name != "sum" else "sum"


def _methods_of(method: Method, by_part: Mapping[str, Any]) -> dict[str, Method]:
    """The method of each part that placed something; what belongs to no part, or to one unknown, is the whole's."""
    paths = sorted((path for path in by_part if path), key=lambda path: [int(number) for number in path.split(".")])
    known = dict(zip(paths, method.parts, strict=True)) if len(paths) == len(method.parts) else {}
    return {path: known.get(path, method) for path in by_part}


def _terms(placed: Sequence[Placement], model: nn.Module, anatomy: Anatomy) -> list[tuple[str, str, str, str]]:
    """Site, form, insertion and combination of what one part places; equal ones at several sites are one row."""
    selection = next((item.form for item in placed if isinstance(item.form, SelectionForm)), None)
    found: dict[tuple[str, str, str], list[tuple[str, Part | None]]] = {}
    names: list[str] = []
    for item in placed:
        if item.site is None or isinstance(item.form, GateForm):
            continue  # shared by several forms, whose formulas name it
        if isinstance(item.site, ParameterSite):
            text = item.site.formula if selection is None else selection.as_text(item.site.reads)
            names.append(item.site.name)
            found.setdefault((text, item.site.insertion.value, item.site.combination()), []).append(("", None))
            continue
        assert item.form is not None
        key = (item.form.as_text(item.site.reads), item.site.insertion.value, item.site.combination(item.form.factor()))
        found.setdefault(key, []).append((item.site.modified, item.site.part))
    rows = []
    for (form, insertion, combination), sites in found.items():
        parts = [part for _, part in sites if part is not None]
        if parts:
            words = _joined([word for word, _ in sites], anatomy) + _layers((part.layer for part in parts), anatomy)
        else:
            words = _parameters(names, model, anatomy)
        rows.append((words, form, insertion, combination))
    return rows


def _joined(words: Iterable[str], anatomy: Anatomy) -> str:
    """Each word once; ``attention.*`` for all matrices of attention, and so on."""
    distinct = list(dict.fromkeys(words))
    for block in ("attention", "ffn"):
        roles = {part.role for part in anatomy if part.role.startswith(f"{block}.")}
        if len(roles) > 1 and roles <= set(distinct):
            first = min(distinct.index(role) for role in roles)
            distinct = [f"{block}.*" if at == first else word for at, word in enumerate(distinct)]
            distinct = [word for word in distinct if word not in roles]
    return ", ".join(distinct)


def _layers(layers: Iterable[int | None], anatomy: Anatomy) -> str:
    """`` (layers 8-11)``; empty for all layers, and for what stands in none."""
    numbers = {layer for layer in layers if layer is not None}
    count = max((len(stack) for stack in anatomy.stacks.values()), default=0)
    if not numbers or len(numbers) >= count:
        return ""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f" (layer {texts[0]})" if len(numbers) == 1 else f" (layers {', '.join(texts)})"


def _parameters(names: Sequence[str], model: nn.Module, anatomy: Anatomy) -> str:
    """The model's own parameters in words: all of them, the biases, the norms, or those of some roles."""
    below = [name for name, _ in model.named_parameters() if not name.startswith(tuple(f"{x}." for x in anatomy.head))]
    if set(below) <= set(names):
        return "all parameters"
    roles = {part.module: part for part in anatomy}
    owners = [roles.get(name.rpartition(".")[0]) for name in names]
    layers = _layers((part.layer for part in owners if part is not None), anatomy)
    if all(name.endswith("bias") for name in names):
        return f"biases{layers}"
    if all(part is not None and part.role == "norm" for part in owners):
        return f"norms{layers}"
    return f"parameters{layers}"


def _control(method: Method, placed: Sequence[Placement]) -> str:
    """When the method is live, and what changes in training, from what its class and its forms define."""
    forms = [item.form for item in placed if item.form is not None]
    words = [
        text
        for names, text in _HOOKS.items()
        if any(getattr(type(method), name) is not getattr(Method, name) for name in names)
    ]
    penalty = _HOOKS["penalty",]
    if penalty not in words and any(type(form).penalty is not Form.penalty for form in forms):
        words.append(penalty)
    if any(hasattr(form, "set_rank") for form in forms):
        words.append("any smaller rank afterwards")
    if method.base_format is not None:
        words.append("the frozen model in 4 bits")
    return "; ".join(words) or "always"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("Say which page has the table: python -m deltune.methods.unified docs/unified_view.md")
    for argument in sys.argv[1:]:
        write_table(Path(argument))
