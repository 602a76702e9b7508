"""Lightning trains a tuned model, and its closures do not mislead the schedules of methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.utils.data import DataLoader

from deltune.tuned import Tuned
from tests.training import tiny

BATCH, ROWS, EPOCHS, RATE = 8, 40, 2, 5e-3
ADALORA = "adalora(initial_rank=4, target_rank=2)"
#: Methods whose schedules look at gradients, change them, or change the optimizer.
SCHEDULED = (
    ADALORA,
    "increlora(target_rank=3)",
    "dylora(rank=3)",
    "diff-pruning",
    "s-bitfit",
    "u-lora(rank=2)",
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def batches() -> Any:
    task, tokenizer = tiny.task(), tiny.tokenizer()
    return DataLoader(task.encode(tiny.reviews(ROWS), tokenizer), BATCH, collate_fn=task.collator(tokenizer))


class Tuning(lightning.LightningModule):
    def __init__(self, tuned: Tuned, steps: int | None = None) -> None:
        super().__init__()
        self.tuned, self.model = tuned, tuned.model.train()
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.tuned.trainable_parameters(), lr=RATE, weight_decay=0.0)
        self.tuned.bind(optimizer, int(self.trainer.estimated_stepping_batches))
        return optimizer


def with_lightning(tuned: Tuned, *, accumulation: int = 1, clip: float | None = None) -> list[float]:
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Tuning(tuned)
    trainer.fit(module, batches())
    return module.losses


def plain(tuned: Tuned, *, accumulation: int = 1, clip: float | None = None) -> list[float]:
    loader = batches()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=RATE, weight_decay=0.0)
    tuned.bind(optimizer, EPOCHS * -(-len(loader) // accumulation))
    losses = []
    tuned.model.train()
    for _ in range(EPOCHS):
        for place, batch in enumerate(loader, start=1):
            loss = tuned.model(**batch).loss
            losses.append(loss.item())
            (loss / accumulation).backward()
            if place % accumulation == 0 or place == len(loader):
                if clip:
                    torch.nn.utils.clip_grad_norm_(tuned.trainable_parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return losses


def classifier(method: str) -> Tuned:
    return tiny.classifier(method, dropout=0.0)


@pytest.mark.parametrize("method", SCHEDULED)
def test_lightning_trains_as_a_plain_loop_does(method: str) -> None:
    """It computes gradients inside the optimizer's step, where a hook before the step would see none, or old ones."""
    torch.manual_seed(0)
    one = classifier(method)
    expected = plain(one)
    torch.manual_seed(0)
    other = classifier(method)
    base = {name: value.clone() for name, value in _bare(other).items()}

    assert with_lightning(other) == expected
    assert tiny.equal(tiny.weights(other), tiny.weights(one))
    assert len(set(expected)) == len(expected) == EPOCHS * ROWS / BATCH
    assert tiny.equal(_bare(other), base)


def _bare(tuned: Tuned) -> dict[str, torch.Tensor]:
    with tuned.disabled():
        return {name: value.clone() for name, value in tuned.model.state_dict().items()}


@pytest.mark.parametrize("method", [ADALORA, "s-bitfit"])
def test_accumulated_and_clipped_gradients_are_those_of_a_plain_loop(method: str) -> None:
    one, other = classifier(method), classifier(method)
    expected = plain(one, accumulation=2, clip=0.1)
    assert with_lightning(other, accumulation=2, clip=0.1) == pytest.approx(expected, abs=1e-6)
    assert other.attachments["default"].steps == 6  # five batches are three steps
    for name, value in tiny.weights(one).items():
        assert torch.allclose(tiny.weights(other)[name], value, atol=1e-5), name


def test_the_budget_of_adalora_follows_lightning() -> None:
    tuned = classifier(ADALORA)
    forms = list(tuned.attachments["default"].forms.values())
    assert sum(int(form.alive().sum()) for form in forms) == 4 * len(forms)
    losses = with_lightning(tuned)
    assert tuned.attachments["default"].settled
    assert sum(int(form.alive().sum()) for form in forms) == 2 * len(forms)
    assert sum(losses[-5:]) < sum(losses[:5])


# -- closures and wrappers, whoever gives them ---------------------------------------------------------------


def _given(optimizer: Any, closure: Callable[[], Any]) -> None:
    optimizer.step(closure)


def _named(optimizer: Any, closure: Callable[[], Any]) -> None:
    optimizer.step(closure=closure)


@pytest.mark.parametrize("step", [_given, _named])
def test_a_schedule_looks_at_the_gradients_that_a_closure_makes(step: Callable[..., None]) -> None:
    def train(with_closure: bool) -> Tuned:
        tuned = classifier("u-lora(rank=2)")
        optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=RATE)
        tuned.bind(optimizer, 6)
        tuned.model.train()
        for batch in [*batches()] * 2:

            def closure(batch: Any = batch) -> Any:
                optimizer.zero_grad()
                loss = tuned.model(**batch).loss
                loss.backward()
                return loss

            if with_closure:
                step(optimizer, closure)
            else:
                closure()
                optimizer.step()
        return tuned

    assert tiny.equal(tiny.weights(train(True)), tiny.weights(train(False)))


def test_a_closure_that_is_called_often_is_one_step() -> None:
    tuned = classifier("lora(rank=2)")
    optimizer = torch.optim.LBFGS(tuned.trainable_parameters(), lr=0.1, max_iter=4)
    method = type(tuned.attachments["default"].method)
    seen: list[tuple[int, bool]] = []

    def before_step(self: Any, forms: Any, step: int, optimizer: Any) -> None:
        seen.append((step, all(value.grad is not None for value in tuned.trainable_parameters())))

    tuned.bind(optimizer, 2)
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = tuned.model(**next(iter(batches()))).loss
        loss.backward()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "before_step", before_step)
        optimizer.step(closure)
        optimizer.step(closure)
    assert calls > 4
    assert seen == [(1, True), (2, True)]


def _accelerated(optimizer: Any) -> Any:
    return Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize("wrap", [_accelerated, LightningOptimizer])
def test_a_wrapped_optimizer_can_be_bound(wrap: Callable[[Any], Any]) -> None:
    tuned = classifier(ADALORA)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=RATE)
    bound = tuned.bind(wrap(optimizer), 10)
    tuned.model.train()
    tuned.model(**next(iter(batches()))).loss.backward()
    optimizer.step()
    assert tuned.attachments["default"].steps == 1
    bound.remove()
    optimizer.step()
    assert tuned.attachments["default"].steps == 1
