"""AdaLoRA once saved: pruned triplets are gone, and what ranks are left; and its options. Numbers as in the sheet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.errors import MethodError, TargetError
from deltune.measure import rank_table
from deltune.methods.reparameterized.adalora import final_ranks
from deltune.methods.reparameterized.low_rank import LowRank
from tests.methods.common import attached, build, loss_of, output, relative_error
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.methods.test_adalora import LAYOUTS, SHORT, forms_of, make_distinct, ranks_of, trained, walk
from tests.zoo import ARCHITECTURES


def test_10_a_matrix_without_triplets_is_the_frozen_one(tmp_path: Path) -> None:
    tuned, batch = trained("bert", f"adalora({SHORT})")
    key, name = "encoder.1.ffn.up", "bert.encoder.layer.1.intermediate.dense"
    forms_of(tuned)[key].keep(torch.zeros(4, dtype=torch.bool))
    module = tuned.model.get_submodule(name)
    x = torch.randn(3, 5, 32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
    assert ranks_of(tuned)[key] == 0
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert"), tmp_path)
    assert key not in loaded.attachments["default"].forms
    assert not any(item.startswith(f"{key}.") for item in load_file(tmp_path / "delta.safetensors"))
    assert relative_error(output(loaded.model, batch), output(tuned.model, batch)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_12_saved_and_loaded_after_pruning(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tuned, batch = attached(name, f"adalora({SHORT})", dtype=dtype)
    for seed, form in enumerate(forms_of(tuned).values()):
        make_distinct(form, seed)
        form.E.data.mul_(0.02)
        form.keep(torch.arange(4) < seed % 5)
    tuned.save(tmp_path)
    loaded = deltune.load(build(name, dtype=dtype), tmp_path)
    attachment = loaded.attachments["default"]
    assert isinstance(attachment.method, deltune.LoRA)
    ranks = ranks_of(tuned)
    assert final_ranks(attachment.forms) == {key: rank for key, rank in ranks.items() if rank}
    assert {0, 1, 2, 3, 4} == set(ranks.values())
    for key, form in attachment.forms.items():
        old = forms_of(tuned)[key]
        alive, wide = old.E[:, 0] != 0, torch.float64
        product = (old.B[:, alive].to(wide) * old.E[alive, 0].to(wide)) @ old.A[alive].to(wide)
        expected = 16 / (4 + 1e-5) * product  # by the rank at the start, not by the present one
        assert isinstance(form, LowRank)
        found = form.scale * form.B.to(wide) @ form.A.to(wide)
        assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2), key
    error = relative_error(output(loaded.model, batch), output(tuned.model, batch))
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


def test_12_saved_and_loaded_in_float64_and_without_pruning(tmp_path: Path) -> None:
    tuned, batch = trained("bert", f"adalora({SHORT})", dtype=torch.float64)
    tuned.save(tmp_path / "pruned")
    loaded = deltune.load(build("bert", dtype=torch.float64), tmp_path / "pruned")
    assert relative_error(output(loaded.model, batch), output(tuned.model, batch)) < 1e-6
    # before anything is zeroed the file gives the very same bits
    tuned, batch = attached("bert", f"adalora({SHORT}, total_steps=20)")
    for step in walk(tuned, "bert", 3, announced=False):
        assert step <= 3
    tuned.save(tmp_path / "whole")
    assert torch.equal(output(deltune.load(build("bert"), tmp_path / "whole").model, batch), output(tuned.model, batch))


def test_12_between_two_allocations_what_came_back_is_saved_too(tmp_path: Path) -> None:
    tuned, batch = attached("bert", f"adalora({SHORT}, interval=4, total_steps=20)")
    for _ in walk(tuned, "bert", 11, announced=False):  # allocations after the steps of t = 4 and 8
        pass
    assert not all(form.kept.all() for form in forms_of(tuned).values())
    assert set(ranks_of(tuned).values()) == {4}
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build("bert"), tmp_path).model, batch), output(tuned.model, batch))


def test_an_untrained_delta_is_saved_whole_and_trains_further(tmp_path: Path) -> None:
    """Lambda is zero everywhere, but nothing was dropped: the file holds a LoRA of the initial rank."""
    model = build("gpt2")
    tuned = deltune.attach(model, f"adalora({SHORT})")
    batch = ARCHITECTURES["gpt2"].batch(head="language")
    tuned.save(tmp_path)
    loaded = deltune.load(build("gpt2"), tmp_path)
    assert set(ranks_of(loaded).values()) == {4}
    assert torch.equal(output(loaded.model, batch), output(build("gpt2"), batch))
    loss_of(loaded.model, batch).backward()
    assert any(value.grad is not None and value.grad.any() for value in loaded.trainable_parameters())


def test_a_delta_without_any_triplet_holds_the_head_alone(tmp_path: Path) -> None:
    """No schedule ends so; whoever zeroes everything by hand gets what he asked for."""
    tuned, batch = trained("bert", f"adalora({SHORT})")
    for form in forms_of(tuned).values():
        form.keep(torch.zeros(4, dtype=torch.bool))
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert"), tmp_path)
    assert not loaded.attachments["default"].forms
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


def test_published_counts() -> None:
    assert BERT_BASE.count("adalora") == 1_991_520
    assert BERT_BASE.count("adalora(initial_rank=8)") == 1_327_680
    assert LLAMA.count("adalora") == 3_665_880
    assert LLAMA.count("adalora(initial_rank=8)") == 2_443_920


def test_the_saved_numbers_are_those_of_the_ranks(tmp_path: Path) -> None:
    tuned, _ = trained("bert", f"adalora({SHORT})")
    ranks = ranks_of(tuned)
    tuned.save(tmp_path)
    tensors = load_file(tmp_path / "delta.safetensors")
    head = set(tuned.attachments["default"].head_names)
    expected = sum(ranks[key] * (form.A.shape[1] + form.B.shape[0]) for key, form in forms_of(tuned).items())
    assert sum(value.numel() for key, value in tensors.items() if key not in head) == expected


def test_as_part_of_a_sum(tmp_path: Path) -> None:
    tuned, batch = attached("bert", f"adalora({SHORT}) + bitfit")
    for _ in walk(tuned, "bert", 20):
        pass
    ranks = ranks_of(tuned)
    assert sum(ranks.values()) == 2 * len(ranks)
    tuned.save(tmp_path)
    assert relative_error(output(deltune.load(build("bert"), tmp_path).model, batch), output(tuned.model, batch)) < 1e-5


def test_the_table_of_ranks() -> None:
    ranks = {"encoder.0.attention.query": 3, "encoder.0.ffn.up": 0, "encoder.10.ffn.up": 12, "some.module": 1}
    assert rank_table(ranks).splitlines() == [
        "layer        attention.query  ffn.up   rank    sum",
        "encoder.0                  3       0             3",
        "encoder.10                        12            12",
        "some.module                               1      1",
        "sum                        3      12      1     16",
    ]
    tuned, _ = trained("t5", f"adalora({SHORT})")
    table = rank_table(ranks_of(tuned))
    assert table.splitlines()[-1].split()[-1] == str(2 * len(forms_of(tuned)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("initial_rank=4, target_rank=6", "can only shrink"),
        ("initial=2.5", "whole number"),
        ("final=7.5", "whole number"),
        ("alpha=0", "greater than 0"),
        ("orthogonality_form=norm", "norms"),
        ("initial_rank=99", "at most"),
    ],
)
def test_impossible_options_are_refused(options: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        attached("bert", f"adalora({options})")
    with pytest.raises(TargetError):
        attached("bert", "adalora(targets=attention.qery)")


def test_a_matrix_smaller_than_the_initial_rank_has_fewer_triplets() -> None:
    tuned, _ = attached("llama-gqa", "adalora(initial_rank=20, target_rank=18)")
    ranks = ranks_of(tuned)
    assert ranks["decoder.0.attention.query"] == 20
    assert ranks["decoder.0.attention.key"] == 16
    for _ in walk(tuned, "llama-gqa", 4):
        pass
    assert sum(ranks_of(tuned).values()) == sum(min(18, rank) for rank in ranks.values())
