"""Prompts behind the embedding of positions: what the first layer reads, without positions and norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import TargetError
from tests.methods.common import attached, bits, build, output, relative_error, train
from tests.zoo import ARCHITECTURES

SMALL = "prompt-tuning(length=3, behind_embeddings=true)"
ENCODERS = ["bert", "roberta", "distilbert", "electra", "albert"]


def rows_of(tuned: deltune.Tuned) -> Tensor:
    (form,) = tuned.attachments["default"].forms.values()
    return form.rows.detach()  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_they_are_joined_with_what_the_embeddings_give(name: str) -> None:
    """The encoder of the frozen model, called with the joined rows and a mask made by hand."""
    architecture = ARCHITECTURES[name]
    tuned = deltune.attach(architecture.build("base", dtype=torch.float64), SMALL)
    frozen = architecture.build("base", dtype=torch.float64)
    batch = architecture.batch(padding="right")
    with torch.no_grad():
        text = frozen.embeddings(input_ids=batch["input_ids"])
        joined = torch.cat([rows_of(tuned).expand(len(text), -1, -1), text], dim=1)
        real = torch.cat([torch.ones(len(text), 3), batch["attention_mask"]], dim=1)[:, None, None].double()
        expected = frozen.encoder(joined, attention_mask=(1 - real) * torch.finfo(torch.float64).min)[0][:, 3:]
        found = tuned.model(**batch).last_hidden_state
    assert found.shape == expected.shape
    seen = batch["attention_mask"].bool()
    assert relative_error(found[seen], expected[seen]) < 1e-12


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_and_neighbours_change_nothing(name: str) -> None:
    architecture = ARCHITECTURES[name]
    tuned = deltune.attach(architecture.build("base", dtype=torch.float64), SMALL)
    for padding in ("right", "left"):
        batch = architecture.batch(padding=padding)  # type: ignore[arg-type]
        together = output(tuned.model, batch)
        for row in range(len(together)):
            real = batch["attention_mask"][row].bool()
            alone = {key: value[row : row + 1, real] for key, value in batch.items()}
            if name in ("bert", "distilbert", "electra", "albert") and padding == "left":
                continue  # the bare model counts its positions from the padding
            assert relative_error(output(tuned.model, alone)[0], together[row, real]) < 1e-9


@pytest.mark.parametrize("name", ENCODERS)
def test_they_are_another_thing_than_rows_with_positions(name: str) -> None:
    behind, batch = attached(name, SMALL, "base")
    in_front, _ = attached(name, "prompt-tuning(length=3)", "base")
    (form,) = in_front.attachments["default"].forms.values()
    with torch.no_grad():
        form.rows.copy_(rows_of(behind))  # type: ignore[union-attr]
    assert relative_error(output(behind.model, batch), output(in_front.model, batch)) > 1e-3


def test_they_train_detach_and_are_saved(tmp_path: Path) -> None:
    tuned, batch = attached("bert", SMALL)
    before = bits(build("bert"))
    start = rows_of(tuned).clone()
    train(tuned, batch)
    assert (rows_of(tuned) != start).all(1).any()
    expected = output(tuned.model.eval(), batch)
    tuned.save(tmp_path)
    again = deltune.load(build("bert").eval(), tmp_path)
    assert torch.equal(output(again.model, batch), expected)
    tuned.detach()
    frozen = build("bert").eval()
    head = {name for name in before if name.startswith("classifier")}
    found = bits(tuned.model)
    assert found.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items() if name not in head)
    assert output(frozen, batch).shape == expected.shape


def test_both_kinds_at_once_keep_their_places() -> None:
    """Rows in front are embedded with positions, those behind stand before all of them."""
    architecture = ARCHITECTURES["bert"]
    tuned = deltune.attach(architecture.build("base", dtype=torch.float64), "prompt-tuning(length=2)", name="front")
    tuned.attach("prompt-tuning(length=3, behind_embeddings=true)", name="behind")
    tuned.activate("front", "behind")
    batch = architecture.batch(padding="none")
    front, behind = (next(iter(tuned.attachments[name].forms.values())).rows.detach() for name in ("front", "behind"))
    frozen = architecture.build("base", dtype=torch.float64)
    with torch.no_grad():
        words = frozen.embeddings.word_embeddings(batch["input_ids"])
        text = frozen.embeddings(inputs_embeds=torch.cat([front.expand(len(words), -1, -1), words], dim=1))
        joined = torch.cat([behind.expand(len(words), -1, -1), text], dim=1)
        expected = frozen.encoder(joined)[0][:, 5:]
    assert relative_error(output(tuned.model, batch), expected) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_models_without_such_a_module_are_refused(name: str) -> None:
    with pytest.raises(TargetError, match="no module embeds tokens and positions together"):
        deltune.attach(build(name), SMALL)


def test_rows_of_images_stand_behind_anyway() -> None:
    one, batch = attached("vit", SMALL)
    two, _ = attached("vit", "prompt-tuning(length=3)")
    assert torch.equal(output(one.model, batch), output(two.model, batch))
