"""The bottleneck of all adapters, and the options that they share.

The formula against plain Python loops in float64, initial values, widths, scales, dropout and errors. Numbers are
those of the invariants of the sheets ``sequential_adapter`` (S) and ``parallel_adapter`` (P).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError
from deltune.methods import all_methods, parse
from deltune.methods.additive.bottleneck import Bottleneck, BottleneckMethod
from tests.methods.common import attached, build

METHODS = [name for name, kind in all_methods().items() if issubclass(kind, BottleneckMethod)]


def random_form(**options: Any) -> Bottleneck:
    """A bottleneck in float64, every parameter of which has a random value."""
    torch.manual_seed(0)
    form = Bottleneck(6, 3, dtype=torch.float64, **options)
    for parameter in form.parameters():
        nn.init.normal_(parameter)
    return form


def by_loops(form: Bottleneck, x: Tensor) -> Tensor:
    """s (W_up relu(W_down LN(x) + b_down) + b_up) for one token after the other, number by number."""
    values = {name: value.tolist() for name, value in form.state_dict().items()}
    rows = []
    for token in x.flatten(0, -2).tolist():
        if "norm.weight" in values:
            mean = sum(token) / len(token)
            variance = sum((entry - mean) ** 2 for entry in token) / len(token)
            token = [
                (entry - mean) / math.sqrt(variance + 1e-5) * weight + bias
                for entry, weight, bias in zip(token, values["norm.weight"], values["norm.bias"], strict=True)
            ]
        narrow = [
            max(0.0, sum(w * entry for w, entry in zip(row, token, strict=True)) + bias)
            for row, bias in zip(values["down.weight"], values["down.bias"], strict=True)
        ]
        wide = [
            sum(w * entry for w, entry in zip(row, narrow, strict=True)) + bias
            for row, bias in zip(values["up.weight"], values["up.bias"], strict=True)
        ]
        scale = values.get("scale", form.scale)
        scales = scale if isinstance(scale, list) else [scale] * len(wide)
        rows.append([factor * entry for factor, entry in zip(scales, wide, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("out_features", [None, 4])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5, "learned", "channel"])
def test_it_is_its_formula(scale: float | str, layer_norm: bool, out_features: int | None) -> None:
    """S5 with every option: equal to loops over numbers within 1e-12."""
    form = random_form(scale=scale, layer_norm=layer_norm, out_features=out_features)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    change = form(x)
    assert change.shape == (2, 5, out_features or 6)
    assert (change - by_loops(form, x)).abs().max() < 1e-12


def test_names_of_values() -> None:
    plain = {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert set(Bottleneck(6, 3).state_dict()) == plain
    assert set(Bottleneck(6, 3, layer_norm=True).state_dict()) == plain | {"norm.weight", "norm.bias"}
    assert set(Bottleneck(6, 3, scale="learned").state_dict()) == plain | {"scale"}


def test_kaiming_is_uniform_down_and_zero_up() -> None:
    form = Bottleneck(400, 50, initialization="kaiming")
    down = form.down.weight.detach()
    bound = 1 / 400**0.5  # sqrt(6 / ((1 + 5) d))
    assert float(down.abs().max()) <= bound
    assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not any(value.any() for value in (form.up.weight, form.up.bias, form.down.bias))
    assert not form(torch.randn(3, 400)).any()


def test_normal_and_truncated_have_the_given_deviation() -> None:
    normal = Bottleneck(400, 100, initialization="normal", standard_deviation=0.02)
    truncated = Bottleneck(400, 100, initialization="truncated", standard_deviation=0.3)
    for linear in (normal.down, normal.up):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        assert float(linear.weight.detach().abs().max()) > 3 * 0.02
        assert not linear.bias.any()
    for linear in (truncated.down, truncated.up):
        assert float(linear.weight.detach().std()) == pytest.approx(0.3 * 0.8796, rel=0.02)  # cut at two deviations
        assert 0.55 < float(linear.weight.detach().abs().max()) <= 0.6
        assert not linear.bias.any()


@pytest.mark.parametrize(
    ("name", "initialization", "deviation"), [("normal", "normal", 0.02), ("trunc", "truncated", 0.01)]
)
def test_deviations_that_are_not_given(name: str, initialization: str, deviation: float) -> None:
    tuned, _ = attached("bert", f"pfeiffer-adapter(width=64, initialization={initialization})", head="base")
    form: Any = tuned.attachments["default"].forms["encoder.0.ffn"]
    expected = deviation * (0.8796 if initialization == "truncated" else 1)
    assert float(form.down.weight.detach().std()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("scale", "shape"), [("learned", ()), ("channel", (6,))])
def test_trained_scales_start_at_one_or_as_given(scale: str, shape: tuple[int, ...]) -> None:
    """P7."""
    form = Bottleneck(6, 3, scale=scale)
    assert isinstance(form.scale, nn.Parameter)
    assert torch.equal(form.scale, torch.ones(shape))
    assert torch.equal(torch.as_tensor(Bottleneck(6, 3, scale=scale, first_scale=4.0).scale), torch.full(shape, 4.0))


def test_dropout_is_inside_and_in_training_alone() -> None:
    """P8. With W_up an identity, the change shows which of the m values were dropped, and by what the rest grew."""
    form = Bottleneck(8, 8, initialization="kaiming", dropout=0.25)
    with torch.no_grad():
        for linear in (form.down, form.up):
            nn.init.eye_(linear.weight)
        nn.init.constant_(form.up.bias, 7.0)
    x = torch.rand(50, 60, 8) + 1
    form.eval()
    assert torch.equal(form(x), form(x))
    assert torch.allclose(form(x), x + 7)
    form.train()
    inside = form(x) - 7  # b_up is not dropped
    dropped = inside.abs() < 1e-5
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(inside[~dropped], (x / 0.75)[~dropped], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [4.0, "channel"])
def test_values_of_another_type_take_that_of_the_input(dtype: torch.dtype, scale: float | str) -> None:
    form = Bottleneck(6, 3, scale=scale, layer_norm=True)
    assert form(torch.randn(2, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_widths(method: str) -> None:
    """A number, or a part of the hidden size, which is rounded down."""
    for width, expected in (("7", 7), ("d/4", 8), ("d/5", 6)):
        tuned, _ = attached("bert", f"{method}(width={width})", head="base")
        forms = tuned.attachments["default"].forms.values()
        assert {form.down.weight.shape[0] for form in forms} == {expected}  # type: ignore[union-attr]
        assert str(parse(f"{method}(width={width})")) == f"{method}(width={width})"
    with pytest.raises(MethodError, match=rf"{method}: width=d/33 leaves nothing at .* has 32 features"):
        deltune.attach(build("bert", head="base"), f"{method}(width=d/33)")
    for wrong in ("'a quarter'", "d/0", "d/", "0.5"):
        with pytest.raises(MethodError, match=f"{method}: width must be a whole number"):
            parse(f"{method}(width={wrong})")
    with pytest.raises(MethodError, match="width must be at least 1"):
        parse(f"{method}(width=0)")


@pytest.mark.parametrize("method", METHODS)
def test_wrong_options_are_refused_with_the_nearest(method: str) -> None:
    for option, message in (
        ("activation=gelo", "there is no activation 'gelo'. Did you mean .*'gelu'"),
        ("initialization=kaimin", "initialization cannot be 'kaimin'. Did you mean 'kaiming'"),
        ("scale=learnt", "there is no scale 'learnt'. Did you mean 'learned'"),
        ("scale=0", "scale must be greater than 0"),
        ("scale=-1", "scale must be greater than 0"),
        (
            "initialization=kaiming, standard_deviation=0.1",
            "with initialization=kaiming there is no standard_deviation to choose",
        ),
        ("initialization=normal, standard_deviation=0", "standard_deviation must be greater than 0"),
        ("dropout=1", "dropout must be at most 0.99"),
    ):
        with pytest.raises(MethodError, match=f"{method}: {message}"):
            parse(f"{method}({option})")


@pytest.mark.parametrize("method", METHODS)
def test_unchanged_at_the_start_is_said_of_the_values_not_of_the_class(method: str) -> None:
    assert parse(method).unchanged_at_start == all_methods()[method].unchanged_at_start
    assert parse(f"{method}(initialization=kaiming)").unchanged_at_start
    assert not parse(f"{method}(initialization=normal)").unchanged_at_start
