"""The table of the unified view is made of the classes: every method has its row, and the page is current."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import deltune as package
from deltune.backbone import anatomy_of
from deltune.errors import MethodError
from deltune.methods import Method, Placement, all_variants, parse
from deltune.methods.page import own_methods
from deltune.methods.unified import COLUMNS, Terms, markdown, specimen_of, unified_rows, unified_view, write_table
from deltune.sites import Form, Insertion, ParallelForm, ParameterSite, parallel_sites
from tests.cli.conftest import Command, deltune
from tests.docs.markdown import ROOT
from tests.methods.common import build
from tests.methods.sizes import BERT_BASE

__all__ = ["deltune"]

PAGE = ROOT / "docs" / "unified_view.md"

#: Table 1 of He et al. (and the prefix without its gate, of section 4.4), with this library's words for the sites.
HE = {
    "prefix-tuning(reparameterize=false)": (
        "softmax(x W_q P_k^T) P_v",
        "key_value",
        "attention heads",
        "(1 - lam) h + lam dh",
    ),
    "sequential-adapter(activation=relu, train_norms=false)": (
        "relu(h W_down) W_up",
        "sequential",
        "attention result, ffn result",
        "h + dh",
    ),
    "lora(alpha=32)": ("x W_down W_up", "weight", "attention.query, attention.value", "h + 4 dh"),
    "plain-parallel-adapter": ("relu(x W_down) W_up", "parallel", "ffn result", "h + dh"),
    "scaled-parallel-adapter": ("relu(x W_down) W_up", "parallel", "ffn result", "h + 4 dh"),
    # W_down = W_q P_k^T and W_up = P_v, of each head
    "multi-head-parallel-adapter": ("relu(x W_q P_k^T) P_v", "parallel", "attention heads", "h + dh"),
    "added-prefix": ("softmax(x W_q P_k^T) P_v", "parallel", "attention heads", "h + dh"),
}


@pytest.mark.parametrize("method", HE)
def test_the_rows_of_the_paper(method: str) -> None:
    (row,) = unified_rows(method)
    assert (row.form, row.insertion, row.site, row.combination) == HE[method]
    assert row.control == "always"


@pytest.mark.parametrize("text", [*map(specimen_of, own_methods()), *all_variants()])
def test_every_method_has_a_row_of_its_own(text: str) -> None:
    """All five terms, and each form says what it computes: none is shown by the name of its class."""
    rows = unified_rows(text)
    assert rows
    for row in rows:
        assert all(vars(row).values())
    model = BERT_BASE.model()
    forms = [item.form for item in parse(text).place(model, anatomy_of(model)) if item.form is not None and item.site]
    for form in forms:
        assert form.as_text("x") != Form.as_text(_Nameless(), "x").replace("_Nameless", type(form).__name__), type(form)


class _Nameless(Form):
    """A form that says nothing."""


def test_every_registered_method_is_in_the_table() -> None:
    rows = unified_view([*map(specimen_of, own_methods()), *all_variants()])
    names = {row.method.partition(":")[0].partition("(")[0] for row in rows}
    assert names == {kind.name for kind in own_methods()} | all_variants().keys()


def test_a_new_method_has_its_row_at_once() -> None:
    """One class and its form; nothing else knows of them."""

    class Doubled(ParallelForm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    @dataclass(frozen=True)
    class Plain(Method):
        name: ClassVar[str] = "plain"
        insertion: ClassVar[Insertion] = Insertion.PARALLEL
        learning_rate: ClassVar[float] = 1e-3

        def place(self, model: Any, anatomy: Any) -> Iterator[Placement]:
            for site in parallel_sites(model, anatomy, package.Targets.parse("ffn layers=-2:")):
                yield Placement(site, Doubled())

        def before_step(self, *args: Any) -> None:
            """Follows."""

    assert unified_rows(Plain()) == [
        Terms(
            "plain", "ffn result (layers 10-11)", "Doubled(x)", "parallel", "h + dh", "a schedule follows the optimizer"
        )
    ]
    Doubled.formula = "2 {x}"
    Doubled.scale = 3.0
    (row,) = unified_rows(Plain())
    assert (row.form, row.combination) == ("2 x", "h + 3 dh")


@pytest.mark.parametrize(
    ("method", "term", "expected"),
    [
        ("parallel-adapter(scale=2, activation=gelu)", "form", "gelu(x W_down) W_up"),
        ("parallel-adapter(scale=2, activation=gelu)", "combination", "h + 2 dh"),
        ("parallel-adapter(scale=learned)", "combination", "h + s dh"),
        ("parallel-adapter(layer_norm=true)", "form", "relu(LN(x) W_down) W_up"),
        ("parallel-adapter(targets=attention)", "site", "attention heads, joined"),
        ("parallel-adapter(targets=attention, attention_changes=result)", "site", "attention result"),
        ("lora(weight_decomposed=true)", "form", "x ((W + s W_down W_up) m / n - W)"),
        ("lora(weight_decomposed=true)", "combination", "h + dh"),
        ("lora(initialization=pissa)", "form", "x (W_down W_up - W_down0 W_up0)"),
        ("lora(targets='attention.* ffn.*')", "site", "attention.*, ffn.*"),
        ("lora(targets='attention.query layers=0,3,4')", "site", "attention.query (layers 0, 3-4)"),
        ("lora(targets='ffn.up layers=-1')", "site", "ffn.up (layer 11)"),
        ("krona-b(residual=true, scale=2)", "form", "s x (A kron B) + s_res x"),
        ("krona-b(residual=true, scale=2)", "combination", "h + dh"),
        ("attention-fusion(scores=projected, residual=true)", "form", "h_L + w sum_l softmax_l(q . (K h_l)) V h_l"),
        ("p-tuning(encoder=mlp)", "form", "relu(P' W_1) W_2"),
        (
            "adapter-fusion(adapters='pfeiffer-adapter, pfeiffer-adapter', value=false)",
            "form",
            "sum_t softmax_t(q . k_t) A_t(LN(h))",
        ),
        ("bitfit", "site", "biases"),
        ("full", "site", "all parameters"),
        ("freeze(layers=3)", "site", "parameters (layers 9-11)"),
        ("dylora", "control", "a schedule follows the optimizer; any smaller rank afterwards"),
        ("adalora", "control", "a schedule follows the optimizer; a penalty in the loss"),
        ("fish-mask", "control", "set up from data"),
        ("qlora", "control", "the frozen model in 4 bits"),
    ],
)
def test_a_configured_method_says_its_options(method: str, term: str, expected: str) -> None:
    assert getattr(unified_rows(method)[0], term) == expected


def test_parts_have_rows_of_their_own() -> None:
    assert [row.method for row in unified_rows("lora(rank=4) + mam(length=5)")] == [
        "sum: lora(rank=4)",
        "sum: prefix-tuning(length=5, width=800)",
        "sum: parallel-adapter",
    ]
    assert [(row.method, row.site) for row in unified_rows("mam")] == [
        ("mam: prefix-tuning(length=30, width=800)", "attention heads"),
        ("mam: parallel-adapter", "ffn result"),
    ]
    assert [row.site for row in unified_rows("sequential-adapter")] == ["attention result, ffn result", "norms"]
    assert {row.method.partition(":")[0] for row in unified_rows("parallel-mam")} == {"parallel-mam"}
    # the schedule of one part is not that of the other
    assert [row.control == "always" for row in unified_rows("lora + dylora")] == [True, False]


def test_another_model_and_what_does_not_fit_it() -> None:
    llama = build("llama-gqa")
    (row,) = unified_rows("lora(rank=2, targets='ffn.*')", llama)
    assert row.site == "ffn.*"
    row, other = unified_view(["lora(rank=2)", "bitfit(missing=refuse)"], llama)
    assert row.site == "attention.query, attention.value"
    assert other.method == "bitfit"
    assert other.site.startswith("none here: ")
    assert other.form == ""


def test_the_random_state_and_the_model_stay() -> None:
    model = build("bert")
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.random.get_rng_state()
    unified_rows("mam", model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_selected_parameters_of_a_norm_in_one_layer() -> None:
    @dataclass(frozen=True)
    class Norms(Method):
        name: ClassVar[str] = "norms"
        insertion: ClassVar[Insertion] = Insertion.SELECT
        learning_rate: ClassVar[float] = 1e-3

        def place(self, model: Any, anatomy: Any) -> Iterator[Placement]:
            for part in anatomy.of("norm"):
                if part.layer == 1:
                    yield Placement(ParameterSite(f"{part.module}.weight"))

    assert [row.site for row in unified_rows(Norms())] == ["norms (layer 1)"]


# -- where it is shown ---------------------------------------------------------------------------------------


def test_the_committed_page_is_current(tmp_path: Path) -> None:
    copy = tmp_path / "unified_view.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    write_table(copy)
    advice = "run `make pages`, or python -m deltune.methods.unified docs/unified_view.md"
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), advice
    for kind in own_methods():
        assert f"| `{kind.name}" in PAGE.read_text(encoding="utf-8")


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="no place for the unified view"):
        write_table(tmp_path / "page.md")


def test_markdown_keeps_its_columns() -> None:
    lines = markdown([Terms("a", "b", "c | d", "e", "f", "")]).splitlines()
    assert lines[2] == "| `a` | `c \\| d` | e | b | `f` |  |"
    assert len(lines) == 3


def test_the_command_prints_the_table(deltune: Command) -> None:
    shown = " ".join(deltune("methods", "prefix-tuning", "--unified").out.split())
    assert "softmax(x W_q P_k^T) P_v" in shown
    rows = deltune("methods", "--unified", "--json").json
    assert {frozenset(row) for row in rows} == {frozenset(COLUMNS)}
    named = {row["method"].partition(":")[0].partition("(")[0] for row in rows}
    assert {kind.name for kind in own_methods()} | all_variants().keys() <= named
    text = deltune("methods", "--unified", "--markdown").out
    assert text.strip() in PAGE.read_text(encoding="utf-8")


def test_the_command_takes_options_and_sums(deltune: Command) -> None:
    rows = deltune("methods", "parallel-adapter(scale=2, activation=gelu) + lora", "--unified", "--json").json
    assert [row["combination"] for row in rows] == ["h + 2 dh", "h + 2 dh"]
    assert [row["form"] for row in rows] == ["gelu(x W_down) W_up", "x W_down W_up"]
    wrong = deltune("methods", "lorra", "--unified")
    assert wrong.status == 2
    assert "'lora'" in wrong.err
    assert "give --unified too" in deltune("methods", "--markdown").err
    assert "Give one of them" in deltune("methods", "--unified", "--markdown", "--json").err


def test_the_command_knows_variants(deltune: Command) -> None:
    assert "added-prefix is head-adapter(activation=softmax, grouped=True)." in deltune("methods", "added-prefix").out
    assert deltune("methods", "added-prefix", "--json").json["variant_of"]["activation"] == "softmax"
    assert "scaled-prefix" in deltune("methods").out
    with pytest.raises(MethodError, match="'added-prefix' is head-adapter"):
        package.methods.get("added-prefix")
