"""From an attachment to a folder that peft reads, with the same outputs.

What is written follows from the forms: each kind of form has one tuner of peft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.checkpoints.files import staged, write_json, write_tensors
from deltune.checkpoints.peft.layout import CONFIG_FILE, PICKLE_FILE, PREFIX, PROMPT_PREFIX, TENSOR_FILE
from deltune.checkpoints.peft.tuners import Placed, Written, write_ia3, write_lokr, write_lora, write_prefix, write_rows
from deltune.errors import CheckpointError
from deltune.methods.additive.ia3 import InputScale, OutputScale
from deltune.methods.additive.p_tuning import PseudoTokens
from deltune.methods.additive.prefix_forms import Prefix
from deltune.methods.additive.prompt_tuning import Prompt
from deltune.methods.reparameterized.krona import KroneckerWeight
from deltune.methods.reparameterized.low_rank import LowRank
from deltune.sites import Form, PositionShift, PseudoTokenSite, SelectionForm, TokenSite, WeightSite

__all__ = ["write"]

Writer = Callable[[list[Placed], nn.Module, Anatomy], Written]

#: For each kind of form its tuner, and the sites at which the tuner has it.
_TUNERS: tuple[tuple[type[Form] | tuple[type[Form], ...], str, Writer], ...] = (
    (LowRank, "LORA", write_lora),
    (KroneckerWeight, "LOKR", write_lokr),
    ((InputScale, OutputScale), "IA3", write_ia3),
    ((Prefix, PositionShift), "PREFIX_TUNING", write_prefix),
    (Prompt, "PROMPT_TUNING", write_rows),
    (PseudoTokens, "P_TUNING", write_rows),
)
#: Task types by the end of the name of a model's class.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def write(attachment: Attachment, model: nn.Module, anatomy: Anatomy, folder: Path) -> Path:
    """Write ``attachment`` into ``folder``.

    Raises:
        CheckpointError: if peft has nothing like it; nothing is written then.
    """
    kind, writer, placed = _tuner(attachment)
    written = writer(placed, model, anatomy)
    task = _task_type(model)
    learned = kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
    if learned and task is None:
        raise CheckpointError(
            f"peft puts prompts and prefixes in front of the tasks that it knows ({', '.join(_TASK_TYPES)}), and "
            f"{type(model).__name__} is none of these. Save in deltune's own format."
        )
    config: dict[str, Any] = {
        "auto_mapping": None if task else _mapping(model),
        "base_model_name_or_path": str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None,
        "inference_mode": True,
        "modules_to_save": sorted(anatomy.head) if attachment.head_names else None,
        "peft_type": kind,
        "revision": None,
        "task_type": task,
        **written.config,
    }
    tensors = {**written.tensors, **_selected(attachment, written, config, model, learned)}
    with staged(folder, (CONFIG_FILE, TENSOR_FILE, PICKLE_FILE)) as place:
        write_tensors(place / TENSOR_FILE, tensors, {"format": "pt"})
        write_json(place / CONFIG_FILE, config)
    return folder


def _tuner(attachment: Attachment) -> tuple[str, Writer, list[Placed]]:
    """The tuner for all forms of ``attachment``, its writer, and the forms as they are stored.

    Raises:
        CheckpointError: if peft has none.
    """
    found: dict[str, tuple[Writer, list[Placed]]] = {}
    for placed in attachment.placed.values():
        if isinstance(placed.form, SelectionForm):
            raise CheckpointError(_refusal(attachment, "no adapter that trains single entries"))
        form = placed.form.stored()
        if form is None:
            continue
        match = next((row for row in _TUNERS if isinstance(form, row[0])), None)
        fits = isinstance(placed.site, WeightSite | TokenSite) or isinstance(form, Prefix | PositionShift)
        if match is None or not fits or isinstance(placed.site, PseudoTokenSite):
            raise CheckpointError(_refusal(attachment, f"nothing like its {type(form).__name__}"))
        found.setdefault(match[1], (match[2], []))[1].append(Placed(placed.site, form))
    if len(found) > 1:
        raise CheckpointError(_refusal(attachment, f"no adapter that is {' and '.join(found)} at once"))
    if not found:
        raise CheckpointError(_refusal(attachment, "no adapter that only trains parameters of the model"))
    kind, (writer, forms) = next(iter(found.items()))
    return kind, writer, forms


def _refusal(attachment: Attachment, reason: str) -> str:
    return (
        f"{attachment.name!r} ({attachment.method}) cannot be saved in the format of peft, which has {reason}. Save it "
        "with format='deltune', which holds every method."
    )


def _selected(
    attachment: Attachment, written: Written, config: dict[str, Any], model: nn.Module, learned: bool
) -> dict[str, Tensor]:
    """The model's own parameters that are trained, by their name in the file; adds to ``config`` what says so.

    Raises:
        CheckpointError: if peft cannot train these.
    """
    tensors: dict[str, Tensor] = {}
    prefix = PROMPT_PREFIX if learned else PREFIX
    modules = dict(model.named_modules(remove_duplicate=False))
    biases: dict[str, Tensor] = {}
    whole: dict[str, set[str]] = {}
    for name, value in attachment.written():
        owner, _, attribute = name.rpartition(".")
        if name in attachment.head_names:
            tensors[f"{prefix}{name}"] = value
        elif attribute == "bias":
            biases[owner] = value
        else:
            tensors[f"{prefix}{name}"] = value
            whole.setdefault(owner, set()).add(attribute)
    for owner in whole:
        if owner in biases:
            tensors[f"{prefix}{owner}.bias"] = biases.pop(owner)
            whole[owner].add("bias")
        if whole[owner] != {name for name, value in modules[owner]._parameters.items() if value is not None}:
            raise CheckpointError(_refusal(attachment, f"no way to train a part of {owner} alone"))
    if (whole or biases) and config["peft_type"] != "LORA" and (biases or learned):
        raise CheckpointError(_refusal(attachment, f"no biases or further modules beside {config['peft_type']}"))
    if whole:
        config["modules_to_save"] = sorted({*(config["modules_to_save"] or ()), *whole})
    if biases:
        tensors |= _biases(attachment, written, config, biases)
    return tensors


def _biases(
    attachment: Attachment, written: Written, config: dict[str, Any], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Biases that are trained: those that the model has as such, added ones as biases of LoRA's second factor."""
    own_zeros = {id(value) for value in attachment.selection.added}
    added = {owner for owner, value in biases.items() if id(value) in own_zeros}
    strange = sorted(added - written.scales.keys())
    if strange:
        raise CheckpointError(_refusal(attachment, f"no biases in {strange[0]}, which has none of its own"))
    own = biases.keys() - added
    config["bias"] = "lora_only" if own <= written.scales.keys() else "all"
    if not own:
        config["bias"] = "none"
    base = {owner: ".base_layer" if owner in written.scales else "" for owner in own}
    tensors = {f"{PREFIX}{owner}{base[owner]}.bias": biases[owner] for owner in own}
    if added:
        config["lora_bias"] = True
        for owner, scale in written.scales.items():
            second = written.tensors[f"{PREFIX}{owner}.lora_B.weight"]
            value = biases[owner] / scale if owner in added else second.new_zeros(second.shape[0])
            tensors[f"{PREFIX}{owner}.lora_B.bias"] = value
    return tensors


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _TASK_TYPES.items() if name.endswith(ending)), None)


def _mapping(model: nn.Module) -> dict[str, str]:
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
