"""UniPELT, against its fact sheet. 11 is also law 3 (``tests/laws``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError, StateError
from deltune.methods import parse
from deltune.methods.hybrid.gates import InputGate
from deltune.sites import GateForm
from tests.methods.common import attached, bits, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

SMALL = "unipelt(length=3, prefix_width=6, width=4, rank=2{})"


def filled(options: str = "", name: str = "bert", **model: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    """UniPELT in which every part changes something, and a batch."""
    tuned, batch = attached(name, SMALL.format(options), **model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in tuned.attachments["default"].form_parameters():
            if "linear" not in key and "rows" not in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return tuned, batch


def forms(tuned: deltune.Tuned) -> dict[str, Any]:
    return tuned.attachments["default"].forms


def gates(tuned: deltune.Tuned) -> dict[str, InputGate]:
    return {key: form for key, form in forms(tuned).items() if isinstance(form, InputGate)}


def set_gates(tuned: deltune.Tuned, part: int, value: float) -> None:
    """Let the gates of a part have this value for every row."""
    logit = torch.logit(torch.tensor(value, dtype=torch.float64))
    for key, gate in gates(tuned).items():
        if key.startswith(f"{part}."):
            torch.nn.init.zeros_(gate.linear.weight)
            torch.nn.init.constant_(gate.linear.bias, float(logit))


Gate = Callable[[str, Tensor], Tensor]


def naive(tuned: deltune.Tuned, batch: dict[str, Tensor], pooling: str = "mean", gated: bool = True) -> Tensor:
    """Logits of BERT with the three parts, written out: the equations of the paper, one after the other."""
    model, found = tuned.model, forms(tuned)
    bert, heads = model.bert, model.config.num_attention_heads
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    h = bert.embeddings(input_ids=ids, token_type_ids=batch.get("token_type_ids"))

    def gate(keys: tuple[str, ...], x: Tensor) -> Tensor | float:
        if not gated:
            return 1.0
        form = next(found[key] for key in keys if key in found)
        values = torch.sigmoid(x @ form.linear.weight[0] + form.linear.bias)
        real = mask if pooling == "mean" else torch.ones_like(mask)
        return (values.masked_fill(~real, 0).sum(1) / real.sum(1))[:, None, None]

    for number, layer in enumerate(bert.encoder.layer):
        attention, place = layer.attention.self, f"encoder.{number}"

        def projected(matrix: Any, role: str, h: Tensor = h, place: str = place) -> Tensor:
            y = matrix(h)
            form = found.get(f"2.{place}.{role}")
            if form is None:
                return y
            value = gate((f"2.{place}.{role}.gate", f"2.{place}.attention.projections.gate"), h)
            return y + value * form.scale * (h @ form.A.T @ form.B.T)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = (
            split(projected(getattr(attention, role), f"attention.{role}")) for role in ("query", "key", "value")
        )
        with torch.no_grad():
            keys, values = found[f"1.{place}.attention"]()
        value = gate((f"1.{place}.attention.gate",), h)
        scaled = value[..., None] if isinstance(value, Tensor) else value
        k = torch.cat([(scaled * keys).expand(len(ids), -1, -1, -1), k], dim=2)
        v = torch.cat([(scaled * values).expand(len(ids), -1, -1, -1), v], dim=2)
        visible = torch.cat([mask.new_ones(len(ids), keys.shape[1]), mask], dim=1)[:, None, None]
        logits = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf"))
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        a = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + h)
        s = layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(a))) + a
        z = layer.output.LayerNorm(s)
        adapter = found[f"0.{place}.ffn"]
        narrow = torch.relu(z @ adapter.down.weight.T + adapter.down.bias)
        change = narrow @ adapter.up.weight.T + adapter.up.bias
        h = layer.output.LayerNorm(s + gate((f"0.{place}.ffn.gate",), z) * change)
    return model.classifier(bert.pooler(h))


@pytest.mark.parametrize("options", ["", ", separate_gates=true", ", pooling=all", ", variant=ap", ", gates=none"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_invariant_01_the_official_form(options: str, padding: Any) -> None:
    tuned, _ = filled(options, dtype=torch.float64)
    batch = ARCHITECTURES["bert"].batch(padding=padding)
    pooling = "all" if "all" in options else "mean"
    with torch.no_grad(), tuned.disabled():  # so that its modules are the bare ones
        expected, bare = naive(tuned, batch, pooling, gated="none" not in options), output(tuned.model, batch)
    assert relative_error(output(tuned.model, batch), expected) < 1e-12
    assert relative_error(expected, bare) > 1e-2


def test_invariant_02_gates_are_between_0_and_1_and_one_for_each_row() -> None:
    tuned, batch = filled()
    seen: list[Tensor] = []
    handles = [gate.register_forward_hook(lambda *call: seen.append(call[2])) for gate in gates(tuned).values()]
    output(tuned.model, batch)
    for handle in handles:
        handle.remove()
    rows = len(batch["input_ids"])
    assert len(seen) == 3 * 4  # in each layer one for the adapter, one for the prefix, one asked by two matrices
    for value in seen:
        assert value.shape == (rows, 1, 1)
        assert ((value > 0) & (value < 1)).all()
        assert value.flatten().unique().numel() == rows


def without(tuned: deltune.Tuned, part: int) -> Tensor:
    """Logits with one part taken out, of the written-out model."""
    batch = ARCHITECTURES["bert"].batch()
    kept = {key: value.clone() for key, value in _changed(tuned, part)}
    with torch.no_grad():
        for _, value in _changed(tuned, part):
            value.zero_()
        with tuned.disabled():
            result = naive(tuned, batch)
        for key, value in _changed(tuned, part):
            value.copy_(kept[key])
    return result


def _changed(tuned: deltune.Tuned, part: int) -> list[tuple[str, Tensor]]:
    names = {0: ("up.weight", "up.bias"), 2: ("B",)}[part]
    return [
        (key, value)
        for key, value in tuned.attachments["default"].form_parameters()
        if key.startswith(f"{part}.") and key.endswith(names)
    ]


@pytest.mark.parametrize("part", [0, 2])
def test_invariants_03_04_a_gate_of_zero_takes_the_part_out(part: int) -> None:
    tuned, batch = filled(dtype=torch.float64)
    for key, gate in gates(tuned).items():
        if key.startswith(f"{part}."):
            torch.nn.init.zeros_(gate.linear.weight)
            torch.nn.init.constant_(gate.linear.bias, -60.0)
    assert relative_error(output(tuned.model, batch), without(tuned, part)) < 1e-9


def test_invariant_04_a_constant_gate_is_loras_scale() -> None:
    gated, batch = filled(dtype=torch.float64)
    plain, _ = filled(", gates=none, alpha=0.6", dtype=torch.float64)  # 0.6 / 2 = 0.3
    for key, form in forms(plain).items():
        form.load_state_dict(forms(gated)[key].state_dict())
    set_gates(gated, 2, 0.3)
    for part in (0, 1):
        for key, gate in gates(gated).items():
            if key.startswith(f"{part}."):
                torch.nn.init.zeros_(gate.linear.weight)
                torch.nn.init.constant_(gate.linear.bias, 60.0)
    assert relative_error(output(gated.model, batch), output(plain.model, batch)) < 1e-12


def test_invariant_05_a_prefix_times_zero_still_takes_its_share() -> None:
    tuned, batch = filled(", variant=ap", dtype=torch.float64)
    for gate in gates(tuned).values():
        torch.nn.init.zeros_(gate.linear.weight)
        torch.nn.init.constant_(gate.linear.bias, -60.0)
    with tuned.disabled():
        bare = output(tuned.model, batch)
    assert float((output(tuned.model, batch) - bare).abs().max()) > 1e-4
    plain, _ = filled(", variant=ap, gates=none", dtype=torch.float64)
    for key, form in forms(plain).items():
        form.load_state_dict(forms(tuned)[key].state_dict())
    for gate in gates(tuned).values():
        torch.nn.init.constant_(gate.linear.bias, 60.0)
    assert relative_error(output(tuned.model, batch), output(plain.model, batch)) < 1e-12


def test_invariant_06_what_gates_read() -> None:
    """A change of the feed-forward result reaches the adapter's gate of the layer, and not those of its attention."""
    tuned, batch = filled()
    found: dict[str, Tensor] = {}
    for key, gate in gates(tuned).items():
        gate.register_forward_hook(lambda module, args, value, key=key: found.update({key: value.clone()}))
    output(tuned.model, batch)
    before = dict(found)
    layer = tuned.model.bert.encoder.layer[0]
    handle = layer.output.dense.register_forward_hook(lambda module, args, result: result + 1.0 * args[0][..., :1])
    output(tuned.model, batch)
    handle.remove()
    assert not torch.equal(found["0.encoder.0.ffn.gate"], before["0.encoder.0.ffn.gate"])
    for key in ("1.encoder.0.attention.gate", "2.encoder.0.attention.projections.gate"):
        assert torch.equal(found[key], before[key])
        above = key.replace("encoder.0", "encoder.1")
        assert not torch.equal(found[above], before[above])


@pytest.mark.parametrize(("pooling", "changes"), [("all", True), ("mean", False), ("auto", False)])
def test_invariant_07_padding(pooling: str, changes: bool) -> None:
    tuned, batch = filled(f", pooling={pooling}")
    plain = output(tuned.model, batch)
    count = 4
    padded = {
        key: torch.cat([value, value.new_zeros(len(value), count)], dim=1)
        for key, value in {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}.items()
        if value.dim() == 2
    }
    difference = relative_error(output(tuned.model, padded), plain)
    assert difference > 1e-3 if changes else difference < 1e-5


def test_invariant_08_without_gates_it_is_the_sum_of_its_parts() -> None:
    tuned, batch = filled(", gates=none")
    text = "pfeiffer-adapter(width=4) + prefix-tuning(length=3, width=6) + lora(rank=2, alpha=16)"
    other, _ = attached("bert", text)
    assert forms(other).keys() == forms(tuned).keys()
    for key, form in forms(other).items():
        form.load_state_dict(forms(tuned)[key].state_dict())
    assert torch.equal(output(tuned.model, batch), output(other.model, batch))


@pytest.mark.parametrize(
    ("model", "options", "count"),
    [
        (BERT_BASE, "", 1_401_444),
        (BERT_BASE, ", separate_gates=true", 1_410_672),
        (BERT_BASE, ", variant=ap", 1_097_304),
        (LLAMA, "width=48", 2_305_530),
        (LLAMA, "width=48, separate_gates=true", 2_322_840),
        (LLAMA, "width=48, variant=ap", 1_827_420),
    ],
)
def test_invariant_09_counts(model: Any, options: str, count: int) -> None:
    separator = ", " if options and not options.startswith(",") else ""
    assert model.count(f"unipelt(reparameterize=false{separator}{options})") == count


def test_invariant_10_values_of_a_central_gate_are_1_in_sum() -> None:
    tuned, batch = filled(", gates=central")
    central = [form for key, form in forms(tuned).items() if key.startswith("1.encoder") and isinstance(form, GateForm)]
    seen: list[Tensor] = []
    for form in central:
        form.register_forward_hook(lambda *call: seen.append(call[2]))
    output(tuned.model, batch)
    assert len(seen) == len(central) == 3
    for value in seen:
        assert value.shape == (len(batch["input_ids"]), 1, 2)
        torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:2]))
        assert float(value.std()) > 0


@pytest.mark.parametrize("options", ["", ", gates=central", ", separate_gates=true"])
def test_invariant_11_only_its_own_parameters_move(options: str) -> None:
    tuned, batch = filled(options)
    with tuned.disabled():
        before = bits(tuned.model)
    values = {key: value.clone() for key, value in tuned.named_trainable_parameters()}
    train(tuned, batch)
    for key, value in tuned.named_trainable_parameters():
        assert not torch.equal(value, values[key]), key
    with tuned.disabled():
        after = bits(tuned.model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("options", ["", ", gates=central"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_knows_of_padding(options: str, reentrant: bool) -> None:
    """Gates are asked again where layers are computed again, with the same padding."""
    tuned, _ = filled(options, dtype=torch.float64)
    batch = ARCHITECTURES["bert"].batch(padding="right")

    def gradients() -> list[Tensor]:
        tuned.model.zero_grad()
        loss_of(tuned.model.train(), batch).backward()
        return [parameter.grad.clone() for parameter in tuned.trainable_parameters()]

    plain = gradients()
    tuned.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one, other in zip(gradients(), plain, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("options", ["", ", variant=ap", ", gates=none"])
def test_invariant_12_it_cannot_be_merged(options: str) -> None:
    tuned, _ = filled(options)
    with pytest.raises(StateError, match="cannot be merged"):
        tuned.merge()


def test_gated_lora_alone_cannot_be_merged() -> None:
    tuned, _ = attached("bert", "gated(lora(rank=2), lora(rank=2, targets=ffn.up))")
    with pytest.raises(StateError, match="cannot be merged"):
        tuned.merge()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gates=none, pooling=mean", "neither pooling nor separate_gates"),
        ("variant=ap, gates=central", "no LoRA"),
        ("variant=ap, alpha=3", "no LoRA"),
        ("variant=lap", "apl"),
    ],
)
def test_options_that_nothing_reads_are_refused(options: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        parse(f"unipelt({options})").stored({})


def test_gate_values_by_place_and_part() -> None:
    tuned, batch = filled()
    values = deltune.gate_values(tuned, [batch, batch])
    assert set(values) == {
        f"encoder.{layer}.{part}"
        for layer in range(3)
        for part in ("pfeiffer-adapter ffn", "prefix-tuning attention", "lora attention.projections")
    }
    for one, other in values.values():
        assert one == other
        assert 0 < one < 1
    set_gates(tuned, 1, 0.25)
    values = deltune.gate_values(tuned, [batch])
    assert values["encoder.1.prefix-tuning attention"] == pytest.approx([0.25])
    central, batch = filled(", gates=central")
    shares = deltune.gate_values(central, [batch])
    assert shares["encoder.0.lora"][0] + shares["encoder.0.prefix-tuning"][0] == pytest.approx(1)
    twice, batch = attached("bert", "gated(lora(rank=2), lora(rank=3, targets='attention.* classifier'))")
    assert {"encoder.0.lora 1 attention.projections", "lora 2 classifier"} <= set(deltune.gate_values(twice, [batch]))
    assert all(len(found) == 1 for found in deltune.gate_values(twice, [batch]).values())
    sums, batch = attached("bert", "gated(lora(rank=2)) + gated(lora(rank=3))")
    assert "encoder.0.lora attention.projections (1.0.encoder.0.attention.projections.gate)" in deltune.gate_values(
        sums, [batch]
    )
    with pytest.raises(StateError, match="Nothing is attached under the name 'other'"):
        deltune.gate_values(tuned, [batch], name="other")
    with tuned.routed(["default"]), pytest.raises(StateError, match="whole batches"):
        deltune.gate_values(tuned, [batch])
    with pytest.raises(StateError, match="no gates"):
        deltune.gate_values(attached("bert", "lora(rank=2)")[0], [batch])
    with pytest.raises(StateError, match="No batch"):
        deltune.gate_values(tuned, [])
