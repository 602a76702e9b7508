"""Write the folders of AdapterHub's library that the tests read, and check those that deltune wrote.

It runs in an environment of its own, because that library needs an older transformers than deltune::

    python -m venv hub && hub/bin/pip install torch==2.13.0 && hub/bin/pip install adapters==1.3.0
    hub/bin/python tests/checkpoints/make_adapterhub_fixtures.py tests/checkpoints/adapterhub
    hub/bin/python tests/checkpoints/make_adapterhub_fixtures.py tests/checkpoints/adapterhub --check WRITTEN

For each model there is ``base`` (its configuration and weights, by save_pretrained), a folder for each case as the
library's ``save_adapter`` or ``save_adapter_setup`` wrote it, and ``reference.safetensors`` with the batch and the
logits of each case. Attention is eager: with sdpa the library's prefixes have no effect in GPT-2 and LLaMA.

``--check WRITTEN`` loads what ``python -m tests.checkpoints.write_adapterhub WRITTEN`` wrote from these fixtures
and compares logits.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapterhub_tables import CAUSAL, LABELS, MODELS, PICKLED, WITH_HEAD, batch, cases
from adapters import AdapterFusionConfig
from adapters import composition as composed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def randomize(parameters: list[tuple[str, Tensor]], seed: int) -> None:
    """Values that matter: of size 0.3, those of norms and scales around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in parameters:
            noise = torch.randn(value.shape, generator=generator)
            around_one = value.dim() == 1 and (("norm" in name and name.endswith("weight")) or name.endswith("scaling"))
            if ".loras." in name and name.endswith(".lora_B") and value.shape[-1] == 1:
                around_one = True
            if name.endswith(".m.weight"):
                value.mul_(1 + 0.2 * noise)
            elif "parametrizations" in name:
                continue
            else:
                value.copy_(1 + 0.3 * noise if around_one else 0.3 * noise)


def bare(kind: str, folder: Path | None = None) -> nn.Module:
    """The model with random weights of some size, or with those of a folder."""
    name, config, options = MODELS[kind]
    cls = getattr(transformers, name)
    if folder is not None:
        return cls.from_pretrained(folder, attn_implementation="eager").eval()
    model = cls(getattr(transformers, config)(**options, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * (1.0 / min(parameter.shape[0], parameter[0].numel()) ** 0.5))
    return model


def logits(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """What the model says."""
    with torch.no_grad():
        return model(**given).logits.detach().contiguous()


def own(model: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """The parameters of one adapter, each once."""
    return [(key, value) for key, value in model.named_parameters() if f".{name}." in f".{key}"]


def fused(kind: str, base: Path, config: str, folder: Path, given: Mapping[str, Tensor]) -> Tensor:
    """Two adapters and their fusion, as a whole set-up."""
    model = bare(kind, base)
    adapters.init(model)
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4 + 4 * seed))
        randomize(own(model, name), 20 + seed)
    setup = composed.Fuse("one", "two")
    model.add_adapter_fusion(setup, config=AdapterFusionConfig.load(config))
    randomize([(key, value) for key, value in model.named_parameters() if "adapter_fusion_layer" in key], 30)
    model.active_adapters = setup
    model.eval()
    model.save_adapter_setup(str(folder), setup, use_safetensors=True)
    return logits(model, given)


def flexible(kind: str, base: Path, folder: Path, given: Mapping[str, Tensor], head: str) -> Tensor:
    """An adapter of a model with flexible heads, with such a head."""
    model = adapters.AutoAdapterModel.from_pretrained(base, attn_implementation="eager")
    if head == "classification":
        model.add_classification_head("task", num_labels=LABELS, layers=2)
    elif head == "deep":
        model.add_classification_head("task", num_labels=LABELS, layers=3)
    else:
        model.add_tagging_head("task", num_labels=LABELS)
    model.add_adapter("task", config=adapters.SeqBnConfig(reduction_factor=4))
    model.active_adapters, model.active_head = "task", "task"
    randomize([*own(model, "task"), *((k, v) for k, v in model.named_parameters() if k.startswith("heads."))], 40)
    model.eval()
    model.save_adapter(str(folder), "task", with_head=True, use_safetensors=True)
    return logits(model, given)


def make(kind: str, target: Path) -> None:
    """All fixtures of one kind of model."""
    folder = target / kind
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    model = bare(kind)
    model.save_pretrained(base)
    given = batch(kind)
    recorded = {**given, "logits.base": logits(model, given)}
    for seed, (case, config) in enumerate(cases(kind).items()):
        model = bare(kind, base)
        adapters.init(model)
        name = "trained"
        torch.manual_seed(seed)  # for what has no values of its own below
        try:
            model.add_adapter(name, config=config)
        except Exception as error:
            print(f"{kind:12} {case:16} cannot be added: {type(error).__name__}: {error}")
            continue
        randomize(own(model, name), 100 + seed)
        with_head = (kind, case) in WITH_HEAD
        if with_head and "Classification" in type(model).__name__:  # a map to the vocabulary stays as it is
            head = [(k, v) for k, v in model.named_parameters() if not k.startswith(model.base_model_prefix)]
            randomize(head, 200 + seed)
        model.set_active_adapters(name)
        model.eval()
        try:
            # a gate is a mean over later positions too: what it says of one position alone is right everywhere
            short = {key: value[:, :1] for key, value in given.items()}
            causal = case == "unipelt" and kind in CAUSAL
            recorded[f"logits.{case}"] = logits(model, short if causal else given)
        except Exception as error:
            print(f"{kind:12} {case:16} does not run: {type(error).__name__}: {error}")
            continue
        safe = not case.startswith(PICKLED)
        model.save_adapter(str(folder / case), name, use_safetensors=safe, with_head=with_head)
        plain = recorded["logits.base"][:, : recorded[f"logits.{case}"].shape[1]]
        change = (recorded[f"logits.{case}"][:, -plain.shape[1] :] - plain).abs().max()
        print(f"{kind:12} {case:16} changes logits by {float(change):.2f}", "" if safe else "(pickled)")
    if kind == "bert":
        for case, config in (("fusion", "dynamic"), ("fusion_static", "static")):
            recorded[f"logits.{case}"] = fused(kind, base, config, folder / case, given)
    if kind == "roberta":
        for case in ("classification", "deep", "tagging"):
            recorded[f"logits.flex_{case}"] = flexible(kind, base, folder / f"flex_{case}", given, case)
    save_file(recorded, folder / "reference.safetensors")


def check(target: Path, written: Path) -> int:
    """Load what deltune wrote; the number of cases that differ."""
    wrong = 0
    for folder in sorted(written.glob("*/*")):
        kind, case = folder.parent.name, folder.name
        reference = load_file(target / kind / "reference.safetensors")
        given = {key: value for key, value in reference.items() if not key.startswith("logits.")}
        expected = reference[f"logits.{case}"]
        if kind in CAUSAL and case == "unipelt":
            given = {key: value[:, :1] for key, value in given.items()}
        model = bare(kind, target / kind / "base")
        adapters.init(model)
        if (folder / "adapter_setup.json").exists():
            setup = model.load_adapter_setup(str(folder), use_safetensors=True, set_active=True)[0]
            model.active_adapters = setup
        else:
            info: dict[str, Any] = {}
            head = (folder / "head_config.json").exists()
            # without it the classes with a fixed head leave the head's file alone
            options = {"with_head": True} if head else {"with_head": False}
            name = model.load_adapter(str(folder), use_safetensors=True, loading_info=info, set_active=True, **options)
            assert name
            # every layer has the pool of all prefixes once more
            missing = [key for key in info.get("missing_keys", ()) if ".prefix_tuning.pool." not in key]
            if info.get("unexpected_keys") or missing:
                print(f"{kind:12} {case:16} missing: {missing}, unexpected: {info.get('unexpected_keys')}")
                wrong += 1
        model.eval()
        difference = float((logits(model, given) - expected).abs().max())
        wrong += difference > 1e-5
        print(f"{kind:12} {case:16} {difference:.1e}", "" if difference <= 1e-5 else "DIFFERS")
    return wrong


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path, help="folder of the fixtures")
    parser.add_argument("--check", type=Path, metavar="WRITTEN", help="folder with what deltune wrote from them")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    given = parser.parse_args()
    if given.check is not None:
        return check(given.target, given.check)
    for kind in given.models:
        make(kind, given.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
