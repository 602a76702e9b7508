"""Rows with pseudo tokens, for every architecture that reads some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import deltune
from deltune.tasks.template import FIRST_PSEUDO_TOKEN
from tests.methods.common import build
from tests.zoo import ARCHITECTURES, Architecture

__all__ = [
    "DECODERS",
    "FRONT",
    "READERS",
    "TEMPLATE",
    "attached",
    "disturb",
    "form_of",
    "marked",
    "name_of",
    "templated",
]

TEMPLATE = "p-tuning(length=3, placement=template)"
FRONT = "p-tuning(length=3)"
#: Architectures with a table of token embeddings, but CLIP, whose pooled output looks for the end among the ids.
READERS = [
    architecture
    for architecture in ARCHITECTURES.values()
    if ("text" in architecture.inputs or architecture.kind == "encoder-decoder")
    and not architecture.name.startswith("clip")
]
DECODERS = ["gpt2", "gpt_neox", "llama-gqa", "mistral", "qwen3", "gemma2", "phi3"]


def name_of(architecture: Architecture) -> str:
    return architecture.name


def marked(ids: Tensor, real: Tensor, places: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    """``ids`` with pseudo tokens at these places, counted over the real tokens of each row."""
    ids = ids.clone()
    for row in range(len(ids)):
        (tokens,) = real[row].nonzero(as_tuple=True)
        for number, place in enumerate(places):
            ids[row, tokens[place]] = FIRST_PSEUDO_TOKEN + number
    return ids


def templated(architecture: Architecture, head: str = "base", **options: Any) -> dict[str, Tensor]:
    """A batch with three pseudo tokens in each row of the input that the method marks by default."""
    batch = architecture.batch(head=head, **options)  # type: ignore[arg-type]
    key = "input_ids" if "input_ids" in batch else "decoder_input_ids"
    mask = batch["attention_mask"].bool() if key == "input_ids" else torch.ones_like(batch[key], dtype=torch.bool)
    return {**batch, key: marked(batch[key], mask)}


def attached(
    name: str, method: str = TEMPLATE, head: str | None = None, padding: str = "none", **options: Any
) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    model = build(name, head, **options)
    torch.manual_seed(1)
    architecture = ARCHITECTURES[name]
    chosen = head or ("language" if architecture.generates else "classification")
    return deltune.attach(model, method), templated(architecture, chosen, padding=padding)


def form_of(tuned: deltune.Tuned) -> Any:
    (form,) = tuned.attachments[tuned.active[0]].forms.values()
    return form


def disturb(form: Any) -> None:
    """Change the rows; not by one number everywhere, which a norm would take away again."""
    with torch.no_grad():
        form.outer.bias += torch.linspace(-1, 1, len(form.outer.bias))
