from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deltune.cli.progress import LiveProgress
from tests.cli.conftest import Command, Place, write_csv
from tests.tasks.tiny import byte_tokenizer, decoder


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from deltune.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("tune", "compare", "eval", "predict", "merge", "export", "ranks", "methods", "sites"):
        assert name in done.stdout


def test_version(deltune: Command) -> None:
    assert deltune("--version").out.strip() == "0.1.0"


def test_help_of_tune_lists_every_setting(deltune: Command) -> None:
    ended = deltune("tune", "--help")
    assert ended.status == 0
    for option in ("--epochs", "--patience", "--no-keep-best", "--config", "--restart", "--json", "[default: 16]"):
        assert option in ended.out


def test_tune_prints_a_table_and_goes_on_or_returns(place: Place, deltune: Command, tmp_path: Path) -> None:
    arguments = place.tune(tmp_path, "--method", "lora", "--rank", 2, "--targets", "attention.*", "--max-length", 32)
    ended = deltune(*arguments)
    assert ended.status == 0, ended.err
    assert "lora(rank=2, targets=attention.*)" in ended.out
    assert "accuracy" in ended.out
    assert "step 4 of 4" in ended.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["provenance"]["task"]["options"]["max_length"] == 32
    assert result["provenance"]["method"]["rank"] == 2
    assert {"command", "versions", "seed", "device", "data"} <= result["provenance"].keys()
    again = deltune(*arguments)
    assert again.status == 0
    assert "step" not in again.err.replace("steps", "")


def test_tune_reads_a_configuration_and_the_command_line_wins(place: Place, deltune: Command, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {place.model}\ndata: {place.train}\nevaluation: 0.2\noutput: {tmp_path / 'out'}\nmethod: lora\n"
        "rank: 2\nbatch-size: 8\nsteps: 9\nlearning_rate: 1e-3\nthreads: 1\nmax_length: 16\n"
    )
    ended = deltune("tune", "--config", file, "--steps", 3, "--rank", 3, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["steps"] == 3
    assert ended.json["provenance"]["method"]["rank"] == 3
    assert ended.json["settings"]["batch_size"] == 8
    assert ended.json["parameters"]["trainable"] > 0
    assert ended.out.count("\n") == 1


@pytest.mark.parametrize("method", ["lora(rank=2)+bitfit", "prefix-tuning(length=2)", "full"])
def test_tune_takes_any_method(method: str, place: Place, deltune: Command, tmp_path: Path) -> None:
    ended = deltune(*place.tune(tmp_path, "--method", method, "--json"))
    assert ended.status == 0, ended.err
    evaluated = deltune("eval", "--model", place.model, "--delta", tmp_path, "--data", place.test, "--json")
    assert evaluated.json["metrics"] == pytest.approx(ended.json["metrics"], abs=1e-6)


def test_two_texts_make_a_pair(place: Place, deltune: Command, tmp_path: Path) -> None:
    rows = [{"a": "the film", "b": word, "same": str(number)} for number, word in enumerate(("good", "bad"))] * 4
    data = write_csv(tmp_path / "pairs.csv", rows)
    ended = deltune(
        *("tune", "--model", place.model, "--data", data, "--text", "a", "--text", "b", "--label", "same"),
        *("--steps", 2, "--threads", 1, "--output", tmp_path / "out", "--json"),
    )
    assert ended.status == 0, ended.err
    options = ended.json["provenance"]["task"]["options"]
    assert (options["text"], options["text_pair"], options["label"]) == ("a", "b", "same")
    pair = ["--text", "the film", "--text", "good"]
    assert deltune("predict", "--model", place.model, "--delta", tmp_path / "out", *pair).json["label"] in ("0", "1")
    alone = deltune("predict", "--model", place.model, "--delta", tmp_path / "out", "--text", "the film")
    assert alone.status == 2
    assert "reads 2 texts (a, b)" in alone.err


def test_eval_measures_as_tune_did(place: Place, delta: Path, deltune: Command) -> None:
    ended = deltune("eval", "--model", place.model, "--delta", delta, "--data", place.test, "--json")
    expected = json.loads((delta / "result.json").read_text())["metrics"]
    assert ended.json["metrics"] == pytest.approx(expected, abs=1e-6)
    table = deltune("eval", "--model", place.model, "--delta", delta, "--data", place.test)
    assert "accuracy" in table.out


def test_predict_for_a_text_and_for_a_file(place: Place, delta: Path, deltune: Command, tmp_path: Path) -> None:
    typed = deltune("predict", "--model", place.model, "--delta", delta, "--text", "the film was good")
    assert typed.json["label"] in ("negative", "positive")
    file = tmp_path / "predictions.jsonl"
    ended = deltune("predict", "--model", place.model, "--delta", delta, "--data", place.test, "--output", file)
    assert ended.status == 0, ended.err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 30
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    assert deltune("predict", "--model", place.model, "--delta", delta).status == 2


def test_merge_writes_an_ordinary_model(place: Place, delta: Path, deltune: Command, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    ended = deltune("merge", "--model", place.model, "--delta", delta, "--output", output, "--json")
    assert ended.status == 0, ended.err
    assert 0 <= ended.json["drift"]["relative"] < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    batch = AutoTokenizer.from_pretrained(output)("the film was good", return_tensors="pt")
    with torch.no_grad():
        shares = model(**batch).logits.softmax(-1)[0].tolist()
    typed = deltune("predict", "--model", place.model, "--delta", delta, "--text", "the film was good")
    assert shares == pytest.approx(list(typed.json["probabilities"].values()), abs=1e-5)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert [item.name for item in tmp_path.iterdir()] == ["merged"]
    refused = deltune("merge", "--model", place.model, "--delta", delta, "--output", output)
    assert refused.status == 2
    assert "--overwrite" in refused.err
    replaced = deltune("merge", "--model", place.model, "--delta", delta, "--output", output, "--overwrite")
    assert replaced.status == 0
    assert "logits differ by at most" in replaced.out


def test_methods_lists_pages_and_json(deltune: Command) -> None:
    listed = deltune("methods", "--json").json
    assert {"full", "freeze", "bitfit", "lora", "sequential-adapter", "prefix-tuning", "prompt-tuning"} <= {
        row["name"] for row in listed
    }
    for row in listed:
        assert row["branch"]
        assert row["paper"]["citation"]
        assert all("default" in option for option in row["options"])
        page = deltune("methods", row["name"])
        assert page.status == 0
        assert all(f"--{option['name'].replace('_', '-')}" in page.out for option in row["options"])
    table = deltune("methods").out
    assert all(row["name"] in table for row in listed)


def test_sites_shows_roles_and_what_targets_select(place: Place, deltune: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((place.model / "config.json").read_text())
    ended = deltune("sites", tmp_path, "--targets", "attention.query")
    assert ended.status == 0, ended.err
    assert "attention.query" in ended.out
    assert "16 x 16" in ended.out
    assert "2 parts selected" in ended.out


def test_interruption_says_how_to_go_on(
    place: Place, deltune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: LiveProgress, args: object, state: object, control: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveProgress, "on_step_end", interrupt)
    ended = deltune(*place.tune(tmp_path))
    assert ended.status == 130
    assert "Run the same command again" in ended.err


def test_debug_shows_where_an_error_comes_from(place: Place) -> None:
    from deltune.cli import main
    from deltune.errors import MethodError

    with pytest.raises(MethodError):
        main(["methods", "lorra", "--debug"])


def test_a_decoder_is_tuned_measured_and_answers(deltune: Command, tmp_path: Path) -> None:
    model, data = tmp_path / "decoder", tmp_path / "data.jsonl"
    decoder().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in ("aa", "bb")] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", model, "--data", data]
    ended = deltune(
        *("tune", *options, "--evaluation", data, "--task", "instruction-tuning", "--template", "raw"),
        *("--method", "full", "--steps", 40, "--learning-rate", 0.02, "--threads", 1, "--output", tmp_path / "out"),
        "--json",
    )
    assert ended.status == 0, ended.err
    assert ended.json["metrics"]["perplexity"] < 3
    delta = ["--delta", tmp_path / "out"]
    measured = deltune("eval", *options, *delta, "--generate", "--max-new-tokens", 4, "--json")
    assert measured.json["metrics"]["exact_match"] >= 0.5
    answered = deltune("predict", "--model", model, *delta, "--text", "say aa", "--max-new-tokens", 4)
    assert answered.json.keys() == {"text"}
