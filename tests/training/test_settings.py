from __future__ import annotations

from typing import Any

import pytest

from deltune.errors import TrainingError
from deltune.training import TrainingSettings, setting_rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 1}, "no setting 'epoch'. Did you mean 'epochs'"),
        ({"epochs": 0}, "epochs must be greater than 0, not 0"),
        ({"epochs": float("nan")}, "epochs must be a number, not nan"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": "many"}, "batch_size must be a whole number, not 'many'"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        ({"schedule": "liner"}, "schedule cannot be 'liner'. Did you mean 'linear'"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be at most 1"),
        ({"keep_best": "perhaps"}, "keep_best must be true or false"),
        ({"device": "gpu"}, "Choose cpu, cuda or mps"),
        ({"learning_rate": 0}, "learning_rate must be greater than 0"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message.replace("(", r"\(").replace(".", r"\.")):
        TrainingSettings.from_options(options)


def test_text_is_read_as_the_value_that_is_asked_for() -> None:
    settings = TrainingSettings.from_options(
        {"epochs": "2", "patience": "none", "keep_best": "no", "learning_rate": "3e-4", "seed": "7"}
    )
    assert settings == TrainingSettings(epochs=2.0, keep_best=False, learning_rate=3e-4, seed=7)


def test_every_setting_has_a_sentence_of_help() -> None:
    rows = setting_rows()
    assert [row["name"] for row in rows] == list(TrainingSettings().to_dict())
    assert all(row["help"] for row in rows)


def test_resolving_leaves_nothing_open() -> None:
    settings = TrainingSettings(epochs=1.5, gradient_accumulation=4)
    resolved = settings.resolve(learning_rate=0.1, weight_decay=0.2, batches=10, device="cpu", threads=2)
    open_ones = {name for name, value in resolved.to_dict().items() if value is None}
    assert open_ones == {"patience", "frozen_states"}
    assert (resolved.steps, resolved.evaluate_every, resolved.evaluation_batch_size) == (5, 3, 32)
    assert resolved.resolve(learning_rate=9, weight_decay=9, batches=10, device="cuda", threads=9) == resolved
