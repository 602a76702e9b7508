"""Where a prefix starts, and at which positions the text is then: prefix tuning from real words, from saved prefixes.

Numbers are the invariants of the fact sheet. That shifted positions keep every law (padding, caches, files, threads)
is tested in tests/laws, as ``prefix-tuning-shifted``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

import deltune
from deltune.errors import CheckpointError, MethodError, StateError, TargetError
from deltune.methods.additive.prefix_forms import Prefix, ReparameterizedPrefix, joined_prefixes
from deltune.sites.attention_positions import CountPositions
from tests.laws.gate_form import naive_attention
from tests.methods.common import attached, bits, build, output, relative_error, train
from tests.tasks.tiny import byte_tokenizer, word_tokenizer
from tests.zoo import ARCHITECTURES

TEXT, IDS = "film was very good", (7, 12, 14, 4)
FLAT = "prefix-tuning(length=3, reparameterize=false)"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def forms_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, Prefix | ReparameterizedPrefix]:
    """The prefixes of an attachment by key."""
    forms = tuned.attachments[name].forms
    return {key: form for key, form in forms.items() if isinstance(form, Prefix | ReparameterizedPrefix)}


@torch.no_grad()
def pairs_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """The keys and values that they make."""
    return {key: form() for key, form in forms_of(tuned, name).items()}


@contextmanager
def projected(model: nn.Module, paths: list[str], heads: int) -> Iterator[dict[str, list[Tensor]]]:
    """What linear maps make in each call, cut into heads, (K, T, D), where nothing is rotated afterwards."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, made, path=path: seen[path].append(made[0].unflatten(-1, (heads, -1)).transpose(0, 1))
        )
        for path in paths
    ]
    yield seen
    for handle in handles:
        handle.remove()


# -- real words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt_neox", "qwen3", "gemma2", "phi3"])
def test_text_starts_at_the_cache_of_the_frozen_model(name: str, words: str) -> None:
    """After rotation and normalisation of keys, and with the heads that keys have."""
    model = build(name, **({"attn_implementation": "eager"} if name == "gemma2" else {}))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([IDS]), past_key_values=cache)
    tuned = deltune.attach(model, deltune.PrefixTuning(reparameterize=False, start_text=TEXT, tokenizer=words))
    assert len(forms_of(tuned)) == 3
    for form, layer in zip(forms_of(tuned).values(), cache.layers, strict=True):
        assert torch.equal(form.keys, layer.keys[0])
        assert torch.equal(form.values, layer.values[0])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_text_is_read_by_encoder_and_decoder(name: str, words: str) -> None:
    """The decoder's and the cross-attention's start are the decoder's caches; the encoder's is of the text alone."""
    model = build(name)
    ids = torch.tensor([IDS])
    block = {"t5": "encoder.block.{}.layer.0.SelfAttention.{}", "bart": "model.encoder.layers.{}.self_attn.{}"}[name]
    maps = ("k", "v") if name == "t5" else ("k_proj", "v_proj")
    layers = 3 if name == "t5" else 2
    paths = [block.format(layer, matrix) for layer in range(layers) for matrix in maps]
    with projected(model, paths, heads=4) as encoder, torch.no_grad():
        cache = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    method = deltune.PTuningV2(dropout=0, start_text=TEXT, tokenizer=words)
    pairs = pairs_of(deltune.attach(model, method))
    assert {key.split(".")[0] for key in pairs} == {"encoder", "decoder", "cross"}
    for key, (keys, values) in pairs.items():
        stack, layer = key.split(".")[0], int(key.split(".")[1])
        if stack == "encoder":
            expected = [encoder[block.format(layer, matrix)][0] for matrix in maps]
        else:
            part = cache.self_attention_cache if stack == "decoder" else cache.cross_attention_cache
            expected = [part.layers[layer].keys[0], part.layers[layer].values[0]]
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])


@pytest.mark.parametrize(("name", "calls"), [("bert", 1), ("albert", 3)])
def test_text_in_encoders_and_in_a_layer_that_is_applied_several_times(name: str, calls: int, words: str) -> None:
    model = build(name)
    block = {
        "bert": "bert.encoder.layer.0.attention.self",
        "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
    }[name]
    paths = [f"{block}.key", f"{block}.value"]
    with projected(model, paths, heads=4) as seen, torch.no_grad():
        model(input_ids=torch.tensor([IDS]))
    tuned = deltune.attach(model, deltune.PrefixTuning(reparameterize=False, start_text=TEXT, tokenizer=words))
    form = next(iter(forms_of(tuned).values()))
    for path, parameter in zip(paths, (form.keys, form.values), strict=True):
        assert len(seen[path]) == calls
        assert torch.allclose(parameter, sum(seen[path][1:], seen[path][0]) / calls, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt_neox", "qwen2"])
def test_invariant_03_a_prefix_of_words_is_these_words(name: str, implementation: str, words: str) -> None:
    """With the text at position P, the frozen model on [w; x], at x."""
    model = build(name, attn_implementation=implementation)
    batch = ARCHITECTURES[name].batch(length=6)
    ids = torch.cat([torch.tensor([IDS]).expand(3, -1), batch["input_ids"]], dim=1)
    expected = output(model, {"input_ids": ids})[:, len(IDS) :]
    method = deltune.PrefixTuning(reparameterize=False, start_text=TEXT, tokenizer=words, shift_positions=True)
    deltune.attach(model, method)
    assert relative_error(output(model, batch), expected) < 1e-5
    assert relative_error(output(model, {"input_ids": batch["input_ids"]}), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_network_is_fitted_as_in_the_authors_code(name: str, words: str) -> None:
    """A twin with one last map for all layers: 500 steps of Adam at 1e-4 on the mean squared error, P' fixed."""
    model = build(name, dtype=torch.float64)
    torch.manual_seed(1)
    start = deltune.attach(model, f"prefix-tuning(length={len(IDS)}, width=6)")
    kinds = list(dict.fromkeys(key.split(".")[0] for key in start.attachments["default"].forms))
    twins = {}
    for kind in kinds:
        trunk = start.attachments["default"].forms[f"{kind}.prefix"]
        last = [form.linear for key, form in forms_of(start).items() if key.startswith(f"{kind}.")]
        joint = nn.Linear(6, sum(linear.out_features for linear in last), dtype=torch.float64)
        joint.weight.data = torch.cat([linear.weight.data for linear in last])
        joint.bias.data = torch.cat([linear.bias.data for linear in last])
        twins[kind] = (trunk.rows.detach().clone(), nn.Sequential(copy.deepcopy(trunk.linear), nn.Tanh(), joint))
    start.detach()
    exact = deltune.attach(model, deltune.PrefixTuning(reparameterize=False, start_text=TEXT, tokenizer=words))
    wanted = pairs_of(exact)
    exact.detach()
    torch.manual_seed(1)
    tuned = deltune.attach(model, deltune.PrefixTuning(width=6, start_text=TEXT, tokenizer=words))

    for kind, (rows, twin) in twins.items():
        pairs = [pair for key, pair in wanted.items() if key.startswith(f"{kind}.")]
        target = torch.stack([tensor for pair in pairs for tensor in pair])  # (2 L, K, P, D)

        def made(rows: Tensor, twin: nn.Sequential, target: Tensor) -> Tensor:
            both = twin(rows).view(len(IDS), target.shape[0], target.shape[1], target.shape[3])
            return both.permute(1, 2, 0, 3)

        before = (made(rows, twin, target) - target).detach().square().mean()
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-4)
        for _ in range(500):
            optimizer.zero_grad()
            nn.functional.mse_loss(made(rows, twin, target), target).backward()
            optimizer.step()
        after = made(rows, twin, target).detach()
        assert (after - target).square().mean() < before
        forms = tuned.attachments["default"].forms
        assert torch.equal(forms[f"{kind}.prefix"].rows, rows)
        ours = [tensor for key, pair in pairs_of(tuned).items() if key.startswith(f"{kind}.") for tensor in pair]
        assert torch.allclose(torch.stack(ours), after, atol=1e-9)


def test_a_network_in_half_precision_is_fitted_in_full(words: str) -> None:
    """Steps of 1e-4 are lost in bfloat16: the fit must come as near as in float32, but for one rounding."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("gpt2").to(dtype)
        method = deltune.PrefixTuning(width=6, start_text=TEXT, tokenizer=words)
        torch.manual_seed(1)
        tuned = deltune.attach(model, method)
        trunk = tuned.attachments["default"].forms["decoder.prefix"]
        assert trunk.linear.weight.dtype == dtype
        torch.manual_seed(1)
        tuned.attach(f"prefix-tuning(length={len(IDS)}, width=6)", name="random")
        random = tuned.attachments["random"].forms["decoder.prefix"].linear.weight
        made[dtype] = (trunk.linear.weight.float() - random.float()).abs().mean()
    assert made[torch.bfloat16] > 0.5 * made[torch.float32]


def test_reading_the_text_leaves_no_trace_and_ignores_what_is_live(words: str) -> None:
    model = build("gpt2").train()
    model.transformer.h[1].eval()
    method = deltune.PrefixTuning(reparameterize=False, start_text=TEXT, tokenizer=words)
    alone = pairs_of(deltune.attach(build("gpt2"), method))
    tuned = deltune.attach(model, "lora(rank=2) + prefix-tuning(length=3, width=6)", name="other")
    for _, parameter in tuned.named_trainable_parameters():
        parameter.data.add_(0.3)
    before, modes = bits(model), [module.training for module in model.modules()]
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    tuned.attach(method, name="prefix")
    for key, (keys, values) in pairs_of(tuned, "prefix").items():
        assert torch.equal(keys, alone[key][0])
        assert torch.equal(values, alone[key][1])
    tuned.detach("prefix")
    tuned.activate("other")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())
    assert not any("_deltune_record" in vars(module) for module in model.modules())
    tuned.detach()
    assert len(configs) == sum(hasattr(module, "config") for module in model.modules())
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_the_length_is_that_of_the_text(words: str, tmp_path: Path) -> None:
    tuned, batch = attached("gpt2", f"prefix-tuning(start_text='{TEXT}', tokenizer={words}, width=6)")
    assert {form.length for form in forms_of(tuned).values()} == {len(IDS)}
    train(tuned, batch)
    expected = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build("gpt2"), tmp_path)  # without a tokenizer
    assert str(loaded.attachments["default"].method) == "prefix-tuning(length=4, reparameterize=False, width=6)"
    assert torch.equal(output(loaded.model, batch), expected)
    for length in (10, 4):  # the default, and what it is
        deltune.attach(build("gpt2"), deltune.PrefixTuning(length, False, start_text=TEXT, tokenizer=words))
    with pytest.raises(MethodError, match=r"length is 5, but 'film was very good' is 4 tokens.*Use length=4"):
        deltune.attach(build("gpt2"), deltune.PrefixTuning(5, False, start_text=TEXT, tokenizer=words))
    with pytest.raises(MethodError, match="length is 10"):
        deltune.attach(build("gpt2"), deltune.PTuningV2(10, start_text=TEXT, tokenizer=words))


def test_the_tokenizer_is_that_of_the_models_folder(words: str) -> None:
    model = build("gpt2")
    with pytest.raises(MethodError, match=r"start_text needs.*not loaded from a folder.*tokenizer=FOLDER"):
        deltune.attach(model, deltune.PrefixTuning(start_text=TEXT))
    model.config._name_or_path = words
    assert len(forms_of(deltune.attach(model, deltune.PrefixTuning(start_text=TEXT, width=6)))) == 3


def test_what_no_text_can_start_says_so(words: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"start_text needs.*none that can be read.*tokenizer=FOLDER"):
        deltune.attach(build("gpt2"), deltune.PrefixTuning(start_text=TEXT, tokenizer=str(tmp_path / "absent")))
    with pytest.raises(MethodError, match=r"no tokens of ' '"):
        deltune.attach(build("gpt2"), deltune.PrefixTuning(start_text=" ", tokenizer=words))
    byte_tokenizer().save_pretrained(tmp_path)  # 261 tokens, the models embed 100
    with pytest.raises(MethodError, match="tokenizer of another model"):
        deltune.attach(build("gpt2"), deltune.PrefixTuning(start_text="é", tokenizer=str(tmp_path)))
    for name in ("vit", "whisper"):
        with pytest.raises(TargetError, match="does not read text alone"):
            deltune.attach(build(name), deltune.PrefixTuning(start_text=TEXT, tokenizer=words))
    model = build("bert")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(StateError, match=r"flex_attention.*sdpa"):
        deltune.attach(model, deltune.PrefixTuning(start_text=TEXT, tokenizer=words))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("start_text=film, start_from=folder", "one thing, not from start_text and start_from"),
        ("start_text=film, initialization=trained", "not from start_text and initialization=trained"),
        ("initialization=text", "initialization=text needs the option start_text"),
        ("initialization=trained", "initialization=trained needs the option start_from"),
        ("tokenizer=folder", "tokenizer is read for start_text only"),
        ("initialization=zeros", "cannot be 'zeros'"),
    ],
)
@pytest.mark.parametrize("method", ["prefix-tuning", "p-tuning-v2"])
def test_options_that_contradict_each_other(method: str, options: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        deltune.attach(build("gpt2"), f"{method}({options})")


# -- saved prefixes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained flat prefix of GPT-2."""
    tuned, batch = attached("gpt2", "prefix-tuning(length=3, width=6)")
    train(tuned, batch)
    return tuned.save(tmp_path_factory.mktemp("saved"))


def test_a_saved_prefix_is_the_start_of_another(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "delta.safetensors")
    for method in (deltune.PTuningV2(start_from=str(saved)), deltune.PrefixTuning(3, False, start_from=str(saved))):
        tuned = deltune.attach(build("gpt2"), method)
        for key, form in forms_of(tuned).items():
            assert torch.equal(form.keys, tensors[f"{key}.keys"])
            assert torch.equal(form.values, tensors[f"{key}.values"])
        tuned.save(tmp_path)
        assert "start_from" not in str(deltune.load(build("gpt2"), tmp_path).attachments["default"].method)


def test_a_network_starts_at_a_saved_prefix_exactly(saved: Path) -> None:
    tensors = load_file(saved / "delta.safetensors")
    model = build("gpt2", dtype=torch.float64)
    torch.manual_seed(1)
    tuned = deltune.attach(model, f"prefix-tuning(width=6, start_from={saved})")
    for key, (keys, values) in pairs_of(tuned).items():
        assert torch.allclose(keys, tensors[f"{key}.keys"].double(), atol=1e-12)
        assert torch.allclose(values, tensors[f"{key}.values"].double(), atol=1e-12)
    # of all maps that do, the nearest: the change has nothing outside of what the hidden rows span
    forms = tuned.attachments["default"].forms
    hidden = forms["decoder.prefix"]().detach()
    torch.manual_seed(1)
    tuned.attach("prefix-tuning(length=3, width=6)", name="random")
    free = torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(hidden) @ hidden
    for key, form in forms_of(tuned).items():
        change = form.linear.weight - forms_of(tuned, "random")[key].linear.weight
        assert (change @ free).abs().max() < 1e-12 < change.abs().max()
    with pytest.raises(MethodError, match=r"width 2 cannot start at a given prefix of length 3. Use width=3"):
        deltune.attach(build("gpt2"), f"prefix-tuning(width=2, start_from={saved})")


def test_saved_prefixes_that_do_not_fit(saved: Path, tmp_path: Path) -> None:
    start = f"start_from={saved}"
    with pytest.raises(MethodError, match=r"length is 7, but .* has 3.*Use length=3"):
        deltune.attach(build("gpt2"), f"p-tuning-v2(length=7, {start})")
    with pytest.raises(CheckpointError, match=r"trained with shift_positions=false.*Set the same"):
        deltune.attach(build("gpt2"), f"p-tuning-v2({start}, shift_positions=true)")
    with pytest.raises(CheckpointError, match="trained on another model"):
        deltune.attach(build("gpt2", seed=5), f"p-tuning-v2({start})")
    with pytest.raises(CheckpointError, match=r"no prefix for encoder.0.attention.*method is prefix-tuning"):
        deltune.attach(build("bert"), f"p-tuning-v2({start})")
    attached("gpt2", "lora(rank=2)")[0].save(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"no prefix for decoder.0.attention.*method is lora"):
        deltune.attach(build("gpt2"), f"p-tuning-v2(start_from={tmp_path / 'lora'})")
    with pytest.raises(CheckpointError, match="does not exist"):
        deltune.attach(build("gpt2"), f"p-tuning-v2(start_from={tmp_path / 'absent'})")


def test_some_layers_can_start_from_a_prefix_of_all(saved: Path) -> None:
    tensors = load_file(saved / "delta.safetensors")
    tuned = deltune.attach(build("gpt2"), f"p-tuning-v2(start_from={saved}, targets='attention layers=1:')")
    assert list(forms_of(tuned)) == ["decoder.1.attention", "decoder.2.attention"]
    assert torch.equal(forms_of(tuned)["decoder.2.attention"].keys, tensors["decoder.2.attention.keys"])


# -- positions -----------------------------------------------------------------------------------------------


def usual_positions(name: str, batch: dict[str, Tensor]) -> Tensor:
    """The positions that the text has without a shift, written out."""
    mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
    if name == "roberta":
        return mask.cumsum(1) * mask + 1
    if "position_ids" in batch or name in ("llama-gqa", "gpt_neox", "modernbert"):
        return (mask.cumsum(1) - 1).clamp(min=0)
    return torch.arange(length).expand(len(mask), -1)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "gpt_neox", "llama-gqa"])
def test_a_shift_moves_the_text_by_the_length_of_the_prefix(name: str, padding: str) -> None:
    """Against the same prefix with positions written out, and the naive attention."""
    kind = "language" if ARCHITECTURES[name].generates else "tokens"
    tuned, _ = attached(name, FLAT.replace(")", ", shift_positions=true)"), kind)
    batch = ARCHITECTURES[name].batch(padding=padding)  # type: ignore[arg-type]
    real = batch["attention_mask"].bool()
    shifted = output(tuned.model, batch)
    sites = tuned.attachments["default"].sites
    prefixes = {site.part.module: form() for _, site, form in sites if isinstance(form, Prefix)}
    positions = usual_positions(name, batch)

    def reference(offset: int) -> Tensor:
        model = build(name, kind, attn_implementation="eager")
        for key, value in tuned.attachments["default"].selection:
            model.get_parameter(key).data.copy_(value)
        with naive_attention(model, prefixes):
            return output(model, {**batch, "position_ids": positions + offset})

    expected = reference(3)
    assert relative_error(shifted[real], expected[real]) < 2e-5
    assert relative_error(reference(0)[real], expected[real]) > 1e-3


def test_the_shift_is_no_parameter_and_is_stored(tmp_path: Path) -> None:
    method = FLAT.replace(")", ", shift_positions=true)")
    tuned, batch = attached("llama-gqa", method)
    assert len(list(tuned.named_trainable_parameters())) == 6
    assert [row.parameters for row in tuned.summary().rows if row.site == "decoder.positions"] == [0]
    expected = output(tuned.model, batch)
    tuned.save(tmp_path)
    assert len(load_file(tmp_path / "delta.safetensors")) == 6
    assert torch.equal(output(deltune.load(build("llama-gqa"), tmp_path).model, batch), expected)
    with tuned.disabled():
        assert torch.equal(output(tuned.model, batch), output(build("llama-gqa"), batch))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5"])
def test_each_row_has_the_positions_of_its_own_attachment(name: str) -> None:
    flat = "prefix-tuning(length={}, reparameterize=false, targets='attention stacks=decoder'{})"
    tuned, batch = attached(name, flat.format(3, ", shift_positions=true"))
    tuned.attach(flat.format(5, ", shift_positions=true"), name="long")
    tuned.attach(flat.format(3, ""), name="unshifted")
    alone = []
    for row, attachment in enumerate(("default", "long", "unshifted")):
        tuned.activate(attachment)
        alone.append(output(tuned.model, {key: value[row : row + 1] for key, value in batch.items()}))
    tuned.route(["default", "long", "unshifted"])
    assert relative_error(output(tuned.model, batch), torch.cat(alone)) < 1e-5


def test_two_prefixes_shift_by_the_length_of_both() -> None:
    both = "prefix-tuning(length=3, reparameterize=false, shift_positions=true)"
    tuned, batch = attached("gpt2", f"{both} + {both}")
    plain = both.replace("true", "false")
    other, _ = attached("gpt2", f"{plain} + {plain}")
    positions = torch.arange(6, 6 + batch["input_ids"].shape[1]).expand(3, -1)
    assert torch.equal(output(tuned.model, batch), output(other.model, {**batch, "position_ids": positions}))


@pytest.mark.parametrize("lengths", [(3,), (1, 2)])
def test_a_shifted_prefix_of_t5_is_text_before_the_text(lengths: tuple[int, ...]) -> None:
    """Keys and values of the decoder's first words, as a prefix of the rest, or as several in a row."""
    model = build("t5")
    batch = {key: value[:1] for key, value in ARCHITECTURES["t5"].batch(head="language").items()}
    with torch.no_grad():
        whole = model(**batch, use_cache=True)
    one = "prefix-tuning(length={}, reparameterize=false, shift_positions=true, targets='attention stacks=decoder')"
    tuned = deltune.attach(model, " + ".join(one.format(length) for length in lengths))
    start = 0
    for number, length in enumerate(lengths):
        for layer, states in enumerate(whole.past_key_values.self_attention_cache.layers):
            key = f"decoder.{layer}.attention"
            form = forms_of(tuned)[key if len(lengths) == 1 else f"{number}.{key}"]
            assert isinstance(form, Prefix)
            form.start_at(states.keys[0, :, start : start + length], states.values[0, :, start : start + length])
        start += length
    rest = {**batch, "decoder_input_ids": batch["decoder_input_ids"][:, start:]}
    assert relative_error(output(model, rest), whole.logits[:, start:]) < 1e-5
    uncached, cached = (
        model.generate(**{key: batch[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=6, **options)
        for options in ({"use_cache": False}, {"cache_implementation": "static"})
    )
    assert torch.equal(uncached, cached)
    tuned.activate()
    assert torch.equal(output(model, batch), output(build("t5"), batch))


def test_positions_that_cannot_be_shifted_say_so() -> None:
    for name in ("t5", "bart", "vit"):
        with pytest.raises(TargetError, match=r"cannot be shifted: it takes no position_ids"):
            deltune.attach(build(name), "prefix-tuning(shift_positions=true)")
    model = build("gpt2", n_positions=12)
    tuned = deltune.attach(model, FLAT.replace(")", ", shift_positions=true)"))
    architecture = ARCHITECTURES["gpt2"]
    assert output(model, architecture.batch(length=9)).shape[1] == 9
    with pytest.raises(StateError, match=r"10 tokens.*shifted by 3 need 13 positions.*has 12.*to 9 tokens"):
        output(model, architecture.batch(length=10))
    with tuned.disabled():
        assert output(model, architecture.batch(length=12)).shape[1] == 12


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_shift_equals_huggingface_peft(name: str, padding: str) -> None:
    """Their prefix lies in the cache, so that the text begins at P; ours does by itself."""
    peft = pytest.importorskip("peft", reason="Hugging Face peft is not installed")
    tuned, _ = attached(name, FLAT.replace(")", ", shift_positions=true)"))
    batch = ARCHITECTURES[name].batch(padding=padding)  # type: ignore[arg-type]
    real = batch["attention_mask"].bool()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(name), config).eval()
    with torch.no_grad():
        table = theirs.prompt_encoder["default"].embedding.weight
        table.copy_(joined_prefixes(list(pairs_of(tuned).values())))
        expected = theirs(**inputs).logits
    # padded rows keep the padding's places there, as the bare model does
    places = {"position_ids": torch.arange(real.shape[1]).expand_as(real)} if padding == "left" else {}
    assert relative_error(output(tuned.model, {**inputs, **places})[real], expected[real]) < 1e-5


def test_positions_are_counted_whichever_attachment_is_live() -> None:
    """One hook counts for all attention functions of a stack, those of other attachments included."""
    upper = "prefix-tuning(length=3, reparameterize=false, targets='attention layers=1:')"
    batch = ARCHITECTURES["llama-gqa"].batch(padding="left")
    real = batch["attention_mask"].bool()
    tuned, _ = attached("llama-gqa", FLAT)
    torch.manual_seed(2)
    tuned.attach(upper, name="upper")
    hooks = tuned.model.model._forward_pre_hooks.values()
    assert sum(isinstance(hook, CountPositions) for hook in hooks) == 1
    padded = output(tuned.model, batch)
    for row in range(3):
        alone = output(tuned.model, ARCHITECTURES["llama-gqa"].alone(batch, row))
        assert relative_error(padded[row][real[row]], alone[0]) < 1e-5
    tuned.detach()
    assert not tuned.model.model._forward_pre_hooks
