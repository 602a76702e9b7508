"""Folders of Hugging Face peft that are damaged, do not fit, or hold what deltune does not have."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune
from deltune.errors import CheckpointError
from tests.checkpoints.peft_cases import LENGTH, randomized, same
from tests.zoo import ARCHITECTURES

QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


def build(name: str = "bert", head: Any = "classification") -> Any:
    return ARCHITECTURES[name].build(head)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA of BERT that peft saved."""
    return saved(tmp_path / "lora", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


def saved(folder: Path, config: Any, name: str = "bert", head: Any = "classification") -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomized(peft.get_peft_model(build(name, head), config)).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change options of the configuration; None removes one."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change(folder: Path, function: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    function(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, words: str, model: Any = None, **options: Any) -> None:
    """The folder is refused with these words, and the model left as it was."""
    model = build() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        deltune.load(model, folder, **options)
    assert "_deltune_handle" not in vars(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"), rf"missing: {QUERY}\.lora_B\.weight"),
        (
            lambda tensors: [tensors.pop(f"{QUERY}.lora_{side}.weight") for side in "AB"],
            rf"missing: {QUERY}\.lora_A\.weight",
        ),
        (lambda tensors: tensors.update({f"{QUERY}.lora_C.weight": torch.ones(2)}), rf"unexpected: {QUERY}\.lora_C"),
        (
            lambda tensors: tensors.update({"base_model.model.bert.pooler.gate": torch.ones(2)}),
            r"unexpected: base_model\.model\.bert\.pooler\.gate",
        ),
        (
            lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.ones(2, 31)}),
            r"misshapen: .*query\.lora_A\.weight is \(2, 31\) in the file and \(2, 32\) in the model",
        ),
        (
            lambda tensors: tensors.update({f"{QUERY}.lora_B.weight": torch.ones(32, 3)}),
            r"misshapen: .*lora_B\.weight is \(32, 3\) in the file and \(32, 2\)",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.classifier.weight": torch.ones(4, 32)}),
            r"misshapen: .*classifier\.weight is \(4, 32\) in the file and \(3, 32\)",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.bert.encoder.layer.9.x.lora_A.weight": torch.ones(2, 2)}),
            r"unexpected: .*layer\.9",
        ),
    ],
    ids=["half", "absent", "unknown-factor", "unknown", "width", "ranks", "head", "layer"],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, function: Any, words: str) -> None:
    change(folder, function)
    refused(folder, words)


def test_files_that_are_cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(folder, r"adapter_model\.safetensors is damaged or cut short")
    file.write_bytes(content)
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text[:40])
    refused(folder, r"adapter_config\.json is damaged")
    config.unlink()
    refused(folder, r"There is no adapter_config\.json")
    config.write_text(text)
    file.unlink()
    refused(folder, r"neither adapter_model\.safetensors nor adapter_model\.bin")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("LORAX", "Did you mean 'LORA'"),
        ("LOHA", "type 'LOHA', which deltune does not read"),
        ("XLORA", "XLORA"),
        (..., "says no peft_type"),
    ],
)
def test_types_that_are_not_known(folder: Path, kind: Any, words: str) -> None:
    edit(folder, peft_type=kind)
    refused(folder, words)


def test_pickles_are_read_on_request_alone(folder: Path) -> None:
    expected = deltune.load(build(), folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, r"adapter_model\.bin is a pickle.*pickled=True")
    found = deltune.load(build(), folder, pickled=True)
    values = dict(expected.attachments["default"].parameters())
    assert all(torch.equal(value, values[key]) for key, value in found.attachments["default"].parameters())


class Harm:
    """A pickle that would write a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_that_runs_something_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Harm()}, folder / "adapter_model.bin")
    refused(folder, "weights_only", pickled=True)
    assert not (folder / "harmed").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\]"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"use_dora": True}, r"missing: .*lora_magnitude_vector"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_are_named(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder, **changes)
    refused(folder, words)


def test_options_that_are_not_known_are_told_unless_they_are_off(folder: Path) -> None:
    edit(folder, new_option=None, other_option=False, further_option=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltune.load(build(), folder)
    edit(folder, new_option=3, velora_config={"scale": 1.0})
    with pytest.warns(UserWarning, match="new_option=3 is not known") as caught:
        deltune.load(build(), folder)
    assert any("velora_config" in str(item.message) for item in caught)


def test_weights_that_are_tied_in_the_model_but_were_trained_apart(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    saved(tmp_path, config, "gpt2", "language")
    refused(tmp_path, r"lm_head\.weight alone, which is tied to transformer\.wte\.weight", build("gpt2", "language"))
    untied = ARCHITECTURES["gpt2"].build("language", tie_word_embeddings=False)
    assert "full(targets=lm_head)" in str(deltune.load(untied, tmp_path).attachments["default"].method)


def test_a_delta_of_another_model_or_without_its_head(folder: Path) -> None:
    refused(folder, "does not fit this model", build("gpt2"))
    refused(folder, "no head like the one that was trained", build(head="base"))
    loaded = deltune.load(build(head="base"), folder, strict=False)
    assert len(list(loaded.attachments["default"].parameters())) == 12


def test_an_adapter_below_the_folder_is_pointed_to(tmp_path: Path) -> None:
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="other")
    model.save_pretrained(tmp_path)
    refused(tmp_path, "these folders do: .*other")
    assert deltune.load(build(), tmp_path / "other", "mine").active == ("mine",)


def prompt(task: str | None) -> Any:
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH)


def p_tuning(task: str | None) -> Any:
    return peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=6)


def prefix(task: str | None) -> Any:
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH)


@pytest.mark.parametrize("config", [prompt, p_tuning])
def test_prompts_that_the_head_of_an_encoder_reads_are_refused(config: Any, tmp_path: Path) -> None:
    saved(tmp_path, config("SEQ_CLS"))
    refused(tmp_path, "lets it read the prompt's own output")
    # which is so: the pooled state of peft is that of the prompt's first row, ours that of the text's
    model = peft.get_peft_model(build(), config("SEQ_CLS")).eval()
    batch = ARCHITECTURES["bert"].batch(2, 5)
    batch.pop("position_ids", None)
    states: list[torch.Tensor] = []
    handle = model.get_base_model().bert.pooler.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    assert states[0].shape[1] == 5 + LENGTH


#: tuner, architecture, head, task, error, words: what peft itself cannot do
NOT_IN_PEFT: list[tuple[Any, str, Any, str | None, Any, str]] = [
    (prompt, "vit", "classification", "SEQ_CLS", AttributeError, "vocab_size"),
    (p_tuning, "vit", "classification", "SEQ_CLS", AttributeError, "vocab_size"),
    (prefix, "vit", "classification", "SEQ_CLS", AttributeError, "vocab_size"),
    (prompt, "t5", "classification", "SEQ_CLS", NotImplementedError, "input embeddings"),
    (p_tuning, "t5", "classification", "SEQ_CLS", NotImplementedError, "input embeddings"),
    (prefix, "t5", "classification", "SEQ_CLS", RuntimeError, "size of tensor"),
    (
        lambda task: peft.LoKrConfig(task_type=task, target_modules=["c_attn"]),
        "gpt2",
        "language",
        "CAUSAL_LM",
        TypeError,
        "Conv1D'> not supported",
    ),
    (
        lambda task: peft.LoraConfig(task_type=task, target_modules="all-linear"),
        "bert",
        "tokens",
        "TOKEN_CLS",
        TypeError,
        "modules_to_save cannot be applied",
    ),
]


@pytest.mark.parametrize(("config", "name", "head", "task", "error", "words"), NOT_IN_PEFT)
def test_cells_of_the_table_that_peft_itself_cannot_do(
    config: Any, name: str, head: Any, task: str | None, error: Any, words: str
) -> None:
    padding = "right" if ARCHITECTURES[name].pads else "none"
    batch = ARCHITECTURES[name].batch(padding=padding, head=head)
    with pytest.raises(error, match=words):
        peft.get_peft_model(build(name, head), config(task))(**batch)


def test_a_prompt_of_another_length_or_width(tmp_path: Path) -> None:
    saved(tmp_path, prompt("CAUSAL_LM"), "gpt2", "language")
    model = build("gpt2", "language")
    edit(tmp_path, num_virtual_tokens=4)
    refused(tmp_path, r"prompt_embeddings is \(3, 32\) in the file and \(4, 32\)", model)
    edit(tmp_path, num_virtual_tokens=3)
    change(tmp_path, lambda tensors: tensors.update(prompt_embeddings=torch.ones(3, 31)))
    refused(tmp_path, r"\(3, 31\) in the file and \(3, 32\)", model)
    change(tmp_path, lambda tensors: tensors.update(other=tensors.pop("prompt_embeddings")))
    refused(tmp_path, "missing: prompt_embeddings", model)


def test_the_outputs_of_what_was_loaded_are_those_of_the_loaded_tensors(folder: Path) -> None:
    """A change of a tensor in the file changes the outputs: nothing is filled from elsewhere."""
    batch = ARCHITECTURES["bert"].batch(2, 5)
    with torch.no_grad():
        before = deltune.load(build(), folder).model(**batch).logits
        change(folder, lambda tensors: tensors[f"{QUERY}.lora_B.weight"].mul_(2))
        after = deltune.load(build(), folder).model(**batch).logits
    assert same(after, before) > 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": None}, "lora_alpha=None, which is no number"),
        ({"lora_alpha": "much"}, "lora_alpha='much', which is no number"),
        ({"lora_alpha": "nan"}, "lora_alpha='nan', which is no number"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"lora_alpha": float("inf")}, "Infinity is no number"),
        ({"lora_dropout": None}, "lora_dropout=None, which is no number"),
        ({"lora_dropout": 2.0}, "cannot be understood"),
        ({"target_modules": "(query"}, "cannot be understood"),
        ({"alpha_pattern": ["query"]}, "cannot be understood"),
        ({"rank_pattern": 3, "alpha_pattern": {"(": 2}}, "cannot be understood"),
    ],
)
def test_nonsense_in_a_configuration_is_refused_with_the_folder(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    edit(folder, **changes)
    refused(folder, words)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (peft.LoKrConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]), {"r": 0}),
        (peft.LoKrConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]), {"alpha": None}),
        (peft.AdaLoraConfig(task_type="SEQ_CLS", init_r=2, total_step=9, target_modules=["query"]), {"init_r": None}),
        (peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), {"num_virtual_tokens": "three"}),
    ],
    ids=["lokr-rank", "lokr-alpha", "adalora", "prefix"],
)
def test_nonsense_for_other_tuners(config: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", config)
    edit(folder, **changes)
    refused(folder, "Nothing was loaded")


def test_factors_of_no_dimensions_and_deep_configurations(folder: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "adapter_config.json").write_text('{"peft_type": "LORA", "r": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(deep, "is damaged")
    change(folder, lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.tensor(1.0)}))
    refused(folder, str(folder))


def test_names_that_mean_one_tensor_and_whole_numbers(folder: Path) -> None:
    short = QUERY.replace(".bert", "")
    change(folder, lambda tensors: tensors.update({f"{short}.lora_A.weight": torch.ones(2, 32)}))
    refused(folder, r"twice: .*query\.lora_A\.weight, which another name in the file means too")
    change(folder, lambda tensors: tensors.pop(f"{short}.lora_A.weight"))
    name = f"{QUERY}.lora_A.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(folder, rf"no floating-point numbers: {name} is int8")


@pytest.mark.parametrize("alpha", [-3, 0])
def test_an_alpha_that_is_not_positive_goes_into_the_factors(folder: Path, alpha: int) -> None:
    edit(folder, lora_alpha=alpha)
    model = build()
    ids = torch.arange(12).view(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.PeftModel.from_pretrained(build(), folder).eval()(input_ids=ids).logits
    with pytest.warns(UserWarning, match="went into B"):
        tuned = deltune.load(model, folder)
    torch.testing.assert_close(tuned.model.eval()(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)
