from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import deltune
from deltune.errors import CheckpointError, DataError, DeltuneError, StateError, TrainingError
from deltune.tasks import Task, TextClassification, TextRegression, TokenTagging
from deltune.training import FitResult, evaluate, fit
from tests.training import tiny


def run(tuned: Any = None, **options: Any) -> FitResult:
    settings = tiny.SETTINGS.updated(**options.pop("settings", {}))
    evaluation = options.pop("evaluation", tiny.reviews(30, seed=1))
    return fit(
        tuned or tiny.classifier(),
        tiny.task(),
        tiny.reviews(60),
        evaluation,
        tokenizer=tiny.tokenizer(),
        settings=settings,
        **options,
    )


class StopAt(TrainerCallback):
    """Ends the process, as far as `fit` can tell."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_result_says_everything(tmp_path: Path) -> None:
    tuned = tiny.classifier()
    result = run(tuned, output=tmp_path / "out", settings={"steps": 12, "evaluate_every": 4})
    assert result.steps == 12
    assert result.examples == 8 * 7 + 4 + 8 * 4
    assert {"accuracy", "loss"} <= result.metrics.keys()
    assert [row["step"] for row in result.history] == list(range(1, 13))
    assert [row["step"] for row in result.history if "evaluation" in row] == [4, 8, 12]
    assert result.best_step in (4, 8, 12)
    assert result.metrics == next(row for row in result.history if row["step"] == result.best_step)["evaluation"]
    assert 0 < result.padding_share < 0.5
    assert result.seconds > 0
    assert result.settings["learning_rate"] == 5e-3
    assert result.provenance["method"]["name"] == "lora"
    assert FitResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result.to_dict()
    names = sorted(item.name for item in (tmp_path / "out").iterdir())
    assert names == ["delta.safetensors", "deltune.json", "result.json", "run.json"]


def test_the_task_is_saved_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    tuned = tiny.classifier("full")
    result = run(tuned, output=tmp_path, settings={"learning_rate": 0.03, "epochs": 4})
    loaded = deltune.load(tiny.classifier("full").detach(), tmp_path)
    assert loaded.attachments["default"].task == {**tiny.task().describe(), "options": result_options(result)}
    again = evaluate(loaded, tiny.task(), tiny.reviews(30, seed=1), tiny.tokenizer(), batch_size=16)
    assert again == result.metrics
    assert again["accuracy"] == max(row["evaluation"]["accuracy"] for row in result.history if "evaluation" in row)


def result_options(result: FitResult) -> Any:
    return result.provenance["task"]["options"]


def test_training_learns() -> None:
    result = run(tiny.classifier("full", dropout=0.0), settings={"learning_rate": 0.01, "epochs": 10})
    assert result.metrics["accuracy"] > 0.9
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_only_the_delta_changes_and_the_surroundings_are_left_alone() -> None:
    tuned = tiny.classifier()
    tuned.model.eval()
    frozen = {name: value.clone() for name, value in tuned.model.state_dict().items() if "deltune" not in name}
    head = set(tuned.attachments["default"].head_names)
    config = tuned.model.config.to_dict()
    forward = tuned.model.forward
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    threads = torch.get_num_threads()
    run(tuned, settings={"steps": 3})
    drawn = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
    assert torch.get_num_threads() == threads
    assert not tuned.model.training
    assert tuned.model.config.to_dict() == config
    assert tuned.model.forward == forward
    state = tuned.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in frozen.items() if name not in head)


@pytest.mark.parametrize("method", ["freeze(layers=1)", "ladder-side-tuning(reduction=2)"])
def test_kept_states_of_frozen_layers_change_nothing_but_rounding(method: str, tmp_path: Path) -> None:
    settings = {"epochs": 3, "evaluate_every": 4}
    plain = tiny.classifier(method, dropout=0.0)
    expected = run(plain, settings=settings)
    ran = []
    kept = tiny.classifier(method, dropout=0.0)
    kept.model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: ran.append(kept.model.training))
    settings["frozen_states"] = str(tmp_path / "states")
    result = run(kept, settings=settings)
    assert result.history[0]["loss"] == expected.history[0]["loss"]
    for one, other in zip(tiny.weights(kept).values(), tiny.weights(plain).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert ran.count(True) <= 8 + 1  # the batches of one pass over the texts, and one to compare
    # another run, with other settings, has them already, and a stopped one ends in the same bits
    ran.clear()
    again = tiny.classifier(method, dropout=0.0)
    again.model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: ran.append(again.model.training))
    with pytest.raises(KeyboardInterrupt):
        run(again, settings=settings, output=tmp_path / "run", callbacks=[StopAt(9)])
    resumed = tiny.classifier(method, dropout=0.0)
    run(resumed, settings=settings, output=tmp_path / "run")
    whole = tiny.classifier(method, dropout=0.0)
    run(whole, settings=settings)
    assert tiny.equal(tiny.weights(resumed), tiny.weights(whole))
    assert ran.count(True) == 1


def test_what_cannot_be_trained_on_kept_states_is_said_before_anything_is_written(tmp_path: Path) -> None:
    settings = {"steps": 2, "frozen_states": tmp_path / "states"}
    with pytest.raises(StateError, match="drops values"):
        run(tiny.classifier("freeze(layers=1)"), settings=settings, output=tmp_path / "run")
    with pytest.raises(StateError, match="below which no layer is frozen"):
        run(tiny.classifier("lora"), settings=settings, output=tmp_path / "run")
    quiet = tiny.classifier("freeze(layers=1)", dropout=0.0)
    with pytest.raises(TrainingError, match="the same folder"):
        run(quiet, settings={**settings, "frozen_states": tmp_path / "run"}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(quiet, settings=settings, output=tmp_path / "run")  # as advised, with the same output


@pytest.mark.parametrize(
    ("measured", "package"),
    [
        (TextClassification(label_names=("a", "b")), "scikit-learn"),
        (TextRegression(), "scikit-learn"),
        (TokenTagging(label_names=("O", "B-person")), "seqeval"),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else "",
)
def test_a_package_that_measuring_needs_is_missed_before_the_training(
    measured: Task, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.check_metrics()
    for module in measured.metric_modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DeltuneError, match=package):
        measured.check_metrics()


def test_a_run_that_could_not_be_measured_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(DeltuneError, match="scikit-learn"):
        run(tiny.classifier(), settings={"steps": 2}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_another_dropout_is_another_run(tmp_path: Path) -> None:
    run(tiny.classifier(), settings={"steps": 2}, output=tmp_path)
    with pytest.raises(StateError, match=r"dropouts\.hidden_dropout_prob was 0\.1 and is 0\.0 now"):
        run(tiny.classifier(dropout=0.0), settings={"steps": 2}, output=tmp_path)
    file = tmp_path / "run.json"
    content = json.loads(file.read_text())
    del content["run"]["dropouts"]  # as earlier versions wrote it
    file.write_text(json.dumps(content))
    assert run(tiny.classifier(), settings={"steps": 2}, output=tmp_path).steps == 2


@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=2, dropout=0.2)",
        "prefix-tuning(length=2)",
        "ladder-side-tuning(reduction=2)",
        "lora + bitfit",
        "full",
    ],
)
def test_a_stopped_run_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    settings = {"gradient_accumulation": 2, "evaluate_every": 3, "save_every": 2, "epochs": 3, "patience": 5}
    settings["drop_layers"] = method.startswith("lora(")
    whole = tiny.classifier(method)
    expected = run(whole, output=tmp_path / "whole", settings=settings)
    for seed, step in enumerate((1, 5, 9)):
        # later ones begin with other weights: the first checkpoint holds those of the first one
        with pytest.raises(KeyboardInterrupt):
            run(
                tiny.classifier(method, seed=seed),
                output=tmp_path / "stopped",
                settings=settings,
                callbacks=[StopAt(step)],
            )
    last = tiny.classifier(method, seed=99)
    result = run(last, output=tmp_path / "stopped", settings=settings)
    assert tiny.equal(tiny.weights(last), tiny.weights(whole))
    assert (result.metrics, result.history, result.best_step) == (
        expected.metrics,
        expected.history,
        expected.best_step,
    )
    files = [tmp_path / name / "delta.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_writing_checkpoints_and_measuring_change_nothing(tmp_path: Path) -> None:
    one, other = tiny.classifier(), tiny.classifier()
    run(one, settings={"keep_best": False})
    run(other, output=tmp_path, settings={"keep_best": False, "evaluate_every": 1, "save_every": 1})
    assert tiny.equal(tiny.weights(one), tiny.weights(other))


def test_a_run_that_has_ended_returns_its_result(tmp_path: Path) -> None:
    first, second = tiny.classifier("prefix-tuning(length=2)"), tiny.classifier("prefix-tuning(length=2)", seed=8)
    result = run(first, output=tmp_path)
    assert run(second, output=tmp_path, callbacks=[StopAt(1)]) == result
    assert tiny.equal(tiny.weights(first), tiny.weights(second))


def test_patience_ends_a_run_early_and_for_good(tmp_path: Path) -> None:
    settings = {"steps": 40, "evaluate_every": 1, "patience": 2, "learning_rate": 1e-9, "save_every": 1}
    result = run(output=tmp_path / "one", settings=settings)
    assert result.stopped_early
    assert result.steps == 3
    assert result.best_step == 1
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path / "two", settings=settings, callbacks=[StopAt(3)])
    assert run(output=tmp_path / "two", settings=settings).steps == 3


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(output=tmp_path, settings={"steps": 2})
    with pytest.raises(StateError, match=r"settings.learning_rate was 0.005 and is 0.1 now.*--restart"):
        run(output=tmp_path, settings={"steps": 2, "learning_rate": 0.1})
    with pytest.raises(StateError, match=r"method.rank was 2 and is 3 now"):
        run(tiny.classifier("lora(rank=3, dropout=0.2)"), output=tmp_path, settings={"steps": 2})
    with pytest.raises(StateError, match=r"data.evaluation was"):
        run(output=tmp_path, settings={"steps": 2}, evaluation=tiny.reviews(5))
    other = run(output=tmp_path, settings={"steps": 3}, resume=False)
    assert other.steps == 3


def test_a_delta_from_elsewhere_is_not_overwritten(tmp_path: Path) -> None:
    tiny.classifier().save(tmp_path)
    with pytest.raises(StateError, match="did not write"):
        run(output=tmp_path)


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path, callbacks=[StopAt(1)])
    halves = [tmp_path / ".delta.safetensors.abc.part", tmp_path / "checkpoints" / ".checkpoint-8.abc.part"]
    halves[0].write_bytes(b"half")
    halves[1].mkdir()
    (halves[1] / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path, callbacks=[StopAt(1)])
    assert not any(half.exists() for half in halves)


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = tiny.classifier()
    run(expected)
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path, settings={"save_every": 2}, callbacks=[StopAt(7)])
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-6"]
    damaged = folders[-1] / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    tuned = tiny.classifier()
    run(tuned, output=tmp_path, settings={"save_every": 2})
    assert "checkpoint-6 is damaged" in caplog.text
    assert tiny.equal(tiny.weights(tuned), tiny.weights(expected))


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path, callbacks=[StopAt(1)])
    (tmp_path / "checkpoints" / "checkpoint-0" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged.*--restart"):
        run(output=tmp_path)


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+ of 40.*third of it.*last good training checkpoint is kept"):
        run(
            tiny.classifier("full"),
            output=tmp_path,
            settings={"learning_rate": 1e30, "schedule": "constant", "steps": 40, "warmup_ratio": 0, "save_every": 1},
        )
    assert any((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "result.json").exists()


def test_bfloat16_and_gradient_checkpointing_train() -> None:
    plain = run(tiny.classifier(dropout=0.0), settings={"steps": 6})
    recomputed = run(tiny.classifier(dropout=0.0), settings={"steps": 6, "gradient_checkpointing": True})
    assert [row["loss"] for row in recomputed.history] == pytest.approx([row["loss"] for row in plain.history])
    low = run(tiny.classifier(dropout=0.0), settings={"steps": 6, "precision": "bfloat16"})
    assert [row["loss"] for row in low.history] == pytest.approx([row["loss"] for row in plain.history], rel=0.03)
    assert [row["loss"] for row in low.history] != [row["loss"] for row in plain.history]


def test_without_evaluation_the_last_weights_are_kept() -> None:
    result = run(evaluation=None, settings={"steps": 2})
    assert (result.metrics, result.best_step) == ({}, None)


def test_one_attachment_must_be_live() -> None:
    tuned = tiny.classifier()
    tuned.activate()
    with pytest.raises(StateError, match=r"those that are live are: none.*attached are: default"):
        run(tuned)


def test_the_tokenizer_of_the_model_is_found_or_asked_for(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    tuned = deltune.attach(tiny.task().load_model(str(folder)), "bitfit")
    assert fit(tuned, tiny.task(), tiny.reviews(8), settings=tiny.SETTINGS.updated(steps=1)).steps == 1
    with pytest.raises(StateError, match="Pass tokenizer="):
        fit(tiny.classifier(), tiny.task(), tiny.reviews(8))


def test_encoded_data_are_taken_as_they_are() -> None:
    rows = tiny.task().encode(tiny.reviews(20), tiny.tokenizer())
    with pytest.raises(DataError, match="no column 'length'"):
        fit(tiny.classifier(), tiny.task(), rows.remove_columns("length"), tokenizer=tiny.tokenizer())
    one, other = tiny.classifier(), tiny.classifier()
    settings = tiny.SETTINGS.updated(steps=3)
    fit(one, tiny.task(), rows, tokenizer=tiny.tokenizer(), settings=settings)
    fit(other, tiny.task(), tiny.reviews(20), tokenizer=tiny.tokenizer(), settings=settings)
    assert tiny.equal(tiny.weights(one), tiny.weights(other))


def test_one_delta_is_trained_on_top_of_another_that_stays(tmp_path: Path) -> None:
    """Also in a run that was stopped and goes on."""

    def stack() -> Any:
        tuned = tiny.classifier()
        tuned.attach("pfeiffer-adapter(width=4)", name="language", train_head=False)
        tuned.attach("pfeiffer-adapter(width=3)", name="task", train_head=False)
        tuned.detach("default")
        for _, value in tuned.attachments["language"].parameters():
            torch.nn.init.normal_(value, std=0.1)
        tuned.activate("language", "task", stacked=True, frozen=["language"])
        return tuned

    options: dict[str, Any] = {"settings": {"steps": 6, "save_every": 2}}
    one = stack()
    below = {key: value.clone() for key, value in one.attachments["language"].parameters()}
    before = tiny.weights(one)
    run(one, output=tmp_path / "one", **options)
    assert all(torch.equal(value, below[key]) for key, value in one.attachments["language"].parameters())
    assert not tiny.equal(tiny.weights(one), before)
    loaded = deltune.load(tiny.classifier().detach(), tmp_path / "one")
    assert loaded.active == ("task",)

    with pytest.raises(KeyboardInterrupt):
        run(stack(), output=tmp_path / "two", callbacks=[StopAt(4)], **options)
    two = stack()
    run(two, output=tmp_path / "two", **options)
    assert tiny.equal(tiny.weights(two), tiny.weights(one))
