"""The fixtures that ``make_adapterhub_fixtures.py`` wrote, and the models that they are for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parent / "adapterhub"

#: Cases that deltune has no method for, and a word of the message that says so.
REFUSED = {
    "compacter": "Compacter",
    "invertible": "invertible adapters",
    "norm_after": "ln_after",
    "reft": "ReFT",
    "vera": "VeRA",
    "unipelt_ap": "shared_gating",
    "bert/dora": "has a bias",
    "t5/prefix_flat": "distances between tokens",
    "roberta/flex_deep": "strict=False",
}


def kinds() -> list[str]:
    return sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


def cases(readable: bool = True) -> Iterator[tuple[str, str]]:
    """Kind of model and case, of those that can be read or of the others."""
    for kind in kinds():
        for folder in sorted((FIXTURES / kind).iterdir()):
            refused = folder.name in REFUSED or f"{kind}/{folder.name}" in REFUSED
            if folder.name != "base" and folder.is_dir() and refused != readable:
                yield kind, folder.name


def build(kind: str, case: str = "") -> nn.Module:
    """The model of that kind; of flexible heads, the class that has the same head."""
    return copy.deepcopy(_built(kind, case == "flex_tagging"))


@cache
def _built(kind: str, tagging: bool) -> nn.Module:
    base = FIXTURES / kind / "base"
    config = transformers.AutoConfig.from_pretrained(base)
    name = "RobertaForTokenClassification" if tagging else config.architectures[0]
    model: nn.Module = getattr(transformers, name).from_pretrained(base)
    return model.eval()


def reference(kind: str, case: str) -> tuple[dict[str, Tensor], Tensor]:
    """The batch, and the case's logits.

    Of decoders with gates only the first position was given: the library's gates look at later ones.
    """
    recorded = load_file(FIXTURES / kind / "reference.safetensors")
    given = {key: value for key, value in recorded.items() if not key.startswith("logits.")}
    if case == "unipelt" and kind in ("gpt2", "llama", "bart"):
        given = {key: value[:, :1] for key, value in given.items()}
    return given, recorded[f"logits.{case}"]


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found


def difference(kind: str, found: Tensor, recorded: Tensor, given: dict[str, Tensor]) -> float:
    """The largest at positions that are not padding."""
    apart = (found - recorded[:, -found.shape[1] :] if recorded.dim() == 3 else found - recorded).abs()
    if apart.dim() == 3 and "decoder_input_ids" not in given:
        apart = apart[given["attention_mask"].bool()]
    return float(apart.max())
