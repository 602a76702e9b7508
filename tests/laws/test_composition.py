"""The laws under random options, random batches, and random orders of operations."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import deltune
from deltune.errors import StateError
from deltune.methods import parse
from deltune.tuned import HANDLE
from tests.laws.cases import METHODS
from tests.laws.test_unchanged import assert_same_picture, picture_of
from tests.zoo import ARCHITECTURES

#: Every test of this file builds the same small models many times; the same cases each time it runs.
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
MODELS = {"bert": "classification", "gpt2": "language", "llama-gqa": "language", "t5": "language"}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return ARCHITECTURES[name].build(MODELS[name], dtype=dtype)  # type: ignore[arg-type]


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def step(tuned: deltune.Tuned, batch: dict[str, Tensor]) -> None:
    """One step of plain gradient descent, large enough to be seen in bfloat16."""
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=0.03, weight_decay=0.01)
    logits = tuned.model(**batch).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    (logits * direction).mean().backward()
    optimizer.step()
    tuned.model.zero_grad()


# -- options -------------------------------------------------------------------------------------------------

LAYERS = st.sampled_from(["", " layers=0", " layers=-1", " layers=:1", " layers=0,-1"])
MATRICES = st.sampled_from(
    ["attention.query", "attention.query,attention.value", "attention.*", "ffn.*", "attention.* ffn.*", "ffn.down"]
)
SUBLAYERS = st.sampled_from(["attention", "ffn", "attention,ffn"])
STARTS = st.sampled_from(
    ["initialization=kaiming"] + [f"initialization=truncated, standard_deviation={size}" for size in (0.01, 0.3)]
)


@st.composite
def lora(draw: st.DrawFn) -> str:
    return (
        f"lora(rank={draw(st.integers(1, 6))}, alpha={draw(st.floats(0.1, 20))}, dropout={draw(st.floats(0, 0.5))}, "
        f"rank_stabilized={draw(st.booleans())}, targets='{draw(MATRICES)}{draw(LAYERS)}')"
    )


@st.composite
def adapter(draw: st.DrawFn) -> str:
    return (
        f"sequential-adapter(width={draw(st.integers(1, 9))}, "
        f"{draw(STARTS)}, train_norms={draw(st.booleans())}, "
        f"activation={draw(st.sampled_from(['relu', 'gelu_pytorch_tanh', 'silu']))}, "
        f"targets='{draw(SUBLAYERS)}{draw(LAYERS)}')"
    )


@st.composite
def other_adapter(draw: st.DrawFn) -> str:
    name, targets = draw(
        st.sampled_from(
            [("pfeiffer-adapter", "ffn"), ("residual-adapter", "layer")]
            + [("parallel-adapter", sublayers) for sublayers in ("attention", "ffn", "attention,ffn")]
        )
    )
    return (
        f"{name}(width={draw(st.sampled_from(['1', '5', 'd/4']))}, {draw(STARTS)}, "
        f"scale={draw(st.sampled_from(['1', '4', 'learned', 'channel']))}, layer_norm={draw(st.booleans())}, "
        f"dropout={draw(st.sampled_from([0, 0.3]))}, targets='{targets}{draw(LAYERS)}')"
    )


@st.composite
def prefix(draw: st.DrawFn) -> str:
    return (
        f"prefix-tuning(length={draw(st.integers(1, 6))}, reparameterize={draw(st.booleans())}, "
        f"width={draw(st.integers(1, 9))}, dropout={draw(st.floats(0, 0.5))}, targets='attention{draw(LAYERS)}')"
    )


@st.composite
def prompt(draw: st.DrawFn) -> str:
    start = draw(st.sampled_from(["vocabulary", "uniform"]))
    return f"prompt-tuning(length={draw(st.integers(1, 9))}, initialization={start})"


SELECTIVE = st.sampled_from(
    [
        "full",
        "bitfit(missing=add)",
        "bitfit(missing=add, targets='ffn.*')",
        "freeze(layers=1)",
        "freeze(layers=2, targets='ffn.*')",
        "freeze(layers=1, targets='attention.*,norm')",
    ]
)
#: Sums of a change of weights, of sublayers, of keys and of input: any of them go together.
SUMS = st.tuples(lora(), prefix(), prompt(), adapter()).map(" + ".join)
SPECIFICATIONS = st.one_of(lora(), adapter(), other_adapter(), prefix(), prompt(), SELECTIVE, SUMS)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])


@st.composite
def batches(draw: st.DrawFn, name: str) -> dict[str, Tensor]:
    return ARCHITECTURES[name].batch(
        batch_size=draw(st.integers(1, 4)),
        length=draw(st.integers(2, 12)),
        seed=draw(st.integers(0, 5)),
        padding=draw(st.sampled_from(["none", "left", "right"])),
        head=MODELS[name],  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", MODELS)
@settings(SETTINGS, max_examples=20)
@given(data=st.data())
def test_any_options_keep_the_laws(name: str, data: st.DataObject) -> None:
    specification, dtype = data.draw(SPECIFICATIONS), data.draw(DTYPES)
    batch = data.draw(batches(name))
    method = parse(specification)
    assert parse(str(method)) == parse(method.to_dict()) == method
    model = build(name, dtype)
    bare, picture = output(model, batch), picture_of(model)

    torch.manual_seed(0)
    tuned = deltune.attach(model, method)
    fresh = output(model, batch)
    assert fresh.shape == bare.shape
    assert fresh.dtype == bare.dtype
    assert torch.isfinite(fresh).all()
    if method.unchanged_at_start:
        assert torch.equal(fresh, bare)
    model.train()
    step(tuned, batch)
    model.eval()
    trained = output(model, batch)
    assert not torch.equal(trained, bare)
    with tuned.disabled():
        assert torch.equal(output(model, batch), bare)

    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        loaded = deltune.load(build(name, dtype), folder)
    assert torch.equal(output(loaded.model, batch), trained)

    if method.mergeable:
        tuned.merge()
        merged = output(model, batch)
        # bfloat16 keeps 8 bits of a merged weight, and of every sum after it
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.2}[dtype]
        assert (merged - trained).abs().max() <= tolerance * float(trained.abs().max().clamp(min=1))
        tuned.unmerge()
        assert torch.equal(output(model, batch), trained)
    tuned.detach()
    assert torch.equal(output(model, batch), bare)
    assert_same_picture(picture_of(model), picture)


# -- several attachments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_each_of_many_attachments_is_as_if_alone(method: str, name: str) -> None:
    """Whatever else is attached, and in whatever order they were made live."""
    batch = ARCHITECTURES[name].batch(head=MODELS[name])  # type: ignore[arg-type]
    alone = []
    for seed in range(4):
        model = build(name)
        torch.manual_seed(seed)
        step(deltune.attach(model, METHODS[method]), batch)
        alone.append(output(model, batch))
    model = build(name)
    bare = output(model, batch)
    for seed in range(4):
        torch.manual_seed(seed)
        if seed == 0:
            tuned = deltune.attach(model, METHODS[method], name="a0")
        else:
            tuned.attach(METHODS[method], name=f"a{seed}")
        step(tuned, batch)
    for seed in (2, 0, 3, 1, 1, 2):
        tuned.activate(f"a{seed}")
        assert torch.equal(output(model, batch), alone[seed]), seed
    tuned.activate()
    assert torch.equal(output(model, batch), bare)
    tuned.detach("a1")
    tuned.activate("a3")
    assert torch.equal(output(model, batch), alone[3])
    tuned.detach()
    assert torch.equal(output(model, batch), bare)


@pytest.mark.parametrize("method", ["full", "freeze(layers=1)", "bitfit(missing=add)", "sequential-adapter(width=2)"])
def test_two_values_of_one_parameter_are_not_active_together(method: str) -> None:
    batch = ARCHITECTURES["gpt2"].batch()
    tuned = deltune.attach(build("gpt2"), method, name="one")
    step(tuned, batch)
    tuned.attach(method, name="two")
    before = output(tuned.model, batch)
    with pytest.raises(StateError, match="'one' and 'two' both have their own value"):
        tuned.activate("one", "two")
    assert tuned.active == ("two",)
    assert torch.equal(output(tuned.model, batch), before)


@pytest.mark.parametrize("method", ["prefix-tuning(length=2)", "prompt-tuning(length=2)", "full", "bitfit"])
def test_what_cannot_be_scaled_says_so(method: str) -> None:
    tuned = deltune.attach(build("gpt2"), method)
    with pytest.raises(StateError, match="cannot be scaled"):
        tuned.activate("default", weights=(0.5,))
    with pytest.raises(StateError, match="1 names but 2 weights"):
        tuned.activate("default", weights=(1.0, 1.0))
    tuned.activate("default", weights=(1.0,))


@settings(SETTINGS, max_examples=10)
@given(first=st.floats(-2, 2), second=st.floats(-2, 2))
def test_weights_scale_changes_of_weights_linearly(first: float, second: float) -> None:
    """At one matrix the weighted sum is the sum of the weighted deltas; zero is the bare model."""
    model = build("gpt2")
    batch = ARCHITECTURES["gpt2"].batch()
    bare = output(model, batch)
    torch.manual_seed(0)
    tuned = deltune.attach(model, "lora(rank=2, targets='lm_head')", name="one")
    tuned.attach("lora(rank=3, targets='lm_head')", name="two")
    for name in ("one", "two"):
        tuned.activate(name)
        step(tuned, batch)
    deltas = []
    for name in ("one", "two"):
        tuned.activate(name)
        deltas.append(output(model, batch) - bare)
    tuned.activate("one", "two", weights=(first, second))
    expected = bare + first * deltas[0] + second * deltas[1]
    assert torch.allclose(output(model, batch), expected, atol=1e-5 * float(bare.abs().max()))
    tuned.activate("one", "two", weights=(0.0, 0.0))
    assert torch.equal(output(model, batch), bare)


# -- orders of operations ------------------------------------------------------------------------------------

#: What random programs attach: of every insertion, mergeable and not, some of which exclude each other.
PIECES = (
    "lora(rank=2)",
    "lora(rank=1, targets='attention.* ffn.*')",
    "sequential-adapter(width=3, standard_deviation=0.1, train_norms=false)",
    "sequential-adapter(width=2, standard_deviation=0.1)",
    "prefix-tuning(length=2, width=4)",
    "prefix-tuning(length=3, reparameterize=false)",
    "prompt-tuning(length=2)",
    "bitfit(missing=add)",
    "freeze(layers=1, targets='ffn.*')",
    "full",
)


class Life(RuleBasedStateMachine):
    """A model and everything that can be done to it, in any order.

    ``outputs`` says what each attachment alone must give; ``live`` what is active.
    """

    architecture = "gpt2"

    def __init__(self) -> None:
        super().__init__()
        self.model = build(self.architecture)
        self.batch = ARCHITECTURES[self.architecture].batch(
            batch_size=2,
            padding="right",
            head=MODELS[self.architecture],  # type: ignore[arg-type]
        )
        self.bare, self.picture = output(self.model, self.batch), picture_of(self.model)
        self.tuned: deltune.Tuned | None = None
        self.outputs: dict[str, Tensor] = {}
        self.live: tuple[str, ...] = ()
        self.now = self.bare
        self.merged = False
        self.count = 0
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[str, Tensor] = {}

    @property
    def handle(self) -> deltune.Tuned:
        assert self.tuned is not None
        return self.tuned

    def became_live(self, *names: str) -> None:
        self.live = names
        self.now = output(self.model, self.batch)
        if len(names) == 1:
            self.outputs[names[0]] = self.now

    @initialize(piece=st.sampled_from(PIECES))
    def begin(self, piece: str) -> None:
        self.attach(piece)

    @rule(piece=st.sampled_from(PIECES))
    def attach(self, piece: str) -> None:
        if self.merged:
            with pytest.raises(StateError, match="unmerge"):
                self.handle.attach(piece, name="refused")
            return
        name = f"a{self.count}"
        self.count += 1
        torch.manual_seed(self.count)
        if self.tuned is None:
            self.tuned = deltune.attach(self.model, piece, name=name)
        else:
            self.tuned.attach(piece, name=name)
        self.became_live(name)
        if parse(piece).unchanged_at_start:
            assert torch.equal(self.now, self.bare)

    @precondition(lambda self: self.live and not self.merged)
    @rule()
    def train(self) -> None:
        others = {
            key: value.detach().clone()
            for name, attachment in self.handle.attachments.items()
            if name not in self.live
            for key, value in ((f"{name}.{key}", value) for key, value in attachment.parameters())
        }
        step(self.handle, self.batch)
        for name, attachment in self.handle.attachments.items():
            for key, value in attachment.parameters():
                assert torch.equal(value, others.get(f"{name}.{key}", value)), f"{name} is not live, but moved"
        if len(self.live) > 1:
            for name in self.live:  # each has changed; what it gives alone is to be seen again
                self.outputs.pop(name, None)
        self.became_live(*self.live)

    @precondition(lambda self: self.outputs and not self.merged)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.handle.attachments)), max_size=3, unique=True))
        selections = [set(self.handle.attachments[name].selection.values) for name in names]
        clash = len(set().union(*selections)) != sum(map(len, selections))
        if clash:
            with pytest.raises(StateError, match="cannot be active together"):
                self.handle.activate(*names)
            return
        self.handle.activate(*names)
        assert self.handle.active == tuple(names)
        found = output(self.model, self.batch)
        if not names:
            assert torch.equal(found, self.bare)
        if len(names) == 1 and names[0] in self.outputs:
            assert torch.equal(found, self.outputs[names[0]])
        self.became_live(*names)

    @precondition(lambda self: self.tuned is not None)
    @rule()
    def disable(self) -> None:
        if self.merged:
            with pytest.raises(StateError, match="unmerge"), self.handle.disabled():
                pass
            return
        with self.handle.disabled():
            assert torch.equal(output(self.model, self.batch), self.bare)
            assert_same_picture(picture_of(self.model), self.picture, but=("requires_grad", "attributes"))
        assert self.handle.active == self.live

    @precondition(lambda self: self.tuned is not None)
    @rule()
    def merge(self) -> None:
        attachments = [self.handle.attachments[name] for name in self.live]
        can = bool(attachments) and all(attachment.method.mergeable for attachment in attachments)
        if self.merged or not can:
            with pytest.raises(StateError):
                self.handle.merge()
            return
        changed = [
            {f"{site.part.module}.weight" for _, site, _ in attachment.sites} | set(attachment.selection.values)
            for attachment in attachments
        ]
        if len(set().union(*changed)) != sum(map(len, changed)):
            with pytest.raises(StateError, match="one after the other"):
                self.handle.merge()
            return
        self.handle.merge()
        self.merged = True
        merged = output(self.model, self.batch)
        assert (merged - self.now).abs().max() <= 1e-4 * float(self.now.abs().max())
        self.now = merged

    @precondition(lambda self: self.tuned is not None)
    @rule()
    def unmerge(self) -> None:
        if not self.merged:
            with pytest.raises(StateError, match="Nothing is merged"):
                self.handle.unmerge()
            return
        self.handle.unmerge()
        self.merged = False
        found = output(self.model, self.batch)
        if len(self.live) == 1:
            assert torch.equal(found, self.outputs[self.live[0]])
        self.became_live(*self.live)

    @precondition(lambda self: self.tuned is not None)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.handle.attachments)))
        path = Path(self.folder.name) / name
        if self.merged:
            with pytest.raises(StateError, match="unmerge"):
                self.handle.save(path, name)
            return
        self.handle.save(path, name)
        if name in self.outputs:
            self.saved[str(path)] = self.outputs[name]
        else:
            self.saved.pop(str(path), None)

    @precondition(lambda self: self.saved and not self.merged)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.saved)))
        name = f"a{self.count}"
        self.count += 1
        self.tuned = deltune.load(self.model, path, name=name)
        assert torch.equal(output(self.model, self.batch), self.saved[path])
        self.became_live(name)

    @precondition(lambda self: self.outputs)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.handle.attachments)))
        self.handle.detach(name)
        self.merged = False
        self.outputs.pop(name, None)
        self.live = tuple(other for other in self.live if other != name)
        if not self.handle.attachments:
            self.tuned, self.live = None, ()
        assert self.tuned is None or self.tuned.active == self.live
        self.became_live(*self.live)

    @precondition(lambda self: self.tuned is not None)
    @rule()
    def detach_all(self) -> None:
        self.handle.detach()
        self.tuned, self.outputs, self.live, self.merged = None, {}, (), False
        self.became_live()
        assert_same_picture(picture_of(self.model), self.picture)

    @invariant()
    def gives_what_it_gave(self) -> None:
        assert torch.equal(output(self.model, self.batch), self.now)
        assert (HANDLE in vars(self.model)) == (self.tuned is not None)
        if not self.live:
            assert torch.equal(self.now, self.bare)

    @invariant()
    def only_what_is_live_requires_a_gradient(self) -> None:
        if self.tuned is None or self.merged:
            return
        wanted = {id(value) for value in self.tuned.trainable_parameters()}
        assert {id(value) for value in self.model.parameters() if value.requires_grad} == wanted

    def teardown(self) -> None:
        if self.tuned is not None:
            self.tuned.detach()
        assert torch.equal(output(self.model, self.batch), self.bare)
        assert_same_picture(picture_of(self.model), self.picture)
        self.folder.cleanup()


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_operations_ends_in_the_bare_model(name: str) -> None:
    life = type("Life", (Life,), {"architecture": name})
    run_state_machine_as_test(life, settings=settings(SETTINGS, max_examples=6, stateful_step_count=15))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_orders_of_operations_end_in_the_bare_model(name: str) -> None:
    life = type("Life", (Life,), {"architecture": name})
    run_state_machine_as_test(
        life, settings=settings(SETTINGS, max_examples=60, stateful_step_count=40, derandomize=False)
    )
