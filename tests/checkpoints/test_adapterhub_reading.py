"""What AdapterHub's library saved gives its outputs after ``deltune.load``.

The fixtures are what ``make_adapterhub_fixtures.py`` had ``adapters`` 1.3.0 write, with the logits of that library.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune
from deltune.errors import CheckpointError
from tests.checkpoints.adapterhub_cases import FIXTURES, REFUSED, build, cases, difference, logits, reference

TOLERANCE = 1e-5


def load(kind: str, case: str, folder: Path | None = None, **options: Any) -> deltune.Tuned:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deltune.load(build(kind, case), folder or FIXTURES / kind / case, pickled=True, **options)


def copied(kind: str, case: str, folder: Path, **changes: Any) -> Path:
    """A copy of a fixture, with changes of its configuration."""
    shutil.copytree(FIXTURES / kind / case, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, value in changes.items():
        place = config["config"] if name in config["config"] else config
        if value is None:
            place.pop(name, None)
        else:
            place[name] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("kind", "case"), list(cases()))
def test_outputs_are_those_of_the_library(kind: str, case: str, tmp_path: Path) -> None:
    given, recorded = reference(kind, case)
    bare = build(kind, case)
    assert difference(kind, logits(bare, given), recorded, given) > 0.1
    tuned = load(kind, case)
    found = logits(tuned.model, given)
    assert difference(kind, found, recorded, given) < TOLERANCE
    with tuned.disabled():
        if not tuned.attachments[tuned.active[0] if tuned.active else next(iter(tuned.attachments))].head_names:
            assert torch.equal(logits(tuned.model, given), logits(bare, given))
    tuned.save(tmp_path / "native")
    again = deltune.load(build(kind, case), tmp_path / "native")
    assert torch.equal(logits(again.model, given), found)


@pytest.mark.parametrize(("kind", "case"), list(cases(readable=False)))
def test_what_deltune_cannot_do_is_said(kind: str, case: str) -> None:
    model = build(kind, case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=REFUSED.get(f"{kind}/{case}") or REFUSED[case]):
        deltune.load(model, FIXTURES / kind / case, pickled=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_there_is_a_case_of_every_kind() -> None:
    found = set(cases())
    assert len(found) > 90
    for kind in ("bert", "gpt2", "llama", "bart"):
        assert {(kind, case) for case in ("seq_bn", "par_bn", "lora_all", "prefix", "mam", "unipelt")} <= found
    assert {("bert", "fusion"), ("bert-tokens", "prompt"), ("t5", "cross"), ("vit", "lora")} <= found


def test_it_is_attached_under_its_name_or_another() -> None:
    assert load("bert", "seq_bn").active == ("trained",)
    assert load("bert", "seq_bn", name="mine").active == ("mine",)
    assert load("bert", "fusion").active == ("one_two",)


@pytest.mark.parametrize("case", ["prefix", "mam", "norm_before"])
def test_pickles_are_read_on_request_alone(case: str) -> None:
    with pytest.raises(CheckpointError, match=r"pytorch_adapter.bin is a pickle.*pickled=True"):
        deltune.load(build("bert"), FIXTURES / "bert" / case)


def test_a_head_is_loaded_with_its_adapter() -> None:
    for kind, case, file in (("bert", "double_seq_bn", "model_head.safetensors"), ("distilbert", "seq_bn", None)):
        tuned = load(kind, case)
        head = load_file(FIXTURES / kind / case / (file or "model_head.safetensors"))
        parameters = dict(tuned.model.named_parameters())
        assert set(tuned.attachments["trained"].head_names) == set(head)
        assert all(torch.equal(parameters[name], value) for name, value in head.items())


def test_a_frozen_map_to_the_vocabulary_is_passed_over_only_where_it_is_the_same(tmp_path: Path) -> None:
    assert not load("gpt2", "lora").attachments["trained"].head_names
    folder = copied("gpt2", "lora", tmp_path / "changed")
    head = load_file(folder / "model_head.safetensors")
    save_file({name: value + 1 for name, value in head.items()}, folder / "model_head.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head.weight.*strict=False"):
        load("gpt2", "lora", folder)
    assert load("gpt2", "lora", folder, strict=False).active == ("trained",)


def test_a_flexible_head_that_is_no_class_of_transformers_can_be_left_out() -> None:
    given, _ = reference("roberta", "seq_bn" if ("roberta", "seq_bn") in set(cases()) else "double_seq_bn")
    tuned = load("roberta", "flex_deep", strict=False)
    assert len(tuned.attachments["task"].forms) == 2
    assert not torch.equal(logits(tuned.model, given), logits(build("roberta"), given))


def test_what_is_not_quite_the_same_is_said() -> None:
    with pytest.warns(UserWarning, match="mean over all positions"):
        deltune.load(build("gpt2"), FIXTURES / "gpt2" / "unipelt", pickled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltune.load(build("bert"), FIXTURES / "bert" / "unipelt", pickled=True)


def test_a_prompt_whose_head_would_read_its_first_row_is_refused() -> None:
    with pytest.raises(CheckpointError, match="BertForSequenceClassification reads the first position"):
        deltune.load(build("bert"), FIXTURES / "bert-tokens" / "prompt")


def test_dropout_behind_the_bottleneck_is_said_to_be_inside(tmp_path: Path) -> None:
    folder = copied("bert", "seq_bn", tmp_path / "seq_bn", dropout=0.1)
    with pytest.warns(UserWarning, match="dropout acts inside"):
        tuned = deltune.load(build("bert"), folder)
    assert tuned.attachments["trained"].method.to_dict()["dropout"] == 0.1


def test_folders_of_old_versions(tmp_path: Path) -> None:
    given, recorded = reference("bert", "seq_bn")
    folder = copied("bert", "seq_bn", tmp_path / "seq_bn", version=None)
    tensors = load_file(folder / "adapter.safetensors")
    old = {name.replace(".adapters.", ".layer_text_task_adapters."): value for name, value in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, folder / "adapter.safetensors")
    assert difference("bert", logits(load("bert", "seq_bn", folder).model, given), recorded, given) < TOLERANCE
    activations = {("gelu", None): "gelu_new", ("gelu", "adapters.1.3.0"): "gelu", ("LeakyReLU", None): "leaky_relu"}
    for number, ((given_name, version), meant) in enumerate(activations.items()):
        folder = copied("bert", "seq_bn", tmp_path / str(number), non_linearity=given_name, version=version)
        assert load("bert", "seq_bn", folder).attachments["trained"].method.to_dict()["activation"] == meant


def test_lora_was_not_scaled_before_version_1_1(tmp_path: Path) -> None:
    for number, (version, alpha) in enumerate({"1.0.1": 4.0, "1.1.0": 8.0, "1.3.0": 8.0}.items()):
        folder = copied("bert", "lora", tmp_path / str(number), version=f"adapters.{version}")
        assert load("bert", "lora", folder).attachments["trained"].method.to_dict()["alpha"] == alpha


def test_an_adapter_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of the type 'bert'; the given one is 'electra'"):
        deltune.load(build("electra"), FIXTURES / "bert" / "seq_bn")
    tuned = deltune.load(build("electra"), FIXTURES / "bert" / "seq_bn", strict=False)
    assert tuned.active == ("trained",)


def test_a_set_up_of_one_adapter(tmp_path: Path) -> None:
    given, recorded = reference("bert", "seq_bn")
    copied("bert", "seq_bn", tmp_path / "trained")
    setup = {"adapter_setup": {"type": "single", "children": ["trained"]}, "head_setup": None}
    (tmp_path / "adapter_setup.json").write_text(json.dumps(setup))
    tuned = deltune.load(build("bert"), tmp_path)
    assert difference("bert", logits(tuned.model, given), recorded, given) < TOLERANCE


def test_a_folder_of_a_fusion_alone_finds_its_adapters_beside_it() -> None:
    given, recorded = reference("bert", "fusion")
    tuned = deltune.load(build("bert"), FIXTURES / "bert" / "fusion" / "one,two")
    assert difference("bert", logits(tuned.model, given), recorded, given) < TOLERANCE
    use = deltune.adapter_use(tuned, [given])
    assert all(abs(sum(row) - 1) < 1e-6 for row in use.values())
