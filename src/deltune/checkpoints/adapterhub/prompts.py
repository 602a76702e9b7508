"""Prompts of AdapterHub's library: rows in front of the embedded text, behind its positions and their norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltune.checkpoints.adapterhub.names import Names, Weights
from deltune.checkpoints.adapterhub.pieces import Piece, Stored, Written, completed
from deltune.errors import CheckpointError
from deltune.methods.additive.prompt_tuning import Prompt, PromptTuning

__all__ = ["read_prompts", "write_prompts"]

_DEFAULTS: dict[str, Any] = {
    "architecture": "prompt_tuning",
    "prompt_length": 10,
    "prompt_init": "random_uniform",
    "prompt_init_text": None,
    "combine": "prefix",
    "init_weights_seed": None,
}
#: Heads that read the first position.
_POOLED = ("ForSequenceClassification", "ForImageClassification", "ForMultipleChoice")


def _table(name: str) -> str:
    return f"prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight"


def read_prompts(config: Mapping[str, Any], name: str, names: Names, weights: Weights) -> list[Piece]:
    """The method of one configuration with its rows.

    Args:
        config: the configuration.
        name: of the adapter.
        names: of the model.
        weights: the file's tensors.

    Raises:
        CheckpointError: if it says what deltune cannot do.
    """
    config, notes = completed(config, _DEFAULTS)
    if config["combine"] != "prefix":
        raise CheckpointError(
            f"The prompt was trained with combine={config['combine']}, behind the first token of the text. deltune "
            "puts prompts in front of it (combine=prefix), so it cannot be read."
        )
    _check_model(names)
    method = PromptTuning(length=config["prompt_length"], initialization="uniform", behind_embeddings=True)
    (stack,) = names.family.stacks
    values: dict[str, Tensor] = {}
    weights.take_into(values, {f"{stack}.embeddings.rows": _table(name)})
    return [Piece(method, values, notes)]


def _check_model(names: Names) -> None:
    """Refuse models for which the library has no prompts, or whose head reads them there.

    Raises:
        CheckpointError: if this is one.
    """
    if not names.family.prompts:
        raise CheckpointError(f"AdapterHub's library has no prompts for models of the family {names.anatomy.family!r}.")
    if names.model_class.endswith(_POOLED):
        raise CheckpointError(
            f"The head of {names.model_class} reads the first position. With a prompt AdapterHub's library lets it "
            "read the prompt's first row, deltune the text's first token: the same rows give other results, so it is "
            "neither read nor written for such a model."
        )


def write_prompts(methods: Sequence[Stored], name: str, names: Names) -> list[Written]:
    """The configuration of this method with its rows.

    Raises:
        CheckpointError: if the library has no form for it.
    """
    _check_model(names)
    (stored, *others) = methods
    (acting, *more) = stored.forms
    form = acting.form
    if others or more:
        raise CheckpointError("AdapterHub's library has one prompt in front of one text; these are several.")
    assert isinstance(form, Prompt)
    assert isinstance(stored.method, PromptTuning)
    if not stored.method.behind_embeddings:
        raise CheckpointError(
            "This prompt has positions, like text; that of AdapterHub's library stands behind the embedding of "
            "positions. Train it with behind_embeddings=true for that, or save it in deltune's own format."
        )
    config = {**_DEFAULTS, "prompt_length": form.length}
    return [Written(config, {_table(name): form.rows})]
