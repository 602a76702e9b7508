"""TRL's trainers train a tuned model: the delta alone moves, schedules follow, and no second model is needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import deltune
from deltune.errors import StateError
from deltune.training import AddsPenalty, DeltaTrainer, ReferenceModel
from deltune.tuned import Tuned
from tests.docs.conftest import preference
from tests.tasks.tiny import CHAT_TEMPLATE, byte_tokenizer, decoder
from tests.training.tiny import equal, weights
from tests.zoo import randomize

STEPS, BATCH, ACCUMULATION = 12, 2, 2
ADALORA = "adalora(initial_rank=4, target_rank=2)"
RATES = {"adalora": 0.1, "prefix-tuning": 0.05, "prompt-tuning": 0.3}
METHODS = (
    "lora(rank=4)",
    ADALORA,
    "sequential-adapter(width=4)",
    "prefix-tuning(length=3, width=6)",
    "prompt-tuning(length=3)",
)

ROWS = [
    {"instruction": "say", "input": word, "output": 2 * word} for word in ("ab", "c", "def", "g", "hi", "jkl", "m", "n")
]
PREFERENCES = [preference(row, rejected) for row, rejected in zip(ROWS, ("z", "yy", "x", "ww") * 2, strict=True)]


class PenalizedSFT(AddsPenalty, SFTTrainer):
    pass


class PenalizedReward(AddsPenalty, RewardTrainer):
    pass


class PenalizedDPO(AddsPenalty, DPOTrainer):
    pass


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that TRL uses
        yield


def language_model() -> Any:
    model = decoder()
    randomize(model, 5)
    return model


def reward_model() -> Any:
    torch.manual_seed(1)
    config = decoder().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    randomize(model.model, 5)
    return model.eval()


def bare(kind: str) -> Any:
    return reward_model() if kind == "reward" else language_model()


def attached(kind: str, method: str) -> Tuned:
    model = bare(kind)
    torch.manual_seed(2)
    return deltune.attach(model, method)


def rate(method: str) -> float:
    return RATES.get(method.split("(")[0], 0.01)


def trainer(
    kind: str, tuned: Tuned, folder: Path, *, penalized: bool = True, reference: Any = None, **options: Any
) -> Any:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **options,
    }
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    if kind == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES]
        makers: tuple[Any, Any] = (PenalizedSFT, SFTTrainer)
        config: Any = SFTConfig(str(folder), **settings)
    else:
        rows = PREFERENCES
        makers = (PenalizedReward, RewardTrainer) if kind == "reward" else (PenalizedDPO, DPOTrainer)
        config = (RewardConfig if kind == "reward" else DPOConfig)(str(folder), **settings)
    extra = {"ref_model": reference or ReferenceModel(tuned)} if kind == "dpo" else {}
    made = makers[0 if penalized else 1](
        model=tuned.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **extra,
    )
    made.create_optimizer()
    if settings["max_steps"] > 1:
        tuned.bind(made.optimizer, settings["max_steps"])
    return made


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(1, 260, (2, length), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids(), attention_mask=torch.ones(2, 7, dtype=torch.long)).logits
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_the_delta_learns_and_nothing_else_moves(kind: str, method: str, tmp_path: Path) -> None:
    tuned = attached(kind, method)
    with tuned.disabled():
        before = bits(tuned.model)
    start = weights(tuned)
    made = trainer(kind, tuned, tmp_path / "run", penalized="adalora" in method, learning_rate=rate(method))
    held = [id(value) for group in made.optimizer.param_groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in tuned.trainable_parameters())
    assert made.args.gradient_checkpointing  # TRL's default

    made.train()

    assert tuned.attachments["default"].steps == STEPS  # each of two batches
    # AdaLoRA leaves some matrices no triplet at all: their factors are zero, as at the start
    assert all(not torch.equal(value, start[name]) or not value.any() for name, value in weights(tuned).items())
    with tuned.disabled():
        after = bits(tuned.model)
        untuned = made.evaluate(made.train_dataset)["eval_loss"]
    assert equal(after, before)
    assert made.evaluate(made.train_dataset)["eval_loss"] < 0.97 * untuned
    tuned.save(tmp_path / "delta")
    loaded = deltune.load(bare(kind), tmp_path / "delta")
    loaded.model.config.pad_token_id = tuned.model.config.pad_token_id  # which TRL has set
    tolerance = 1e-5 if "adalora" in method else 0.0  # which is saved as a LoRA
    assert torch.allclose(logits(loaded.model), logits(tuned.model), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_the_budget_of_adalora_follows_the_steps(kind: str, tmp_path: Path) -> None:
    tuned = attached(kind, ADALORA)
    forms = tuned.attachments["default"].forms.values()
    assert sum(int(form.alive().sum()) for form in forms) == 4 * len(forms)

    trainer(kind, tuned, tmp_path).train()

    assert tuned.attachments["default"].settled
    assert sum(int(form.alive().sum()) for form in forms) == 2 * len(forms)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_the_penalty_counts_once_for_each_step(kind: str, tmp_path: Path) -> None:
    """One step of gradient descent, from two batches, with and without: they differ by the penalty's gradient."""
    options = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    step, moved = 0.5, {}
    for penalized in (True, False):
        tuned = attached(kind, "adalora(initial_rank=4, target_rank=2, orthogonality=50)")
        start = weights(tuned)
        penalty = tuned.penalty()
        assert penalty is not None
        gradients = torch.autograd.grad(penalty, tuned.trainable_parameters(), allow_unused=True)
        made = trainer(kind, tuned, tmp_path / str(penalized), penalized=penalized, learning_rate=step, **options)
        made.train()
        moved[penalized] = {name: start[name] - value for name, value in weights(tuned).items()}
    expected = dict(zip(start, gradients, strict=True))
    assert any(value is not None and value.abs().max() > 1e-3 for value in expected.values())
    for name, gradient in expected.items():
        difference = moved[True][name] - moved[False][name]
        wanted = torch.zeros_like(difference) if gradient is None else step * gradient
        assert torch.allclose(difference, wanted, atol=1e-6), name


def test_the_penalty_is_not_added_where_it_is_already() -> None:
    with pytest.raises(StateError, match="would add the penalty twice"):
        type("Twice", (AddsPenalty, Trainer), {})
    with pytest.raises(StateError, match="would add the penalty twice"):
        type("Twice", (AddsPenalty, DeltaTrainer), {})
    with pytest.raises(StateError, match="stands in front of no trainer"):
        type("Behind", (SFTTrainer, AddsPenalty), {})


def test_a_penalty_needs_a_delta(tmp_path: Path) -> None:
    tuned = attached("sft", ADALORA)
    made = trainer("sft", tuned, tmp_path)
    tuned.detach()
    tuned.model.requires_grad_(True)
    with pytest.raises(StateError, match="no delta on the model"):
        made.train()


# -- the reference model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "full", "lora(rank=4) + freeze(layers=1)"])
def test_training_beside_a_reference_equals_training_beside_a_copy(method: str, tmp_path: Path) -> None:
    losses, trained = [], []
    for copied in (False, True):
        tuned = attached("dpo", method)
        reference = language_model() if copied else None
        made = trainer("dpo", tuned, tmp_path / str(copied), penalized=False, reference=reference)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
        trained.append(weights(tuned))
    assert len(set(losses[0])) == STEPS
    assert losses[0] == losses[1]
    assert equal(*trained)


def test_log_probabilities_computed_before_training_are_those_of_the_reference(tmp_path: Path) -> None:
    trained = []
    for precomputed in (False, True):
        tuned = attached("dpo", "lora(rank=4)")
        randomize_delta(tuned)
        made = trainer("dpo", tuned, tmp_path / str(precomputed), penalized=False, precompute_ref_log_probs=precomputed)
        made.train()
        trained.append(weights(tuned))
    for name, value in trained[0].items():
        assert torch.allclose(trained[1][name], value, atol=1e-5), name


def randomize_delta(tuned: Tuned) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in tuned.trainable_parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def test_a_reference_is_the_bare_model_and_leaves_all_as_it_was() -> None:
    model = language_model()
    expected = logits(model)
    tuned = deltune.attach(model, "lora(rank=4, dropout=0.5) + prefix-tuning(length=2, width=4)")
    randomize_delta(tuned)
    reference = ReferenceModel(tuned)
    assert not torch.equal(logits(model), expected)
    model.train()
    model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(0)
    loss = model(input_ids=ids(), labels=ids()).loss
    wanted = torch.autograd.grad(loss, tuned.trainable_parameters(), retain_graph=True)

    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    assert torch.equal(reference(**batch).logits, expected)
    states = reference.base_model(**batch).last_hidden_state
    assert torch.equal(reference.get_output_embeddings()(states), expected)
    assert not states.requires_grad
    assert list(reference.parameters()) == []
    assert equal(reference.state_dict(), language_model().state_dict())

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(value.requires_grad for value in tuned.trainable_parameters())
    loss.backward()  # what was computed before the reference ran still has its gradients
    assert all(torch.equal(value.grad, grad) for value, grad in zip(tuned.trainable_parameters(), wanted, strict=True))


def test_a_reference_may_have_a_delta_of_its_own(tmp_path: Path) -> None:
    first = attached("sft", "lora(rank=4)")
    randomize_delta(first)
    first.save(tmp_path / "sft")
    expected = logits(first.model)
    losses, trained = [], []
    for copied in (False, True):
        tuned = deltune.load(language_model(), tmp_path / "sft", name="dpo")
        if copied:
            reference: Any = deltune.load(language_model(), tmp_path / "sft").model
        else:
            deltune.load(tuned, tmp_path / "sft", name="sft")
            tuned.activate("dpo")
            reference = ReferenceModel(tuned, "sft")
        made = trainer("dpo", tuned, tmp_path / str(copied), penalized=False, reference=reference)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
        trained.append(weights(tuned))
        assert tuned.active == ("dpo",)
        if not copied:
            assert torch.equal(reference(input_ids=ids()).logits, expected)
            assert not any(value.requires_grad for _, value in tuned.attachments["sft"].parameters())
    assert losses[0] == losses[1]
    assert equal(*trained)


def test_other_trainers_take_a_reference(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in PREFERENCES
        for name in ("chosen", "rejected")
    ]
    trained = []
    for copied in (False, True):
        tuned = attached("dpo", "lora(rank=4)")
        config = KTOConfig(
            str(tmp_path / str(copied)),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        KTOTrainer(
            model=tuned.model,
            ref_model=language_model() if copied else ReferenceModel(tuned),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=byte_tokenizer(chat_template=CHAT_TEMPLATE),
        ).train()
        trained.append(weights(tuned))
    assert equal(*trained)


def test_what_cannot_be_a_reference_is_refused_at_once() -> None:
    with pytest.raises(StateError, match="reversible"):
        ReferenceModel(deltune.attach(language_model(), "full", reversible=False))
    tuned = attached("dpo", "lora(rank=4)")
    with pytest.raises(StateError, match="sft"):
        ReferenceModel(tuned, "sft")
    tuned.attach("lora(rank=2)", "sft")
    tuned.activate("default")
    reference = ReferenceModel(tuned, "sft")
    tuned.route(["default", None])
    with pytest.raises(StateError, match="end routing first"):
        reference(input_ids=ids())


def test_a_change_of_the_head_for_tokens_is_not_trained_by_trl(tmp_path: Path) -> None:
    """What the page says: TRL reads that matrix itself."""
    tuned = attached("sft", "lora(rank=4) + lora(rank=2, targets='lm_head')")
    start = weights(tuned)
    trainer("sft", tuned, tmp_path, penalized=False).train()
    same = [name for name, value in weights(tuned).items() if torch.equal(value, start[name])]
    assert same == [name for name in start if "lm_head" in name]
    assert len(same) == 2


def test_the_classes_of_the_page_exist_for_a_saved_decoder(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    tuned = deltune.attach(model, "lora(rank=4)")
    assert "score.weight" in dict(tuned.named_trainable_parameters())
