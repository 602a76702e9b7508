"""Damaged and unknown folders of AdapterHub's library: each is refused with its reason, and nothing is attached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune
from deltune.checkpoints import recognised
from deltune.errors import CheckpointError
from tests.checkpoints.adapterhub_cases import FIXTURES, build
from tests.checkpoints.test_adapterhub_reading import copied
from tests.zoo import ARCHITECTURES

FIRST = "bert.encoder.layer.0.output.adapters.trained.adapter_down.0.weight"


def refused(folder: Path, message: str, kind: str = "bert", **options: Any) -> None:
    model = build(kind)
    with pytest.raises(CheckpointError, match=message):
        deltune.load(model, folder, pickled=True, **options)
    assert not any("deltune" in name for name, _ in model.named_modules())


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = with_tensors(copied("bert", "seq_bn", tmp_path / "missing"), lambda found: found.pop(FIRST))
    refused(folder, r"missing: encoder.0.ffn.down.weight\.")
    folder = with_tensors(
        copied("bert", "seq_bn", tmp_path / "more"), lambda found: found.update({f"{FIRST}s": torch.ones(1)})
    )
    refused(folder, "unexpected: encoder.layer.0.output.adapters.trained.adapter_down.0.weights")
    folder = with_tensors(
        copied("bert", "seq_bn", tmp_path / "other"), lambda found: found.update({FIRST: torch.ones(5, 16)})
    )
    refused(folder, r"misshapen: encoder.0.ffn.down.weight is \(5, 16\) in the file and \(4, 16\)", strict=False)


def test_damaged_files(tmp_path: Path) -> None:
    folder = copied("bert", "seq_bn", tmp_path / "cut")
    content = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(content[:-9])
    refused(folder, "adapter.safetensors is damaged or cut short")
    (folder / "adapter.safetensors").unlink()
    refused(folder, "neither adapter.safetensors nor pytorch_adapter.bin")
    folder = copied("bert", "prefix", tmp_path / "pickle")
    (folder / "pytorch_adapter.bin").write_bytes(b"no pickle")
    refused(folder, "pytorch_adapter.bin cannot be read with weights_only")
    folder = copied("bert", "seq_bn", tmp_path / "config")
    (folder / "adapter_config.json").write_text("{")
    assert recognised(folder).name == "adapterhub"
    refused(folder, "adapter_config.json is damaged")
    (folder / "adapter_config.json").unlink()
    refused(folder, "There is no adapter_config.json")
    folder = copied("bert", "double_seq_bn", tmp_path / "head")
    (folder / "head_config.json").unlink()
    refused(folder, "There is no head_config.json")


def test_folders_of_hugging_face_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "config": None}))
    with pytest.raises(CheckpointError):
        recognised(tmp_path, "adapterhub")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"config": {}, "name": "a"}))
    assert recognised(tmp_path).name == "adapterhub"


def test_configurations_that_say_nothing_or_nonsense(tmp_path: Path) -> None:
    folder = copied("bert", "seq_bn", tmp_path / "short")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "config": "pfeiffer"}))
    refused(folder, "says only 'pfeiffer' of the method")
    for number, (case, changes, message) in enumerate(
        (
            ("seq_bn", {"non_linearity": "reglu"}, r"cannot be built here: .*there is no activation 'reglu'"),
            ("seq_bn", {"reduction_factor": {"0": 4}}, "reduction_factor of layer 1 is None"),
            ("seq_bn", {"leave_out": [0, 1]}, "acts nowhere in this model"),
            ("seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln=post_add"),
            ("seq_bn", {"mh_adapter": True}, "no adapter that is placed as this one is"),
            ("par_bn", {"original_ln_after": False}, "original_ln_after=False"),
            ("seq_bn", {"stochastic_depth": 0.1}, "left out at random"),
            ("lora", {"composition_mode": "multiply"}, "known are add and scale"),
            ("lora", {"attn_matrices": ["q", "o"]}, "attn_matrices names 'o'; known are q, k, v"),
            ("lora", {"r": 5}, r"misshapen: encoder.0.attention.query.A is \(4, 16\)"),
            ("prefix_flat", {"prefix_length": 4}, "holds 192 numbers, but 4 positions in 2 layers"),
            ("prefix", {"non_linearity": "tan"}, r"no non_linearity 'tan'. Did you mean 'tanh'"),
        )
    ):
        refused(copied("bert", case, tmp_path / str(number), **changes), message)
    folder = copied("bert-tokens", "prompt", tmp_path / "prompt", combine="prefix_after_bos")
    refused(folder, "combine=prefix_after_bos", "bert-tokens")
    folder = copied("gpt2", "lora_all", tmp_path / "fused")
    name = "transformer.h.0.attn.c_attn.loras.trained.lora_A"
    with_tensors(folder, lambda found: found.update({name: found[name][:-1]}))
    refused(folder, "has 8 rows, which cannot be those of 3 matrices", "gpt2")


def test_copies_that_differ(tmp_path: Path) -> None:
    folder = copied("bert", "prefix_flat", tmp_path / "prefix_flat")
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    copy = next(name for name in tensors if ".pool." in name)
    tensors[copy] = tensors[copy] + 1
    torch.save(tensors, folder / "pytorch_adapter.bin")
    refused(folder, "are one tensor to the library, but differ")


def test_set_ups_that_are_no_fusion(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "bert" / "fusion", tmp_path / "fusion")
    file = tmp_path / "fusion" / "adapter_setup.json"
    setup = json.loads(file.read_text())
    setup["adapter_setup"]["type"] = "Stack"
    file.write_text(json.dumps(setup))
    refused(tmp_path / "fusion", "composition Stack of one, two")
    setup["adapter_setup"]["children"][0] = {"type": "Fuse", "children": ["one", "two"]}
    file.write_text(json.dumps(setup))
    refused(tmp_path / "fusion", r"nests compositions \(Stack of Fuse\)")


def test_fusions_that_deltune_cannot_do(tmp_path: Path) -> None:
    folder = tmp_path / "fusion"
    shutil.copytree(FIXTURES / "bert" / "fusion", folder)
    file = folder / "one,two" / "adapter_fusion_config.json"
    described = json.loads(file.read_text())
    for option, message in (
        ("temperature", "falls in training"),
        ("residual_before", "residual stream as a part of the values"),
        ("query_before_ln", "in front of the norm"),
    ):
        file.write_text(json.dumps({**described, "config": {**described["config"], option: True}}))
        refused(folder, message)
    file.write_text(json.dumps({**described, "config": {**described["config"], "key": False}}))
    refused(folder, "no maps of queries or of keys")
    file.write_text(json.dumps(described))
    shutil.rmtree(folder / "two")
    refused(folder, "there is no folder two in it or beside it")


def test_families_that_are_not_known(tmp_path: Path) -> None:
    folder = copied("bert", "seq_bn", tmp_path / "seq_bn", model_type="albert")
    model = ARCHITECTURES["albert"].build("classification")
    with pytest.raises(CheckpointError, match=r"models of the family 'albert'. Families that are: bert, roberta"):
        deltune.load(model, folder)
    tuned = deltune.attach(model, deltune.LoRA())
    with pytest.raises(CheckpointError, match="family 'albert'"):
        tuned.save(tmp_path / "out", format="adapterhub")
    assert not (tmp_path / "out").exists()


def described(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("lora", {"architecture": ["lora"]}),
        ("lora", {"r": None}),
        ("lora", {"r": 0, "use_dora": True}),
        ("lora", {"leave_out": 3}),
        ("lora", {"attn_matrices": None}),
        ("lora", {"architecture": "union"}),
        ("lora", {"architecture": "union", "configs": ["lora"]}),
        ("seq_bn", {"leave_out": 3}),
        ("seq_bn", {"reduction_factor": "some"}),
        ("prefix_flat", {"prefix_length": None}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_nonsense_in_a_configuration_is_refused_with_the_folder(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = copied("bert", case, tmp_path / "given")
    described(folder, "adapter_config.json", lambda content: content["config"].update(changes))
    refused(folder, rf"{folder}.*(cannot be understood .*Nothing was loaded|cannot be built here|no number)")


@pytest.mark.parametrize(
    "change",
    [
        lambda setup: setup.update(adapter_setup="Fuse"),
        lambda setup: setup["adapter_setup"].update(children=[3]),
        lambda setup: setup["adapter_setup"].update(children=None),
    ],
    ids=["text", "number", "none"],
)
def test_nonsense_in_a_set_up(change: Any, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "bert" / "fusion", tmp_path / "fusion")
    refused(described(tmp_path / "fusion", "adapter_setup.json", change), "Nothing was loaded|nests compositions")


def test_a_configuration_that_is_too_deep_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"config": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(tmp_path, "holds no delta")


@pytest.mark.parametrize("name", ["..", "../one", "/one", "a\\b", ""])
def test_names_do_not_lead_elsewhere(name: str, tmp_path: Path) -> None:
    words = "is no name of an adapter"
    for number, change in enumerate(
        (
            lambda setup: setup["adapter_setup"].update(children=[name, "two"]),
            lambda setup: setup.update(head_setup=name),
        )
    ):
        shutil.copytree(FIXTURES / "bert" / "fusion", tmp_path / f"setup{number}")
        refused(described(tmp_path / f"setup{number}", "adapter_setup.json", change), words)
    shutil.copytree(FIXTURES / "bert" / "fusion", tmp_path / "fusion")
    described(
        tmp_path / "fusion" / "one,two",
        "adapter_fusion_config.json",
        lambda content: content.update(adapter_names=["one", name]),
    )
    refused(tmp_path / "fusion", words)


def test_names_that_mean_one_tensor_and_whole_numbers(tmp_path: Path) -> None:
    folder = with_tensors(
        copied("bert", "seq_bn", tmp_path / "twice"),
        lambda found: found.update({FIRST.removeprefix("bert."): torch.ones(4, 16)}),
    )
    refused(folder, "twice")
    folder = with_tensors(
        copied("bert", "seq_bn", tmp_path / "whole"), lambda found: found.update({FIRST: found[FIRST].to(torch.int8)})
    )
    refused(folder, "is int8 in the file")


@pytest.mark.parametrize("case", ["seq_bn", "lora", "prefix_flat"])
def test_options_that_are_not_known_are_told_unless_they_are_off(case: str, tmp_path: Path) -> None:
    folder = copied("bert", case, tmp_path / case)
    described(folder, "adapter_config.json", lambda content: content["config"].update(new_option=0.5, off=False))
    with pytest.warns(UserWarning, match=r"the option new_option=0\.5 is not known to deltune and was ignored") as told:
        deltune.load(build("bert"), folder, pickled=True)
    assert len(told) == 1


def test_an_adapter_that_is_called_like_a_method_of_modules(tmp_path: Path) -> None:
    deltune.attach(build("bert"), deltune.LoRA(rank=2), name="trained").save(tmp_path / "one", format="adapterhub")
    described(tmp_path / "one", "adapter_config.json", lambda content: content.update(name="train"))
    with_tensors(
        tmp_path / "one",
        lambda found: [found.update({key.replace("trained", "train"): found.pop(key)}) for key in list(found)],
    )
    assert deltune.load(build("bert"), tmp_path / "one").active == ("train_",)


@pytest.mark.parametrize("changes", [{"composition_mode": "scale", "r": 1}, {"use_dora": True}], ids=["ia3", "dora"])
def test_gates_that_are_another_function_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    refused(copied("bert", "lora", tmp_path / "read", use_gating=True, **changes), "neither read nor written")
    method = "ia3(inputs=none, targets=attention.value)" if "r" in changes else "lora(rank=2, weight_decomposed=true)"
    kind = "bert" if "r" in changes else "llama"
    tuned = deltune.attach(build(kind), f"gated({method})")
    with pytest.raises(CheckpointError, match="neither read nor written"):
        tuned.save(tmp_path / "written", format="adapterhub")
    assert not (tmp_path / "written").exists()
