"""Every pair of methods and every triple of mechanisms that can be gated, on six architectures.

Run as a module it prints how many cases there are, and those that cannot be with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch

import deltune
from deltune.methods import all_methods, parse
from deltune.sites import Insertion
from tests.laws.cases import METHODS, Case, excluded
from tests.zoo import ARCHITECTURES

__all__ = ["ENTRIES", "ONE_LENGTH", "PAIRS", "TRIPLES", "Combined"]

#: Norms afterwards; before, with one fused matrix; grouped keys and rotation; two stacks, twice; images.
ON = ("bert", "gpt2", "llama-gqa", "t5", "bart", "vit")
#: Without positions or a mask that could tell, no row can have fewer prompt rows than the others.
ONE_LENGTH = ("bart", "vit")
#: Registered methods in their small versions.
SINGLE = {name: METHODS[name] for name in all_methods() if name in METHODS}
#: One method of every mechanism that can be gated.
GATED = {
    "weight": "lora(rank=2)",
    "parallel": "parallel-adapter(width=4, dropout=0)",
    "sublayer": "sequential-adapter(width=4, train_norms=false)",
    "residual sum": "pfeiffer-adapter(width=4)",
    "layer": "residual-adapter(width=4)",
    "keys and values": "prefix-tuning(length=3, width=6)",
}


@dataclass(frozen=True)
class Combined(Case):
    """Several methods in one attachment, on one architecture; ``method`` is its text."""

    parts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def attach(self, model: Any, **options: Any) -> deltune.Tuned:
        """The combination on ``model``, with its initial values drawn from a fixed seed."""
        torch.manual_seed(1)
        return deltune.attach(model, self.method, **options)

    @property
    def has_prompt(self) -> bool:
        """Whether a part adds input rows."""
        return any(part.insertion is Insertion.TOKENS for part in parse(self.method).parts)

    @property
    def replaces(self) -> bool:
        """Whether a part replaces a stack's result by what it reads without a gradient: nothing else would learn."""
        return any(name in _REPLACES for name in self.names)

    def shared(self) -> set[str]:
        """Parameters of the model of which both parts have values of their own."""
        one, other = (set(self._alone(part).attachments["default"].selected_names) for part in self.parts)
        return one & other

    @property
    def disagree(self) -> bool:
        """Whether the parts hold values of one parameter in ways that do not know of each other."""
        kinds = {_HELD[name] for name in self.names}
        return len(kinds) > 1 or kinds == {"remembered"}

    def _alone(self, part: str) -> deltune.Tuned:
        torch.manual_seed(1)
        return deltune.attach(self.build(), part, train_head=False)


#: How methods hold values of the model's own parameters: whole, whole and remembered by a search, by entries, masked.
_HELD = {
    **dict.fromkeys(("full", "freeze", "bitfit", "sequential-adapter"), "whole"),
    **dict.fromkeys(("u-bitfit", "s-bitfit"), "remembered"),
    **dict.fromkeys(("fish-mask", "diff-pruning"), "entries"),
    "threshold-mask": "mask",
}
#: Entries of one parameter are added, whoever has them.
ENTRIES = ("fish-mask", "diff-pruning")
_REPLACES = ("attention-fusion", "ladder-side-tuning")


def pairs() -> Iterator[Any]:
    """Parameters for pytest: every pair on every architecture on which both methods are possible."""
    names = list(SINGLE)
    for number, (one, other) in enumerate(combinations(names, 2)):
        for place, architecture in enumerate(ON):
            model = ARCHITECTURES[architecture]
            if excluded(one, model) or excluded(other, model):
                continue
            texts = (SINGLE[one], SINGLE[other])
            case = Combined(" + ".join(texts), model, parts=texts, names=(one, other))
            neighbours = names.index(other) - names.index(one) == 1 and number % len(ON) == place
            marks = () if neighbours else (pytest.mark.slow,)
            yield pytest.param(case, id=f"{one}+{other}-{architecture}", marks=marks)


def triples() -> Iterator[Any]:
    """Parameters for pytest: gates of every triple of mechanisms."""
    for number, three in enumerate(combinations(GATED, 3)):
        for place, architecture in enumerate(ON):
            texts = tuple(GATED[name] for name in three)
            case = Combined(f"gated({', '.join(texts)})", ARCHITECTURES[architecture], parts=texts)
            marks = () if number % len(ON) == place else (pytest.mark.slow,)
            yield pytest.param(case, id=f"{'+'.join(three)}-{architecture}", marks=marks)


PAIRS = list(pairs())
TRIPLES = list(triples())

if __name__ == "__main__":
    replacing = sum(item.values[0].replaces for item in PAIRS)
    quick = sum(not item.marks for item in PAIRS), sum(not item.marks for item in TRIPLES)
    count = len(list(combinations(SINGLE, 2)))
    print(f"{len(PAIRS)} cases of {count} pairs on {', '.join(ON)}; {quick[0]} at every commit")
    print(f"  {replacing} of them are refused: a part replaces a stack's result, and nothing else would learn")
    print(f"{len(TRIPLES)} cases of gated triples; {quick[1]} at every commit")
