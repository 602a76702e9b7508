"""Prompt learning: one table of prefixes or of rows in front of the embedded text.

Letters: P length, L layers, K key/value heads, D width of a head, d width of an embedding.
"""

from __future__ import annotations

from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.checkpoints.peft.contents import Contents
from deltune.checkpoints.peft.layout import PROMPT_KEY, Options
from deltune.errors import CheckpointError, TargetError
from deltune.methods import Method
from deltune.methods.additive.p_tuning import PTuning
from deltune.methods.additive.prefix_forms import split_prefixes
from deltune.methods.additive.prefix_tuning import PrefixTuning
from deltune.methods.additive.prompt_rows import first_stack
from deltune.methods.additive.prompt_tuning import PromptTuning
from deltune.sites import KeyValueSite, key_value_sites, token_sites

__all__ = [
    "PREFIX_OPTIONS",
    "PROMPT_OPTIONS",
    "P_TUNING_OPTIONS",
    "prefix_method",
    "prefix_sites",
    "prefix_slots",
    "read_prefix",
    "read_prompt",
    "refuse_pooled_prompts",
]

_SHAPES = "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers"
PREFIX_OPTIONS = Options(
    used=f"{_SHAPES} encoder_hidden_size prefix_projection init_weights",
)
PROMPT_OPTIONS = Options(
    used=f"{_SHAPES} prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs",
)
P_TUNING_OPTIONS = Options(
    used=f"{_SHAPES} encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout",
)


def prefix_method(length: int, anatomy: Anatomy) -> PrefixTuning:
    """A prefix as peft has it: in the cache of the last stack, so that the text begins at position P."""
    stacks = f" stacks={tuple(anatomy.stacks)[-1]}" if len(anatomy.stacks) > 1 else ""
    return PrefixTuning(
        length=length, reparameterize=False, shift_positions=True, targets=Targets.parse(f"attention{stacks}")
    )


def prefix_sites(method: PrefixTuning, model: nn.Module, anatomy: Anatomy) -> tuple[KeyValueSite, ...]:
    """The attention functions of such a prefix, in the order of the layers.

    Raises:
        CheckpointError: if the model takes no additional keys, or its positions cannot be shifted.
    """
    try:
        list(method.place(model, anatomy))
        return key_value_sites(model, anatomy, method.targets)
    except TargetError as error:
        raise CheckpointError(f"This model cannot have a prefix like peft's. {error}") from error


def prefix_slots(layers: int, count: int, submodules: int) -> list[tuple[int, int]]:
    """Which of the 2 ``count`` slots of a table hold the keys and the values of each layer.

    For encoder-decoder models peft lays the table twice in a row and gives each layer of the decoder four slots, of
    which its self-attention reads the first two.
    """
    step = 2 * submodules
    return [(step * layer % (2 * count), (step * layer + 1) % (2 * count)) for layer in range(layers)]


def read_prefix(contents: Contents) -> tuple[Method, dict[str, Tensor]]:
    """The method and its tensors by key; the table is (P, 2 L K D).

    Raises:
        CheckpointError: if the prefix cannot be represented in this model.
    """
    table = _table(contents)
    method = prefix_method(table.shape[0], contents.anatomy)
    sites = prefix_sites(method, contents.model, contents.anatomy)
    heads, head_dim = sites[0].shape.key_value_heads, sites[0].shape.head_dim
    submodules = int(contents.config.get("num_transformer_submodules") or 1)
    count = int(contents.config.get("num_layers") or len(sites)) if submodules > 1 else len(sites)
    contents.fits(PROMPT_KEY, table, (table.shape[0], 2 * count * heads * head_dim))
    contents.finish_if_damaged()
    if count < len(sites):
        raise CheckpointError(
            f"{contents.folder} has prefixes for {count} layers, and the {sites[0].part.stack} of this model has "
            f"{len(sites)}."
        )
    halves = [half for pair in split_prefixes(table, heads, head_dim) for half in pair]
    tensors: dict[str, Tensor] = {}
    for site, (keys, values) in zip(sites, prefix_slots(len(sites), count, submodules), strict=True):
        tensors |= {f"{site.key}.keys": halves[keys], f"{site.key}.values": halves[values]}
    return method, tensors


def read_prompt(contents: Contents) -> tuple[Method, dict[str, Tensor]]:
    """The method and its tensors by key; the table is (P, d).

    For encoder-decoder models it is (2 P, d), of which peft reads the first P rows.

    Raises:
        CheckpointError: if the prompt cannot be represented in this model.
    """
    refuse_pooled_prompts(contents.model, contents.anatomy)
    table = _table(contents)
    if int(contents.config.get("num_transformer_submodules") or 1) > 1:
        table = table[: len(table) // 2]
    try:
        (site,) = token_sites(contents.model, contents.anatomy, first_stack(contents.anatomy))
    except TargetError as error:
        raise CheckpointError(f"This model cannot have a prompt. {error}") from error
    contents.fits(PROMPT_KEY, table, (table.shape[0], site.hidden_size))
    contents.finish_if_damaged()
    free = contents.config["peft_type"] == "PROMPT_TUNING"
    method = (
        PromptTuning(length=len(table), initialization="uniform")
        if free
        else PTuning(length=len(table), encoder="none")
    )
    return method, {f"{site.key}.rows": table}


def refuse_pooled_prompts(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse models whose head reads the first position: in peft that is the prompt's own, in deltune the text's.

    Raises:
        CheckpointError: if this is one.
    """
    pooled = type(model).__name__.endswith("ForSequenceClassification") and "decoder" not in anatomy.stacks
    if pooled:
        raise CheckpointError(
            f"The head of {type(model).__name__} reads positions of a stack that sees both ways. With a prompt in "
            "front peft lets it read the prompt's own output, deltune the text's: the same rows would give other "
            "results. Use LoRA or a prefix for such a model."
        )


def _table(contents: Contents) -> Tensor:
    """The one tensor of prompt learning.

    Raises:
        CheckpointError: if it is missing or has not as many rows as the configuration says.
    """
    table = contents.tensors.pop(PROMPT_KEY, None)
    if table is None:
        contents.missing(PROMPT_KEY)
        contents.finish_if_damaged()
    assert table is not None
    length = int(contents.config.get("num_virtual_tokens") or len(table))
    submodules = int(contents.config.get("num_transformer_submodules") or 1)
    rows = length if contents.config["peft_type"] == "PREFIX_TUNING" else length * submodules
    width = table.shape[1] if table.dim() == 2 else 0
    contents.fits(PROMPT_KEY, table, (rows, width))
    contents.finish_if_damaged()
    return table
