"""How side layers are cut out of the model: against loops over rows, and Fisher information against single backward
passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError
from deltune.methods.additive.side_network import SideNetwork
from deltune.methods.fisher_information import fisher_information
from tests.methods.common import attached, build
from tests.methods.test_ladder_side_tuning import SUPPORTED, networks_of
from tests.zoo import ARCHITECTURES


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the greatest, in order."""
    return sorted(sorted(range(len(scores)), key=lambda index: -scores[index])[:count])


def relative(matrix: Tensor) -> Tensor:
    return matrix.double() / matrix.max().double()


def naive_residual(writers: list[Tensor], count: int) -> list[int]:
    """Features by their share in the importance of each matrix that writes to the residual stream."""
    scores = [0.0] * writers[0].shape[0]
    for matrix in writers:
        for feature in range(len(scores)):
            scores[feature] += float(matrix[feature].double().sum() / matrix.double().sum())
    return best(scores, count)


def naive_heads(
    query: Tensor, key: Tensor, value: Tensor, columns: list[int], head_dim: int, reduction: int, rotated: bool
) -> list[list[int]]:
    """Features of each key/value head: the product of importances over all that use it, summed over columns."""
    query, key, value = relative(query), relative(key), relative(value)
    groups = query.shape[0] // key.shape[0]
    result = []
    for head in range(key.shape[0] // head_dim):
        scores = []
        for feature in range(head_dim):
            row = key[head * head_dim + feature] * value[head * head_dim + feature]
            for member in range(groups):
                row = row * query[(head * groups + member) * head_dim + feature]
            scores.append(float(row[columns].sum()))
        if rotated:  # a feature goes with the one that is rotated with it
            half = head_dim // 2
            pairs = best([scores[index] + scores[index + half] for index in range(half)], half // reduction)
            result.append([*pairs, *(index + half for index in pairs)])
        else:
            result.append(best(scores, head_dim // reduction))
    return result


def expected_bert(layers: Any, importance: dict[str, Tensor], reduction: int) -> dict[str, Tensor]:
    """Every tensor of the side blocks of BERT (4 heads of 8), by its name."""
    writers = [
        importance[f"{index}.{name}"]
        for index in range(len(layers))
        for name in ("attention.output.dense", "output.dense")
    ]
    residual = naive_residual(writers, 32 // reduction)
    result = {}
    for index, layer in enumerate(layers):
        weights = {name: value.detach() for name, value in layer.named_parameters()}
        query, key, value = (f"attention.self.{name}" for name in ("query", "key", "value"))
        importances = (importance[f"{index}.{name}"] for name in (query, key, value))
        heads = naive_heads(*importances, residual, 8, reduction, False)
        inner = [head * 8 + feature for head, features in enumerate(heads) for feature in features]
        up = relative(importance[f"{index}.intermediate.dense"])
        middle = best([float(row[residual].sum()) for row in up], 48 // reduction)
        rows = {query: inner, key: inner, value: inner, "intermediate.dense": middle}
        columns = {"attention.output.dense": inner, "output.dense": middle}
        for name, tensor in weights.items():
            module = name.rpartition(".")[0]
            kept = tensor[rows.get(module, residual)]
            result[f"{index}.{name}"] = kept if tensor.dim() == 1 else kept[:, columns.get(module, residual)]
    return result


def matrices(layers: Any) -> dict[str, Tensor]:
    """Weights of the linear maps, by layer and name."""
    return {
        f"{index}.{name.removesuffix('.weight')}": value.detach()
        for index, layer in enumerate(layers)
        for name, value in layer.named_parameters()
        if value.dim() == 2
    }


@pytest.mark.parametrize("reduction", [2, 4])
def test_the_rule_for_bert(reduction: int) -> None:
    tuned, _ = attached("bert", f"ladder-side-tuning(reduction={reduction}, initialization=magnitude)")
    layers = build("bert").bert.encoder.layer
    importance = {name: value.abs() for name, value in matrices(layers).items()}
    expected = expected_bert(layers, importance, reduction)
    (network,) = networks_of(tuned).values()
    found = dict(network.blocks.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_rule_for_rotated_and_grouped_heads() -> None:
    tuned, _ = attached("llama-gqa", "ladder-side-tuning(reduction=2, initialization=magnitude)")
    layers = build("llama-gqa").model.layers
    importance = {name: value.abs() for name, value in matrices(layers).items()}
    writers = [importance[f"{index}.{name}"] for index in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")]
    residual = naive_residual(writers, 16)
    (network,) = networks_of(tuned).values()
    for index, (layer, block) in enumerate(zip(layers, network.blocks, strict=True)):
        names = [f"{index}.self_attn.{name}_proj" for name in "qkv"]
        heads = naive_heads(*(importance[name] for name in names), residual, 8, 2, True)
        keys = [head * 8 + feature for head, features in enumerate(heads) for feature in features]
        queries = [head * 8 + feature for head in range(4) for feature in heads[head // 2]]
        attention: Any = block.self_attn
        assert torch.equal(attention.k_proj.weight, layer.self_attn.k_proj.weight[keys][:, residual])
        assert torch.equal(attention.v_proj.weight, layer.self_attn.v_proj.weight[keys][:, residual])
        assert torch.equal(attention.q_proj.weight, layer.self_attn.q_proj.weight[queries][:, residual])
        assert torch.equal(attention.o_proj.weight, layer.self_attn.o_proj.weight[residual][:, queries])
        gated = relative(importance[f"{index}.mlp.up_proj"]) * relative(importance[f"{index}.mlp.gate_proj"])
        middle = best([float(row[residual].sum()) for row in gated], 24)
        mlp: Any = block.mlp
        assert torch.equal(mlp.up_proj.weight, layer.mlp.up_proj.weight[middle][:, residual])
        assert torch.equal(mlp.gate_proj.weight, layer.mlp.gate_proj.weight[middle][:, residual])
        assert torch.equal(mlp.down_proj.weight, layer.mlp.down_proj.weight[residual][:, middle])
        norm: Any = block.input_layernorm
        assert torch.equal(norm.weight, layer.input_layernorm.weight[residual])
    assert torch.equal(network.norm.weight, build("llama-gqa").model.norm.weight[residual])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SUPPORTED)
def test_invariant_08_with_r_1_the_blocks_are_the_models(name: str) -> None:
    tuned, _ = attached(name, "ladder-side-tuning(reduction=1)", ARCHITECTURES[name].heads[0])
    fresh = build(name, ARCHITECTURES[name].heads[0])
    for key, network in networks_of(tuned).items():
        stack = tuned.anatomy.stacks[key.partition(".")[0]]
        for layer, block in zip(stack.layers, network.blocks, strict=True):
            wide = dict(fresh.get_submodule(layer).named_parameters())
            narrow = dict(block.named_parameters())
            assert narrow.keys() == wide.keys()
            for parameter, value in wide.items():
                assert torch.equal(narrow[parameter], value), parameter
        if stack.final_norm is not None:
            assert network.norm is not None
            for parameter, value in fresh.get_submodule(stack.final_norm).named_parameters():
                assert torch.equal(network.norm.get_parameter(parameter), value)


@pytest.mark.parametrize("name", SUPPORTED)
def test_invariant_09_pruned_tensors_are_sub_blocks(name: str) -> None:
    """Every row of a side matrix is a part of exactly one row of the model's, all at the same columns, in order."""
    tuned, _ = attached(name, "ladder-side-tuning(reduction=2)", ARCHITECTURES[name].heads[0])
    fresh = build(name, ARCHITECTURES[name].heads[0])
    checked = 0
    for key, network in networks_of(tuned).items():
        stack = tuned.anatomy.stacks[key.partition(".")[0]]
        for layer, block in zip(stack.layers, network.blocks, strict=True):
            wide = dict(fresh.get_submodule(layer).named_parameters())
            for parameter, narrow in block.named_parameters():
                whole = wide[parameter].detach()
                if narrow.dim() == 1:
                    places = [int((whole == value).nonzero()[0]) for value in narrow.detach()]
                    assert places == sorted(set(places)) or whole.unique().numel() == 1
                elif narrow.shape != whole.shape:
                    assert narrow.shape == (-(-whole.shape[0] // 2), -(-whole.shape[1] // 2))
                    where = (whole[:, :, None, None] == narrow.detach()).nonzero()  # values are distinct
                    rows = {int(i): int(r) for r, _, i, _ in where}
                    columns = {int(j): int(c) for _, c, _, j in where}
                    assert len(where) == narrow.numel()
                    assert list(rows.values()) == [rows[i] for i in rows]
                    kept_rows, kept_columns = ([places[i] for i in sorted(places)] for places in (rows, columns))
                    assert kept_rows == sorted(set(kept_rows))
                    assert kept_columns == sorted(set(kept_columns))
                    assert torch.equal(narrow, whole[kept_rows][:, kept_columns])
                    checked += 1
    assert checked >= 8


def naive_information(model: Any, layers: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum over examples of squared gradients, one backward pass each."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in matrices(layers).items()}
    for row in range(len(batch["labels"])):
        model.zero_grad()
        model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        for index, layer in enumerate(layers):
            for name, value in layer.named_parameters():
                if value.dim() == 2:
                    total[f"{index}.{name.removesuffix('.weight')}"] += value.grad.double().square()
    return total


def labelled(name: str) -> dict[str, Tensor]:
    architecture = ARCHITECTURES[name]
    batch = architecture.batch(batch_size=5, head="classification")
    return {**batch, "labels": architecture.labels("classification", batch)}


def test_invariant_10_fisher_information_is_of_single_examples() -> None:
    batch = labelled("bert")
    model = build("bert", "classification")
    layers = model.bert.encoder.layer
    expected = naive_information(model, layers, batch)
    model.zero_grad()
    model(**batch).loss.backward()
    of_batch = layers[0].output.dense.weight.grad.double().square()
    model.zero_grad()
    model.requires_grad_(False)
    names = {name: layers[int(name[0])].get_submodule(name[2:]).weight for name in expected}
    model.train()
    found = fisher_information(model, names, [batch], 100)
    assert model.training
    assert model.bert.encoder.layer[1].training
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-6 * value.max(), name
    assert (found["0.output.dense"] - of_batch).abs().max() > 0.1 * of_batch.max()
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())


def test_invariant_10_prepare_cuts_out_by_the_fisher_information_of_the_bare_model() -> None:
    batch = labelled("bert")
    tuned, _ = attached("bert", "ladder-side-tuning(reduction=2, examples=4)", "classification")
    (network,) = networks_of(tuned).values()
    by_size = {name: value.clone() for name, value in network.blocks.named_parameters()}
    tuned.prepare(
        [{name: value[:3] for name, value in batch.items()}, {name: value[3:] for name, value in batch.items()}]
    )
    bare = build("bert", "classification")
    information = naive_information(bare, bare.bert.encoder.layer, {name: value[:4] for name, value in batch.items()})
    expected = expected_bert(bare.bert.encoder.layer, information, 2)
    found = dict(network.blocks.named_parameters())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert any(not torch.equal(found[name], value) for name, value in by_size.items())
    trained = {id(value) for value in tuned.trainable_parameters()}
    assert all(value.requires_grad == (id(value) in trained) for value in tuned.model.parameters())
    assert all(value.grad is None for value in tuned.model.parameters())
    assert not network.transparent


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt_neox", "t5", "bart"])
def test_prepare_with_language_models(name: str) -> None:
    architecture = ARCHITECTURES[name]
    tuned, batch = attached(name, "ladder-side-tuning(reduction=2, examples=2)")
    before = [value.clone() for network in networks_of(tuned).values() for value in network.blocks.parameters()]
    tuned.prepare([{**batch, "labels": architecture.labels("language", batch)}])
    after = [value for network in networks_of(tuned).values() for value in network.blocks.parameters()]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_prepare_needs_labels_and_examples() -> None:
    tuned, batch = attached("bert", "ladder-side-tuning(reduction=2)")
    with pytest.raises(MethodError, match=r"needs batches with labels.*input_ids, attention_mask"):
        tuned.prepare([batch])
    with pytest.raises(MethodError, match="there was none"):
        tuned.prepare([])


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_prepare_leaves_other_initial_values(kind: str) -> None:
    tuned, _ = attached("bert", f"ladder-side-tuning(reduction=2, initialization={kind})")
    (network,) = networks_of(tuned).values()
    before = {name: value.clone() for name, value in network.named_parameters()}
    tuned.prepare([labelled("bert")])
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_random_layers_are_initialised_as_the_models_class_does() -> None:
    tuned, _ = attached("bert", "ladder-side-tuning(reduction=2, initialization=random)")
    (network,) = networks_of(tuned).values()
    weights = torch.cat([value.flatten() for name, value in network.blocks.named_parameters() if value.dim() == 2])
    assert abs(float(weights.std()) - 0.02) < 0.001  # initializer_range
    for name, value in network.blocks.named_parameters():
        if value.dim() == 1:
            assert (value == ("LayerNorm.weight" in name)).all(), name
    wide = build("bert").bert.encoder.layer[0].output.LayerNorm.weight
    assert not (wide == 1).any()


def test_a_quantised_model_has_no_fisher_information() -> None:
    model = ARCHITECTURES["bert"].build("classification", hidden_size=64, intermediate_size=128)
    deltune.quantize(model, deltune.NF4())
    tuned = deltune.attach(model, "ladder-side-tuning(reduction=2)")
    (network,) = (form for form in tuned.attachments["default"].forms.values() if isinstance(form, SideNetwork))
    assert all(torch.isfinite(value).all() for value in network.parameters())
    with pytest.raises(MethodError, match="initialization=magnitude"):
        tuned.prepare([labelled("bert")])
