"""(IA)^3 against its formula, a slow twin, and the published count."""

from __future__ import annotations

import pytest
import torch

import deltune
from deltune.errors import MethodError, TargetError
from deltune.methods import parse
from deltune.methods.additive.ia3 import InputScale, OutputScale
from tests.methods.common import attached, bits, build, output, relative_error
from tests.methods.sizes import BERT_BASE


def randomized(tuned: deltune.Tuned) -> dict[str, torch.Tensor]:
    """Give every vector random values; these by key."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for key, form in tuned.attachments["default"].forms.items():
        assert isinstance(form, OutputScale | InputScale)
        with torch.no_grad():
            form.scale.copy_(1 + 0.5 * torch.randn(form.scale.shape, generator=generator))
        found[key] = form.scale.detach().clone()
    return found


def test_published_count() -> None:
    # 12 layers, keys and values of 768, and 3072 inside
    assert BERT_BASE.count("ia3") == 12 * (768 + 768 + 3072) == 55_296


def test_it_scales_keys_values_and_the_input_of_the_last_matrix_alone() -> None:
    tuned, _ = attached("bert", "ia3")
    forms = tuned.attachments["default"].forms
    assert {key.split(".", 2)[2]: type(form) for key, form in forms.items()} == {
        "attention.key": OutputScale,
        "attention.value": OutputScale,
        "ffn.down": InputScale,
    }
    assert forms["encoder.0.ffn.down"].scale.shape == (48,)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5", "phi3"])
def test_it_is_the_model_with_its_matrices_scaled_row_by_row_and_column_by_column(name: str) -> None:
    tuned, batch = attached(name, "ia3", dtype=torch.float64)
    scales = randomized(tuned)
    found = output(tuned.model, batch)
    twin = build(name, dtype=torch.float64)
    with torch.no_grad():
        for _, site, form in tuned.attachments["default"].sites:
            module = twin.get_submodule(site.part.module)
            matrix = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            scale = scales[site.key]
            rows = (
                range(len(matrix))
                if site.part.rows is None
                else list(site.part.rows.view(torch.arange(len(matrix)), 0))
            )
            for number, row in enumerate(rows):
                if isinstance(form, InputScale):
                    matrix[row] *= scale
                    continue
                matrix[row] *= scale[number]
                if getattr(module, "bias", None) is not None:
                    module.bias[row] *= scale[number]
    assert relative_error(found, output(twin, batch)) < 1e-12


def test_merging_scales_biases_too_and_is_undone_bit_for_bit() -> None:
    tuned, batch = attached("bert", "ia3")
    before = bits(build("bert"))
    randomized(tuned)
    with_delta = output(tuned.model, batch)
    tuned.merge()
    after = bits(tuned.model)
    key = "bert.encoder.layer.0.attention.self.key.bias"
    assert not torch.equal(after[key], before[key])
    assert relative_error(output(tuned.model, batch), with_delta) < 2e-6
    tuned.unmerge()
    with tuned.disabled():
        assert all(torch.equal(value, before[name]) for name, value in bits(tuned.model).items())


def test_either_can_be_chosen_or_left_out() -> None:
    tuned, _ = attached("bert", "ia3(targets='attention.value ffn.down', inputs='ffn.up,attention.output')")
    forms = tuned.attachments["default"].forms
    reading = {key.split(".", 2)[2] for key, form in forms.items() if isinstance(form, InputScale)}
    assert reading == {"ffn.up", "attention.output"}
    assert len(forms) == 4 * 3
    keys = attached("bert", "ia3(targets=attention.key, inputs=none)")[0].attachments["default"].forms
    assert {type(form) for form in keys.values()} == {OutputScale}
    downs = attached("bert", "ia3(targets=none)")[0].attachments["default"].forms
    assert {type(form) for form in downs.values()} == {InputScale}


def test_nothing_to_scale_or_twice_the_same_map_is_refused() -> None:
    with pytest.raises(MethodError, match="nothing is scaled"):
        attached("bert", "ia3(targets=none, inputs=none)")
    with pytest.raises(TargetError, match=r"acts twice at 'encoder\.0\.ffn\.down'"):
        attached("bert", "ia3(targets=ffn.down)")


def test_its_text_is_read_again() -> None:
    method = deltune.IA3(targets=None)
    assert str(method) == "ia3(targets=None)"
    assert parse(str(method)) == method == parse(method.to_dict())
