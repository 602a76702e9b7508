"""Gated sums: what can be gated, what each gate does to a change, and gates of their own for tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import deltune
from deltune.errors import MethodError
from deltune.methods import Paper, Preset, Sum, parse
from deltune.methods.hybrid.gates import InputGate, ScalarGate
from tests.methods.common import attached, build, output, relative_error
from tests.zoo import ARCHITECTURES

#: One method of every mechanism that can be gated.
GATED = {
    "lora": "lora(rank=2)",
    "lora-decomposed": "lora(rank=2, weight_decomposed=true)",
    "krona-b": "krona-b",
    "fact": "fact(dropout=0)",
    "parallel-adapter": "parallel-adapter(width=4, dropout=0)",
    "parallel-adapter-heads": "parallel-adapter(width=4, dropout=0, targets=attention)",
    "sequential-adapter": "sequential-adapter(width=4, train_norms=false)",
    "pfeiffer-adapter": "pfeiffer-adapter(width=4)",
    "residual-adapter": "residual-adapter(width=4)",
    "prefix-tuning": "prefix-tuning(length=3, reparameterize=false)",
}
MODELS = ["bert", "llama-gqa", "t5"]


def filled(name: str, method: str, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    tuned, batch = attached(name, method, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in tuned.attachments["default"].form_parameters():
            if "gate" not in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return tuned, batch


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", GATED)
def test_open_gates_are_the_method_and_closed_ones_the_bare_model(method: str, name: str) -> None:
    """A prefix with keys of zero still takes its share of the softmax, so closed gates do not remove it."""
    gated, batch = filled(name, f"gated({GATED[method]})", dtype=torch.float64)
    plain = deltune.attach(build(name, dtype=torch.float64), GATED[method])
    own = plain.attachments["default"].forms
    for key, form in own.items():
        form.load_state_dict(gated.attachments["default"].forms[f"0.{key}"].state_dict())
    gates = [form for form in gated.attachments["default"].forms.values() if isinstance(form, InputGate)]
    assert gates
    for gate in gates:
        torch.nn.init.zeros_(gate.linear.weight)
        torch.nn.init.constant_(gate.linear.bias, 60.0)
    expected = output(plain.model, batch)
    # LLaMA's and T5's norms are float32 whatever the model is
    assert relative_error(output(gated.model, batch), expected) < (1e-12 if name == "bert" else 1e-6)
    with gated.disabled():
        bare = output(gated.model, batch)
    assert relative_error(expected, bare) > 1e-4
    for gate in gates:
        torch.nn.init.constant_(gate.linear.bias, -60.0)
    closed = relative_error(output(gated.model, batch), bare)
    assert closed > 1e-4 if method == "prefix-tuning" else closed < 1e-6


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "t5"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_prefix_with_a_gate_for_each_token(name: str, implementation: str, padding: Any) -> None:
    """Against attention written out: logits of prefix columns are G_t q k, their values G_t v."""
    tuned, _ = filled(name, f"gated({GATED['prefix-tuning']})", attn_implementation=implementation)
    batch = ARCHITECTURES[name].batch(padding=padding)
    if name == "llama-gqa":  # beside a prefix they are counted over real tokens
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    forms = tuned.attachments["default"].forms
    reference = build(name, attn_implementation="eager")
    reading: dict[str, Tensor] = {}
    places = {
        part.module: part.key for part in deltune.anatomy_of(reference).of("attention") if part.stack != "encoder"
    }

    def written_out(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        place = module.place
        keys, values = forms[f"0.{place}"]()
        gate = forms[f"0.{place}.gate"]
        h = reading[place]
        g = torch.sigmoid(h @ gate.linear.weight[0] + gate.linear.bias)[:, None, :, None]
        groups = query.shape[1] // key.shape[1]
        key, value, keys, values = (x.repeat_interleave(groups, -3) for x in (key, value, keys, values))
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        real = query @ key.transpose(2, 3) * scaling
        if options.get("position_bias") is not None:
            real = real + options["position_bias"]
        if mask is not None:
            real = real + mask
        logits = torch.cat([g * (query @ keys.transpose(1, 2)) * scaling, real], dim=-1)
        weights = logits.softmax(-1)
        count = keys.shape[1]
        mixed = g * (weights[..., :count] @ values) + weights[..., count:] @ value
        return mixed.transpose(1, 2), None

    AttentionInterface.register("written_out_for_a_test", written_out)
    for module_name, place in places.items():
        module = reference.get_submodule(module_name)
        module.place = place
        module.config = copy.copy(module.config)
        module.config.__dict__["_attn_implementation_internal"] = "written_out_for_a_test"
        module.register_forward_pre_hook(
            lambda m, args, kwargs, place=place: reading.update({place: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    if name == "t5":  # its encoder's gates are means
        kept = {key: form for key, form in forms.items() if "encoder" in key}
        for key, form in kept.items():
            if key.endswith("attention"):
                torch.nn.init.zeros_(form.values)
                form.keys.data.fill_(0)
        encoder = deltune.attach(
            reference, "prefix-tuning(length=3, reparameterize=false, targets='attention stacks=encoder')"
        )
        for form in encoder.attachments["default"].forms.values():
            torch.nn.init.zeros_(form.values)
            torch.nn.init.zeros_(form.keys)
    real = ARCHITECTURES[name].real(batch)
    assert relative_error(output(tuned.model, batch)[real], output(reference, batch)[real]) < 1e-5
    tuned.activate()
    assert relative_error(output(reference, batch)[real], output(tuned.model, batch)[real]) > 1e-2


def test_the_mask_of_deberta_and_one_for_all_rows() -> None:
    """DeBERTa hands its attention whole numbers, and a mask may have one row for the whole batch."""
    tuned, batch = filled("deberta-v2", "gated(lora(rank=2, targets=attention.value), pfeiffer-adapter(width=4))")
    plain = output(tuned.model, batch)
    extra = {
        key: torch.cat([value, value.new_zeros(len(value), 3)], dim=1)
        for key, value in {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}.items()
        if value.dim() == 2
    }
    assert relative_error(output(tuned.model, extra), plain) < 1e-5
    tuned, batch = filled("bert", "gated(lora(rank=2))")
    tuned.attach("gated(lora(rank=2))", name="other")
    rows = len(batch["input_ids"])
    batch["attention_mask"] = torch.ones(1, 1, batch["input_ids"].shape[1], batch["input_ids"].shape[1]).bool()
    alone = {}
    for name in ("default", "other"):
        tuned.activate(name)
        alone[name] = output(tuned.model, batch)
    route = [("other", "default")[row % 2] for row in range(rows)]
    with tuned.routed(route):
        together = output(tuned.model, batch)
    for row, name in enumerate(route):
        assert relative_error(together[row], alone[name][row]) < 1e-5


def test_scalar_gates_are_one_half_at_the_start_and_train() -> None:
    tuned, batch = filled("gpt2", "gated(lora(rank=2), parallel-adapter(width=4, dropout=0), gate=scalar)")
    gates = [form for form in tuned.attachments["default"].forms.values() if isinstance(form, ScalarGate)]
    assert len(gates) == 2 * len(tuned.anatomy.stacks["decoder"])
    with torch.no_grad():
        assert all(float(torch.sigmoid(gate.logit)) == 0.5 for gate in gates)
    output_of = tuned.model(**batch).logits
    (output_of * torch.randn(output_of.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert all(float(gate.logit.grad.abs()) > 0 for gate in gates)


@pytest.mark.parametrize(
    "text",
    [
        "gated(lora(rank=2), prefix-tuning)",
        "gated(lora, pfeiffer-adapter(width=4), gate=central, shared=false)",
        "gated(lora(targets='attention.query,attention.value'), gate=scalar)",
        "bitfit + gated(lora, prefix-tuning(length=3), pooling=token)",
        "gated(lora + krona-b, prefix-tuning)",
    ],
)
def test_as_text_and_as_a_dictionary(text: str) -> None:
    method = parse(text)
    assert parse(str(method)) == method == parse(method.to_dict())


def test_options_in_python_are_those_of_the_text() -> None:
    lora, prefix = deltune.LoRA(rank=2), deltune.PrefixTuning(length=3)
    method = deltune.gated(lora, prefix, gate="scalar", shared=False)
    assert method == parse("gated(lora(rank=2), prefix-tuning(length=3), gate=scalar, shared=false)")
    with pytest.raises(MethodError, match="needs methods"):
        deltune.gated()
    with pytest.raises(MethodError, match="gate"):
        deltune.gated(lora, gate="input x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bert", "gated(bitfit, lora)", "no gate can scale for each row"),
        ("bert", "gated(sequential-adapter, lora)", "no gate can scale for each row"),
        ("bert", "gated(fish-mask(ratio=0.3))", "cannot be gated"),
        ("bert", "gated(prompt-tuning(length=2), lora)", "cannot be gated"),
        ("gpt2", "gated(lora, pooling=mean)", "may not know of later ones"),
        ("llama-gqa", "gated(residual-adapter, lora, gate=central)", "behind everything that a central gate reads"),
        ("t5", "gated(lora, prefix-tuning, gate=central)", "reads the encoder"),
        ("bert", "gated(lora(targets=embeddings))", "cannot be gated"),
    ],
)
def test_what_cannot_be_gated_says_so_and_leaves_the_model_alone(name: str, text: str, message: str) -> None:
    model = build(name)
    keys = list(model.state_dict())
    with pytest.raises(MethodError, match=message):
        deltune.attach(model, text)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gated_sum_beside_what_cannot_be_gated() -> None:
    tuned, batch = attached("bert", "gated(lora(rank=2), pfeiffer-adapter(width=4)) + bitfit")
    assert "0.1.encoder.0.ffn.gate" in tuned.attachments["default"].forms
    for parameter in tuned.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert torch.isfinite(output(tuned.model, batch)).all()
    with pytest.raises(MethodError, match="at least two"):
        parse("sum(lora)")


def test_a_preset_inside_of_a_sum_is_saved_with_its_own_keys(tmp_path: Any) -> None:
    """Also one that is stored as the sum that it stands for."""

    @dataclass(frozen=True)
    class Pair(Preset):
        name: ClassVar[str] = "pair"
        branch: ClassVar[str] = "hybrid"
        paper: ClassVar[Paper] = Paper("", "", 2026)
        learning_rate: ClassVar[float] = 1e-3

        def definition(self) -> Sum:
            return deltune.LoRA(rank=2) + deltune.ParallelAdapter(width=4)

    method = Pair() + deltune.BitFit()
    assert str(deltune.LoRA() + (deltune.LoRA() + deltune.BitFit())) == "lora + lora + bitfit"
    tuned = deltune.attach(build("bert"), method)
    batch = ARCHITECTURES["bert"].batch()
    for parameter in tuned.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert"), tmp_path)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
