"""Ladder side-tuning, against its fact sheet: the side network. Pruning and Fisher information are in
test_structural_pruning.py, generation with a cache is in test_ladder_generation.py.

In tests/laws, over every architecture that has a side network: the backbone keeps its bits and has no gradient (2,
test_unchanged), cached generation gives the same tokens as uncached (12, test_batches), files, threads, checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

import deltune
from deltune.errors import StateError, TargetError
from deltune.measure import SavedTensors
from deltune.methods.additive.side_network import SideNetwork
from tests.methods.common import attached, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA, Published
from tests.zoo import ARCHITECTURES

SMALL = "ladder-side-tuning(reduction=2)"
#: Every architecture that has side networks.
SUPPORTED = [name for name in ARCHITECTURES if name not in ("albert", "deberta-v2", "blip", "blip-caption")]


def networks_of(tuned: deltune.Tuned) -> dict[str, SideNetwork]:
    forms = tuned.attachments["default"].forms
    return {key: form for key, form in forms.items() if isinstance(form, SideNetwork)}


def network_of(tuned: deltune.Tuned) -> SideNetwork:
    (network,) = networks_of(tuned).values()
    return network


def scrambled(tuned: deltune.Tuned) -> deltune.Tuned:
    """Random gates, so that both of their sides matter."""
    with torch.no_grad():
        for network in networks_of(tuned).values():
            network.gates.copy_(torch.randn(network.gates.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    return tuned


def reference(network: SideNetwork, hidden: tuple[Tensor, ...], temperature: float = 0.1) -> Tensor:
    """The equations for BERT without padding, by the states of a bare model."""
    side = hidden[0] @ network.downs[0].weight.T + network.downs[0].bias
    for place, index in enumerate(network.kept):
        down: Any = network.downs[place + 1]
        share = 1 / (1 + torch.exp(-network.gates[index] / temperature))
        mixed = share * side + (1 - share) * (hidden[index + 1] @ down.weight.T + down.bias)
        side = network.blocks[place](mixed)
    assert network.up is not None
    return side @ network.up.weight.T + network.up.bias


@pytest.mark.parametrize("kept", ["", " layers=0,2", " layers=1"])
def test_the_equations_against_a_bare_model(kept: str) -> None:
    tuned, batch = attached(
        "bert", f"ladder-side-tuning(reduction=4, targets='layer{kept}')", "base", dtype=torch.float64
    )
    scrambled(tuned)
    with torch.no_grad():
        hidden = build("bert", "base", dtype=torch.float64)(**batch, output_hidden_states=True).hidden_states
        expected = reference(network_of(tuned), hidden)
    assert relative_error(output(tuned.model, batch), expected) < 1e-12


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_side_network_as_wide_as_the_model_is_the_model(name: str) -> None:
    """With r = 1, D_0 and U the identity, all gates on the side term: masks, positions, biases, norms are right."""
    architecture = ARCHITECTURES[name]
    for padding in ("none", "right") if architecture.pads else ("none",):
        head = "language" if architecture.generates else architecture.heads[0]
        model = architecture.build(head, dtype=torch.float64)
        batch = architecture.batch(head=head, padding=padding)  # type: ignore[arg-type]
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        with torch.no_grad():
            expected = architecture.output(model(**batch))
        tuned = deltune.attach(model, "ladder-side-tuning(reduction=1)", train_head=False)
        for network in networks_of(tuned).values():
            with torch.no_grad():
                network.gates.fill_(1e3)
                for linear in (network.downs[0], network.up):
                    if isinstance(linear, nn.Linear):
                        nn.init.eye_(linear.weight)
                        nn.init.zeros_(linear.bias)
        with torch.no_grad():
            found = architecture.output(model(**batch))
        # rotary tables and norms of some files are float32 whatever the model is
        assert relative_error(found, expected) < 1e-6, padding


def test_invariant_01_states_have_no_graph_even_where_the_backbone_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch = attached("bert", SMALL)
    seen: list[Tensor] = []
    original = SideNetwork.forward

    def spy(self: SideNetwork, states: Any) -> Tensor:
        seen.extend([*states.hidden, states.final])
        return original(self, states)

    monkeypatch.setattr(SideNetwork, "forward", spy)
    tuned.model.bert.requires_grad_(True)
    loss_of(tuned.model, batch).backward()
    assert len(seen) == 5
    assert all(state.grad_fn is None and not state.requires_grad for state in seen)
    layers = [tuned.model.get_submodule(name) for name in tuned.anatomy.stacks["encoder"].layers]
    assert all(value.grad is None for layer in layers for value in layer.parameters())


def bert(width: int, heads: int = 12, **options: Any) -> Any:
    """A short BERT in training mode; without dropout unless it is asked for."""
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=4,
        vocab_size=500,
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options},
    )
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False).train()


def saved_by(model: Any, **batch: Tensor) -> SavedTensors:
    with SavedTensors(besides=list(model.parameters())) as saved:
        result = model(**batch)
    assert result[0].requires_grad
    return saved


IDS = torch.randint(5, 500, (4, 48), generator=torch.Generator().manual_seed(0))


def test_invariant_01_what_is_kept_does_not_grow_with_the_width() -> None:
    """Beside the states that D_0 ... D_4 read, not a byte depends on d."""
    sizes = []
    for width in (192, 384):
        model = bert(width)
        deltune.attach(model, f"ladder-side-tuning(reduction={width // 24}, initialization=random)")
        sizes.append(saved_by(model, input_ids=IDS).bytes)
    assert sizes[1] - sizes[0] == 5 * IDS.numel() * (384 - 192) * 4


def test_invariant_01_nothing_inside_the_backbone_is_kept() -> None:
    """Of all that its modules give, only the embedding output and the layers' outputs are."""
    model = bert(192)
    tuned = deltune.attach(model, "ladder-side-tuning(initialization=random)")
    outputs: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            outputs.setdefault(name, []).append(result if isinstance(result, Tensor) else result[0])

        return hook

    layers = tuned.anatomy.stacks["encoder"].layers
    for name, module in model.named_modules():
        if name.startswith(("embeddings", "encoder.layer.")):
            module.register_forward_hook(note(name))
    saved = saved_by(model, input_ids=IDS)
    allowed = {
        results[0].untyped_storage().data_ptr() for name, results in outputs.items() if name in (*layers, "embeddings")
    }
    assert len(allowed) == 5
    for name, results in outputs.items():
        for result in results:
            inside = result.untyped_storage().data_ptr() not in allowed
            assert saved.holds(result) != inside, name
    assert len(outputs) > 50


def test_invariant_02_the_backbone_keeps_its_bits() -> None:
    tuned, batch = attached("t5", SMALL)
    fresh = dict(build("t5").named_parameters())
    train(tuned, batch)
    for name, value in fresh.items():
        now = tuned.model.get_parameter(name)
        assert torch.equal(now, value)
        assert now.grad is None
    for name, value in tuned.named_trainable_parameters():
        assert value.grad is not None, name


def test_invariant_03_gates() -> None:
    network = network_of(attached("bert", SMALL)[0])
    assert network.gate(1) == 0.5
    with torch.no_grad():
        network.gates[1] = 1.0
    assert abs(float(network.gate(1)) - 0.9999546) < 1e-7
    assert network.gate(0) == 0.5


def test_invariant_03_a_greater_alpha_is_more_of_the_side_state() -> None:
    tuned, batch = attached("bert", SMALL, "base", dtype=torch.float64)
    network = network_of(tuned)

    def effect(alpha: float) -> float:
        """How much the output depends on D_1 ... D_3."""
        with torch.no_grad():
            network.gates.fill_(alpha)
            before = output(tuned.model, batch)
            for down in network.downs[1:]:  # type: ignore[attr-defined]
                down.bias.add_(1e-3)
            after = output(tuned.model, batch)
            for down in network.downs[1:]:  # type: ignore[attr-defined]
                down.bias.sub_(1e-3)
        return float((after - before).abs().max())

    effects = [effect(alpha) for alpha in (0.0, 0.1, 0.3, 1.0)]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] > 10 * effects[-1]


def test_invariant_04_with_the_gates_on_the_side_term_downs_do_not_matter() -> None:
    tuned, batch = attached("bert", SMALL, "base", dtype=torch.float64)
    network = network_of(tuned)
    with torch.no_grad():
        network.gates.fill_(2.0)  # alpha / T = 20
    before = output(tuned.model, batch)
    with torch.no_grad():
        for down in network.downs[1:]:  # type: ignore[attr-defined]
            down.weight.normal_()
    assert 0 < (output(tuned.model, batch) - before).abs().max() < 1e-6
    with torch.no_grad():
        network.downs[0].weight.normal_()
    assert (output(tuned.model, batch) - before).abs().max() > 1e-2


def test_invariant_05_layers_that_are_not_kept_have_nothing() -> None:
    whole, batch = attached("bert", SMALL, "base")
    scrambled(whole)
    part, _ = attached("bert", "ladder-side-tuning(reduction=2, targets='layer layers=0,2')", "base")
    network, source = network_of(part), network_of(whole)
    assert network.kept == (0, 2)
    assert (len(network.blocks), len(network.downs)) == (2, 3)
    with torch.no_grad():
        network.gates.copy_(source.gates)
        for target, place in ((0, 0), (1, 1), (2, 3)):
            network.downs[target].load_state_dict(source.downs[place].state_dict())
        for target, place in ((0, 0), (1, 2)):
            network.blocks[target].load_state_dict(source.blocks[place].state_dict())
        network.up.load_state_dict(source.up.state_dict())  # type: ignore[union-attr]
    # the whole network without its middle: no block, no down, no gate
    source.kept = (0, 2)
    del source.blocks[1], source.downs[2]
    assert torch.equal(output(part.model, batch), output(whole.model, batch))
    loss_of(part.model, batch).backward()
    assert network.gates.grad is not None
    assert network.gates.grad[1] == 0
    assert (network.gates.grad[[0, 2]] != 0).all()


def test_invariant_06_counts() -> None:
    assert BERT_BASE.count("ladder-side-tuning") == 2_376_300
    assert LLAMA.count("ladder-side-tuning") == 2_993_214
    t5_base = Published(T5ForConditionalGeneration, T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    count = t5_base.count("ladder-side-tuning(targets='layer layers=1,2,3,5,6,7,9,10,11')")
    assert count == 3_878_712
    assert f"{count / sum(value.numel() for value in t5_base.model().parameters()):.2%}" == "1.74%"


def test_invariant_06_blocks_shrink_with_the_square() -> None:
    model = BERT_BASE.model()
    blocks = {}
    for reduction in (1, 8):
        total = BERT_BASE.count(f"ladder-side-tuning(reduction={reduction})")
        width = 768 // reduction
        blocks[reduction] = total - 13 * (768 * width + width) - (width * 768 + 768) - 12
    assert blocks[1] == sum(value.numel() for value in model.bert.encoder.parameters())
    assert blocks[8] == 1_342_080


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5", "bart"])
def test_invariant_07_the_frozen_head_reads_the_side_network(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    model = tuned.model
    last: list[Tensor] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: last.append(args[0].detach()))
    logits = output(model, batch)
    assert logits.shape == output(build(name), batch).shape
    assert last[0].shape[-1] == 32
    assert not any(value.requires_grad for value in head.parameters())
    assert not model.get_input_embeddings().weight.requires_grad
    stack = tuned.anatomy.stacks["decoder"]
    final = [form for key, form in networks_of(tuned).items() if key == "decoder.states"]
    assert len(final) == 1
    assert final[0].up is not None
    assert len(final[0].blocks) == len(stack)


def test_the_encoders_side_network_feeds_that_of_the_decoder() -> None:
    tuned, batch = attached("t5", SMALL)
    networks = networks_of(tuned)
    encoder, decoder = networks["encoder.states"], networks["decoder.states"]
    assert encoder.up is None
    assert (encoder.appended, decoder.beside) == (16, 16)
    before = output(tuned.model, batch)
    with torch.no_grad():
        encoder.downs[1].bias.add_(1.0)
    assert relative_error(output(tuned.model, batch), before) > 1e-3
    # the frozen decoder still reads the frozen encoder
    read: list[Tensor] = []
    layer = tuned.model.get_submodule("decoder.block.0.layer.1.EncDecAttention.k")
    layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    output(tuned.model, batch)
    with torch.no_grad():
        bare = build("t5").encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert torch.equal(read[0], bare)


LENGTH = {"bert": 64, "t5": 48}


def sequence_classifier() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, vocab_size=500))
    ids = torch.randint(5, 500, (4, LENGTH["bert"]))
    return model.train(), {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}


def text_to_text() -> tuple[Any, dict[str, Tensor]]:
    """Of T5-base's shape, with fewer layers and words."""
    torch.manual_seed(0)
    config = T5Config(d_model=768, d_ff=3072, num_layers=2, num_heads=12, vocab_size=500, decoder_start_token_id=0)
    ids = torch.randint(5, 500, (4, LENGTH["t5"]))
    return T5ForConditionalGeneration(config).train(), {"input_ids": ids, "labels": ids[:, :16].contiguous()}


@pytest.mark.parametrize("case", [sequence_classifier, text_to_text])
def test_invariant_11_less_is_kept_than_for_lora_with_as_many_parameters(
    case: Callable[[], tuple[Any, dict[str, Tensor]]],
) -> None:
    kept: dict[str, int] = {}
    counts: dict[str, int] = {}
    rank = 1
    for name in ("ladder", "lora-1", "lora", "full"):
        model, batch = case()
        methods = {
            "ladder": "ladder-side-tuning(initialization=random)",
            "lora-1": "lora(rank=1)",
            "lora": f"lora(rank={rank}, alpha={rank})",
            "full": "full",
        }
        tuned = deltune.attach(model, methods[name], train_head=False)
        counts[name] = tuned.summary().parameters
        if name == "lora-1":
            rank = round(counts["ladder"] / counts["lora-1"])
            continue
        with SavedTensors(besides=list(model.parameters())) as saved:
            model(**batch)
        kept[name] = saved.bytes
    assert abs(counts["lora"] / counts["ladder"] - 1) < 0.02
    assert kept["ladder"] < 0.6 * kept["lora"]
    assert kept["ladder"] < 0.4 * kept["full"]


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(
        TargetError, match=r"hidden size of bert, 32, cannot be divided by reduction=3\. .*: 1, 2, 4, 8\."
    ):
        attached("bert", "ladder-side-tuning(reduction=3)")
    # 8 features of a head are 4 rotated pairs, which an eighth of a head could not hold
    with pytest.raises(TargetError, match=r"rotated pairs in a head of llama, 4, cannot be divided by reduction=8"):
        attached("llama-gqa", "ladder-side-tuning(reduction=8)")
    with pytest.raises(TargetError, match=r"Reductions that fit this model: 1, 2\."):
        attached("qwen3", "ladder-side-tuning(reduction=4)")


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("albert", "layer", "layers of albert are shared: one runs 3 times"),
        ("deberta-v2", "layer", "do not keep the configuration"),
        ("blip", "layer stacks=text", r"role is not known \(crossattention.self.query"),
        ("blip-caption", "layer", "pass through other modules on their way"),
        ("t5", "layer stacks=decoder", "selected are layers of the decoder only"),
        ("bert", "ffn", "layer"),
    ],
)
def test_what_has_no_side_network_says_so(name: str, targets: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        deltune.attach(
            ARCHITECTURES[name].build(ARCHITECTURES[name].heads[-1]),
            deltune.LadderSideTuning(reduction=2, targets=targets),  # type: ignore[arg-type]
        )


def test_one_tower_of_a_model_that_has_two() -> None:
    tuned, batch = attached("blip", "ladder-side-tuning(reduction=2, targets='layer stacks=vision')", "base")
    assert list(networks_of(tuned)) == ["vision.states"]
    result = tuned.model(**batch)
    (result.vision_model_output.last_hidden_state.sum()).backward()
    assert all(value.grad is not None for value in tuned.trainable_parameters())


def test_encoder_states_from_before_are_refused() -> None:
    tuned, batch = attached("t5", SMALL)
    with tuned.disabled(), torch.no_grad():
        states = tuned.model.encoder(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(StateError, match="made without the side network"):
        tuned.model(encoder_outputs=states, decoder_input_ids=batch["decoder_input_ids"])
