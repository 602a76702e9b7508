"""Every law is tested over every method and every architecture; each exclusion has a reason here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import deltune
from deltune.methods import Method, Sum, all_methods, get, parse
from deltune.sites import Insertion
from tests.zoo import ARCHITECTURES, Architecture

#: Small versions of every method: the laws do not depend on size.
METHODS: dict[str, str] = {
    "full": "full",
    "freeze": "freeze(layers=1)",
    "bitfit": "bitfit(missing=add)",
    "fish-mask": "fish-mask(ratio=0.3)",
    "u-bitfit": "u-bitfit(budget=0.3)",
    "s-bitfit": "s-bitfit(budget=0.3)",
    "threshold-mask": "threshold-mask(zeros_at_start=0.3)",
    # of gates in the middle of their range the laws can see the slope, in evaluation mode too
    "diff-pruning": "diff-pruning(ratio=0.3, initial=1, alpha=0.5)",
    "lora": "lora(rank=2, alpha=4, targets='attention.* ffn.*')",
    "lora-decomposed": "lora(rank=2, alpha=4, weight_decomposed=true, targets='attention.* ffn.*')",
    "qlora": "qlora(rank=2, alpha=4, dropout=0)",
    "u-lora": "u-lora(rank=2, alpha=4, budget=0.3)",
    "s-lora": "s-lora(rank=2, alpha=4, budget=0.5)",
    "fact": "fact(dropout=0)",
    "sequential-adapter": "sequential-adapter(width=4, standard_deviation=0.1)",
    # of so few units relu may leave none for the one position that a classifier reads
    "pfeiffer-adapter": "pfeiffer-adapter(width=4, activation=gelu, standard_deviation=0.3)",
    "residual-adapter": "residual-adapter(width=4, standard_deviation=0.3)",
    "parallel-adapter": "parallel-adapter(width=4, dropout=0)",
    "parallel-adapter-heads": "parallel-adapter(width=4, dropout=0, targets=attention, reads=stream)",
    "adapter-fusion": "adapter-fusion(adapters='pfeiffer-adapter(width=4), pfeiffer-adapter(width=3)')",
    "head-adapter": "head-adapter(width=3)",
    "head-adapter-softmax": "head-adapter(width=3, activation=softmax, grouped=true, scale=4, initialization=normal)",
    "prefix-tuning": "prefix-tuning(length=3, width=6)",
    "prefix-tuning-shifted": "prefix-tuning(length=3, reparameterize=false, shift_positions=true)",
    "prompt-tuning": "prompt-tuning(length=3)",
    "multitask-prompt-tuning": "multitask-prompt-tuning(length=3, rank=2)",
    "attempt": "attempt(length=3)",
    "p-tuning": "p-tuning(length=3)",
    "p-tuning-v2": "p-tuning-v2(length=3, dropout=0)",
    "attention-fusion": "attention-fusion(dropout=0)",
    "ladder-side-tuning": "ladder-side-tuning(reduction=2)",
    "unipelt": "unipelt(length=3, prefix_width=6, width=4, rank=2, activation=gelu)",
    "unipelt-central": "unipelt(length=3, reparameterize=false, width=4, rank=2, activation=gelu, gates=central)",
    "gated-scalar": "gated(lora(rank=2), parallel-adapter(width=4, dropout=0), gate=scalar)",
    "mam": "mam(length=3, prefix_width=6, width=4, dropout=0)",
    "attention-fusion-residual": "attention-fusion(dropout=0, residual=true, embeddings=true)",
}
#: One method of every mechanism: these are tested on every architecture at every commit.
EVERYWHERE = (
    "bitfit",
    "lora",
    "sequential-adapter",
    "prefix-tuning",
    "prompt-tuning",
    "attention-fusion",
    "ladder-side-tuning",
)
#: The other methods share their mechanisms: at every commit they are tested on these, and by the slow tests on all.
REPRESENTATIVE = ("bert", "gpt2", "llama-gqa", "t5", "vit")

#: Each shares its forms' code with another method here, which is tested on all those; these are tested on two of them.
SIBLINGS = (
    "attempt",
    "attention-fusion-residual",
    "dylora",
    "gated-scalar",
    "head-adapter-softmax",
    "lora-decomposed",
    "mam",
    "parallel-adapter-heads",
    "pfeiffer-adapter",
    "prefix-tuning-shifted",
    "s-bitfit",
    "s-lora",
    "unipelt-central",
)
OF_SIBLINGS = ("bert", "llama-gqa")

# whatever else is registered is tested with its defaults
METHODS |= {name: name for name in all_methods() if name not in METHODS and not issubclass(get(name), Sum)}

#: (method, condition, reason) for cases that cannot be.
EXCLUSIONS: list[tuple[str, Callable[[Architecture], bool], str]] = [
    (
        "ladder-side-tuning",
        lambda architecture: architecture.name in ("albert", "deberta-v2", "blip", "blip-caption"),
        "narrow copies of its layers cannot be built or fed (shared, built from no stored configuration, with matrices "
        "that never run, or reading states that another module has changed); attach refuses it",
    ),
    (
        "prefix-tuning",
        lambda architecture: not architecture.dispatches,
        "its attention does not go through transformers' attention interface; attach refuses it",
    ),
    (
        "prefix-tuning-shifted",
        lambda architecture: not architecture.dispatches or architecture.kind not in ("encoder", "decoder"),
        "its attention does not dispatch, or a stack of it takes no position_ids; attach refuses it",
    ),
    (
        "p-tuning-v2",
        lambda architecture: not architecture.dispatches,
        "as for prefix-tuning",
    ),
    *(
        (name, lambda architecture: not architecture.dispatches, "as for prefix-tuning")
        for name in ("head-adapter", "head-adapter-softmax", "mam", "unipelt", "unipelt-central")
    ),
    (
        "unipelt-central",
        lambda architecture: architecture.kind == "encoder-decoder",
        "a central gate reads the decoder's positions, and LoRA of its cross-attention those of the encoder; attach "
        "refuses it",
    ),
]


@dataclass(frozen=True)
class Case:
    """One method on one architecture."""

    method: str
    architecture: Architecture
    tested_head: str | None = None

    @property
    def head(self) -> Any:
        """The head to test with: the one that generates, else a task head, else none."""
        if self.tested_head is not None:
            return self.tested_head
        if self.architecture.generates:
            return "language"
        return "classification" if "classification" in self.architecture.heads else self.architecture.heads[0]

    def build(self, **options: Any) -> Any:
        """A random model."""
        return self.architecture.build(self.head, **options)

    def attach(self, model: Any, **options: Any) -> deltune.Tuned:
        """The method on ``model``, with its initial values drawn from a fixed seed."""
        torch.manual_seed(1)
        return deltune.attach(model, METHODS[self.method], **options)

    def batch(self, **options: Any) -> dict[str, torch.Tensor]:
        """Inputs for the model."""
        return self.architecture.batch(head=self.head, **options)

    def output(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits or last hidden state, without a graph: kernels may differ with what requires a gradient."""
        with torch.no_grad():
            return self.architecture.output(model(**batch))

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A loss that depends on every output: a fixed random direction."""
        output = self.architecture.output(model(**batch))
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
        return (output * direction).mean()


def excluded(method: str, architecture: Architecture) -> str | None:
    """Why the case cannot be, None if it can."""
    for name, condition, reason in EXCLUSIONS:
        if name == method and condition(architecture):
            return reason
    return None


@dataclass(frozen=True)
class Only:
    """A condition on methods or architectures, with the reason why a law concerns no others."""

    reason: str
    holds: Callable[[Any], bool]

    def __call__(self, subject: Any) -> bool:
        return self.holds(subject)


EVERY = Only("", lambda subject: True)
MERGEABLE = Only("the law is of methods that can be merged", lambda method: method.mergeable)
NOT_MERGEABLE = Only("the law is of methods that cannot be merged", lambda method: not method.mergeable)
UNCHANGED = Only("the sheet does not say that the start is unchanged", lambda method: method.unchanged_at_start)
CHANGED = Only("the sheet says that the start is unchanged", lambda method: not method.unchanged_at_start)
GENERATES = Only("the architecture does not generate", lambda architecture: architecture.generates)
PADS = Only("the architecture reads no padded input", lambda architecture: architecture.pads)


def can_be_routed(method: Method) -> bool:
    """Whether a method only adds changes, so that each row of a batch can have its own."""
    return all(
        part.insertion is not Insertion.SELECT and not getattr(part, "train_norms", False) for part in method.parts
    )


def named(*names: str, because: str) -> Only:
    """Methods or architectures by name."""
    return Only(because, lambda subject: subject.name in names)


class Cases(list[Any]):
    """Parameters for pytest, and of every case of the grid that is not among them: method, architecture, reason."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[tuple[str, str, str]] = []


def cases(
    methods: Only = EVERY,
    architectures: Only = EVERY,
    paddings: Callable[[Architecture], tuple[str, ...]] | None = None,
) -> Cases:
    """Parameters for pytest: every case whose method and architecture satisfy the conditions.

    Args:
        methods: which methods.
        architectures: which architectures.
        paddings: the paddings that an architecture is tested with; the parameters are then pairs.
    """
    found = Cases()
    for name, specification in METHODS.items():
        for architecture in ARCHITECTURES.values():
            reason = excluded(name, architecture)
            reason = reason or (None if methods(parse(specification)) else methods.reason)
            reason = reason or (None if architectures(architecture) else architectures.reason)
            if reason is not None:
                found.left_out.append((name, architecture.name, reason))
                continue
            case = Case(name, architecture)
            quick = OF_SIBLINGS if name in SIBLINGS else REPRESENTATIVE
            marks = () if name in EVERYWHERE or architecture.name in quick else (pytest.mark.slow,)
            if paddings is None:
                found.append(pytest.param(case, id=f"{name}-{architecture.name}", marks=marks))
            for padding in () if paddings is None else paddings(architecture):
                found.append(pytest.param(case, padding, id=f"{name}-{architecture.name}-{padding}", marks=marks))
    return found


def sides(architecture: Architecture) -> tuple[str, ...]:
    """Where batches can be padded without changing what the bare model itself makes of them."""
    if not architecture.pads:
        return ()
    return ("right", "left") if architecture.left_padding else ("right",)


def take_steps(tuned: deltune.Tuned, case: Case, batch: dict[str, torch.Tensor], steps: int = 3) -> None:
    """Train a little, with weight decay, as a user would."""
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    # as in the beginning of a long training: AdaLoRA prunes nothing yet, which on saving would change the last bits
    tuned.bind(optimizer, 100)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(tuned.model, batch).backward()
        optimizer.step()
