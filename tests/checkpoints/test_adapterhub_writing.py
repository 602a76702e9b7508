"""What ``save(format="adapterhub")`` writes is what AdapterHub's library wrote.

That library itself has loaded these folders and given the recorded logits: ``make_adapterhub_fixtures.py --check``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import CheckpointError
from tests.checkpoints.adapterhub_cases import FIXTURES, build, cases, logits, reference
from tests.zoo import ARCHITECTURES

#: What a network that was applied leaves behind, and what the library does not read with gates.
_OTHER = {"prefix_tuning": {"flat", "bottleneck_size", "non_linearity"}, "lora": {"alpha", "attn_matrices"}}
WRITTEN = [(kind, case) for kind, case in cases() if not case.startswith(("flex_", "fusion"))]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Those of a folder, without the copies that the library writes into its pickles."""
    file = folder / "adapter.safetensors"
    found: dict[str, Tensor] = (
        load_file(file) if file.exists() else torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    )
    return {key: value for key, value in found.items() if ".prefix_tuning.pool." not in key}


def parts(folder: Path) -> list[dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    return sorted(config.get("configs", [config]), key=lambda part: str(part.get("architecture")))


def saved(method: deltune.methods.Method | str, folder: Path, name: str = "bert", head: Any = "base") -> deltune.Tuned:
    tuned = deltune.attach(ARCHITECTURES[name].build(head), method, name="trained", train_head=False)
    tuned.save(folder, format="adapterhub")
    return tuned


@pytest.mark.parametrize(("kind", "case"), WRITTEN)
@pytest.mark.filterwarnings("ignore")
def test_what_was_read_is_written_as_it_was(kind: str, case: str, tmp_path: Path) -> None:
    tuned = deltune.load(build(kind), FIXTURES / kind / case, pickled=True)
    tuned.save(tmp_path / case, format="adapterhub")
    written, wanted = tensors(tmp_path / case), tensors(FIXTURES / kind / case)
    made = {key for key in wanted if ".prefix_tunings." in key and ("wte" in key or ".control_trans." in key)}
    flat = {key for key in written if key.endswith(".control_trans")}
    assert {key.partition("_trans")[0] for key in flat} == {
        key.partition("wte")[0] + "control" for key in made if "wte" in key
    } | {key.partition("_trans")[0] for key in wanted if key.endswith(".control_trans")}
    same = wanted.keys() - made
    assert written.keys() - flat == same - flat
    assert all(torch.equal(written[key], wanted[key]) for key in same)
    for found, expected in zip(parts(tmp_path / case), parts(FIXTURES / kind / case), strict=True):
        assert found.keys() == expected.keys()
        other = _OTHER.get(str(found.get("architecture")), {"reduction_factor"} if case == "uneven" else set())
        if case not in ("unipelt", "lora_left_out"):
            other = other - {"alpha", "attn_matrices"}
        assert {key for key in found if found[key] != expected[key]} <= other
    one, two = (
        json.loads((place / "adapter_config.json").read_text()) for place in (tmp_path / case, FIXTURES / kind / case)
    )
    assert one.keys() == two.keys()
    assert all(one[key] == two[key] for key in one.keys() - {"config", "model_name"})
    again = deltune.load(build(kind), tmp_path / case)
    for (key, value), (_, before) in zip(
        again.attachments["trained"].parameters(), tuned.attachments["trained"].parameters(), strict=True
    ):
        assert torch.equal(value, before), key


@pytest.mark.parametrize("case", ["fusion", "fusion_static"])
def test_a_fusion_is_written_with_its_adapters(case: str, tmp_path: Path) -> None:
    source = FIXTURES / "bert" / case
    tuned = deltune.load(build("bert"), source, "both")
    tuned.save(tmp_path, format="adapterhub")
    setup, wanted = (json.loads((place / "adapter_setup.json").read_text()) for place in (tmp_path, source))
    renamed = {"one": "both_1", "two": "both_2"}
    assert setup == json.loads(
        json.dumps(wanted).replace('"one"', f'"{renamed["one"]}"').replace('"two"', f'"{renamed["two"]}"')
    )
    for theirs, ours in renamed.items():
        found = tensors(tmp_path / ours)
        expected = {key.replace(f".{theirs}.", f".{ours}."): value for key, value in tensors(source / theirs).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    together = ",".join(renamed.values())
    found = load_file(tmp_path / together / "model_adapter_fusion.safetensors")
    expected = load_file(source / "one,two" / "model_adapter_fusion.safetensors")
    assert found.keys() == {key.replace("one,two", together) for key in expected}
    assert all(torch.equal(found[key.replace("one,two", together)], value) for key, value in expected.items())
    given, _ = reference("bert", case)
    again = deltune.load(build("bert"), tmp_path)
    assert torch.equal(logits(again.model, given), logits(tuned.model, given))


def test_a_head_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    source = FIXTURES / "bert" / "double_seq_bn"
    deltune.load(build("bert"), source).save(tmp_path, format="adapterhub")
    found, wanted = (load_file(place / "model_head.safetensors") for place in (tmp_path, source))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    one, two = (json.loads((place / "head_config.json").read_text()) for place in (tmp_path, source))
    assert one.keys() == two.keys()
    assert all(one[key] == two[key] for key in one.keys() - {"model_name"})


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("mam(width=8, length=4, reads=stream)", "gpt2"),
        ("mam(width=8, length=4)", "bart"),
        ("prefix-tuning(length=4, width=6)", "llama-gqa"),
        ("lora(rank=4, alpha=3, rank_stabilized=true, targets='attention.query ffn.*')", "bert"),
        ("pfeiffer-adapter(width=5, scale=channel, layer_norm=true, activation=leaky_relu)", "t5"),
        ("pfeiffer-adapter(width=31)", "bert"),
        ("sequential-adapter(width=3, train_norms=false, targets='attention layers=1:')", "vit"),
        ("residual-adapter(width=4)", "gpt2"),
        ("ia3(targets=attention.value,ffn.up, inputs=none)", "bert"),
        ("prompt-tuning(length=3, behind_embeddings=true)", "bert"),
        ("gated(lora(rank=2), pfeiffer-adapter(width=4), pooling=all)", "bert"),
        ("unipelt(pooling=all, length=2, width=4, rank=2)", "bert"),
        ("unipelt(gates=none, length=2, width=4, rank=2)", "gpt2"),
        ("gated(lora(rank=2, alpha=2), prefix-tuning(length=2), pooling=all, shared=false)", "vit"),
    ],
)
def test_own_methods_give_the_same_outputs_when_read_again(method: str, name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    tuned = deltune.attach(architecture.build("base"), method, name="trained")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    batch = architecture.batch()
    tuned.model.eval()
    tuned.save(tmp_path, format="adapterhub")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = deltune.load(architecture.build("base").eval(), tmp_path)
    assert again.active == ("trained",)
    one, two = (output(model, batch) for model in (tuned.model, again.model))
    assert float((one - two).abs().max()) < 1e-5
    assert float((one - output(architecture.build("base").eval(), batch)).abs().max()) > 1e-3


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("bitfit", "bert", "trains parameters of the model itself"),
        ("krona", "bert", "no form for krona"),
        ("sequential-adapter(width=4)", "bert", "trains parameters of the model itself"),
        ("lora(targets=attention.output)", "bert", "no lora at encoder.0.attention.output"),
        ("lora(rank=2, rank_pattern='attention.value -> 4')", "bert", "one rank and one scale for all matrices"),
        (
            "lora(targets='attention.query layers=0') + lora(targets='attention.value layers=1')",
            "bert",
            "not at encoder.0",
        ),
        ("lora(weight_decomposed=true)", "bert", "has a bias"),
        ("ia3", "bert", "only outputs"),
        ("parallel-adapter(width=4)", "gpt2", "reads=stream"),
        ("parallel-adapter(width=4, targets=attention)", "bert", "attention_changes=result"),
        ("prefix-tuning(length=2, shift_positions=true)", "gpt2", "shift_positions"),
        ("prefix-tuning(length=2)", "t5", "distances between tokens"),
        ("prefix-tuning(length=2, targets='attention stacks=encoder,cross')", "bart", "not at|without the self_prefix"),
        ("prompt-tuning(length=2)", "bert", "behind_embeddings=true"),
        ("prompt-tuning(length=2)", "gpt2", "no prompts for models of the family 'gpt2'"),
        ("gated(lora(rank=2), gate=scalar)", "bert", "gate=scalar"),
        (
            "gated(lora(rank=2, targets=attention.query)) + lora(rank=2, targets=attention.value)",
            "bert",
            "some have gates",
        ),
        ("pfeiffer-adapter(width=4) + parallel-adapter(width=4)", "bert", "different options"),
        ("adapter-fusion(adapters='pfeiffer-adapter, pfeiffer-adapter', temperature=2)", "bert", "temperature 2"),
    ],
)
def test_what_the_library_has_no_form_for_is_refused_and_nothing_written(
    method: str, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        saved(method, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_prompt_behind_the_embeddings_is_none_of_pefts(tmp_path: Path) -> None:
    tuned = deltune.attach(build("bert-tokens"), "prompt-tuning(length=3, behind_embeddings=true)")
    with pytest.raises(CheckpointError, match="behind_embeddings"):
        tuned.save(tmp_path / "out", format="peft")
    tuned = deltune.attach(build("bert"), "prompt-tuning(length=3, behind_embeddings=true)")
    with pytest.raises(CheckpointError, match="reads the first position"):
        tuned.save(tmp_path / "out", format="adapterhub")
    assert not (tmp_path / "out").exists()


def test_pruned_fusions_are_refused(tmp_path: Path) -> None:
    tuned = deltune.load(build("bert"), FIXTURES / "bert" / "fusion")
    given, _ = reference("bert", "fusion")
    deltune.prune_adapters(tuned, deltune.adapter_use(tuned, [given]), keep=1)
    with pytest.raises(CheckpointError, match=r"left out at encoder\.0\.ffn"):
        tuned.save(tmp_path / "out", format="adapterhub")


def test_gates_that_leave_padding_out_are_said_to_count_it_there(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="count padding"):
        saved("gated(lora(rank=2), pfeiffer-adapter(width=4))", tmp_path / "mean")
    with pytest.warns(UserWarning, match="mean over all positions"):
        saved("gated(lora(rank=2), pfeiffer-adapter(width=4))", tmp_path / "token", "gpt2")
