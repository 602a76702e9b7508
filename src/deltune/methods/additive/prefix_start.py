"""Where a prefix starts: from the keys and values of a text, or from a prefix that was trained before.

Letters: P length of the prefix, L layers, K key/value heads, D width of a head, M width of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.backbone import check_base_model, describe_base_model
from deltune.errors import CheckpointError, MethodError
from deltune.methods.additive.prefix_forms import PrefixTrunk, ReparameterizedPrefix, joined_prefixes
from deltune.methods.additive.prompt_rows import open_tokenizer
from deltune.methods.saved import read
from deltune.sites import KeyValueSite, recorded_keys_and_values

__all__ = ["fit_network", "saved_prefixes", "solve_network", "text_prefixes"]

#: Keys and values of one attention function, each (K, P, D).
Pair = tuple[Tensor, Tensor]


def text_prefixes(model: nn.Module, sites: Sequence[KeyValueSite], tokenizer: str, text: str) -> list[Pair]:
    """The keys and values that the frozen model makes of a text, for each site; P is the number of their tokens.

    Args:
        model: the model, with nothing attached that is live.
        sites: its attention functions.
        tokenizer: folder of its tokenizer; empty for the folder that the model was loaded from.
        text: any words; no special tokens are added to it.

    Raises:
        MethodError: if there is no tokenizer, it makes no tokens of the text, or is that of another model.
        TargetError: if the model does not read text alone.
    """
    ids = torch.tensor(open_tokenizer(tokenizer, model, "start_text")(text, add_special_tokens=False)["input_ids"])
    base: Any = model
    size: int | None = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if not len(ids):
        raise MethodError(f"The tokenizer makes no tokens of {text!r}. Give it words.")
    if size is not None and int(ids.max()) >= size:
        raise MethodError(
            f"The tokenizer makes the token {int(ids.max())} of {text!r}, but the model embeds {size} tokens: it is "
            "the tokenizer of another model. Give the model's own: tokenizer=FOLDER."
        )
    return recorded_keys_and_values(model, sites, ids.long().to(sites[0].device))


def saved_prefixes(
    model: nn.Module, sites: Sequence[KeyValueSite], folder: str | Path, shift_positions: bool
) -> list[Pair]:
    """The prefixes that a folder holds, for each site; task heads in it are left alone.

    Args:
        model: the model that the prefix is for.
        sites: its attention functions; the folder must have a prefix for each.
        folder: that ``save`` wrote for a prefix.
        shift_positions: whether the text is to begin behind the prefix, as it must have in the saved one's training.

    Raises:
        CheckpointError: if there is no such prefix, or it was trained on another model or at other positions.
    """
    description, tensors = read(folder)
    method = description["method"]
    absent = [site.key for site in sites if f"{site.key}.keys" not in tensors or f"{site.key}.values" not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder} holds no prefix for {', '.join(absent[:4])}{' and others' if len(absent) > 4 else ''}: its "
            f"method is {method['name']}. Give the folder of a saved prefix of the same attention functions."
        )
    try:
        check_base_model(description["base_model"], describe_base_model(model))
    except CheckpointError as error:
        raise CheckpointError(
            f"The prefix in {folder} was trained on another model than the given one, whose keys and values mean "
            "something else. Train it on this model."
        ) from error
    if bool(method.get("shift_positions", False)) != shift_positions:
        raise CheckpointError(
            f"The prefix in {folder} was trained with shift_positions={str(not shift_positions).lower()}, so that the "
            "text had other positions. Set the same here."
        )
    pairs = [(tensors[f"{site.key}.keys"], tensors[f"{site.key}.values"]) for site in sites]
    for site, pair in zip(sites, pairs, strict=True):
        for tensor in pair:
            wanted = (site.shape.key_value_heads, pairs[0][0].shape[1], site.shape.head_dim)
            if tuple(tensor.shape) != wanted:
                raise CheckpointError(
                    f"The prefix in {folder} has the shape {tuple(tensor.shape)} at {site.key}, but {wanted} is wanted."
                )
    return [(keys.to(site.device), values.to(site.device)) for site, (keys, values) in zip(sites, pairs, strict=True)]


def fit_network(
    trunk: PrefixTrunk,
    forms: Sequence[ReparameterizedPrefix],
    pairs: Sequence[Pair],
    steps: int = 500,
    learning_rate: float = 1e-4,
) -> None:
    """Train the two linear maps, P' fixed, to make these keys and values: Adam on the mean squared error.

    Steps and rate are those of the authors' code; the result is near the keys and values, not at them.

    Args:
        trunk: what the layers of one kind of attention share.
        forms: the layers.
        pairs: the keys and values that each is to make, each (K, P, D).
        steps: of Adam.
        learning_rate: of Adam.
    """
    precise = torch.promote_types(trunk.rows.dtype, torch.float32)
    rows, wanted = trunk.rows.detach().to(precise), joined_prefixes(pairs).to(precise)
    # all layers' rows of the last map at once: Adam changes each value by itself
    first = [value.detach().to(precise).clone() for value in (trunk.linear.weight, trunk.linear.bias)]
    last = [
        torch.cat([getattr(form.linear, name).detach() for form in forms]).to(precise) for name in ("weight", "bias")
    ]
    values = [value.requires_grad_() for value in (*first, *last)]
    optimizer = torch.optim.Adam(values, lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            made = nn.functional.linear(torch.tanh(nn.functional.linear(rows, *values[:2])), *values[2:])
            optimizer.zero_grad()
            nn.functional.mse_loss(made, wanted).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        trunk.linear.weight.copy_(values[0])
        trunk.linear.bias.copy_(values[1])
        sizes = [form.linear.out_features for form in forms]
        parts = (torch.split(value, sizes) for value in values[2:])
        for form, weight, bias in zip(forms, *parts, strict=True):
            form.linear.weight.copy_(weight)
            form.linear.bias.copy_(bias)


@torch.no_grad()
def solve_network(trunk: PrefixTrunk, form: ReparameterizedPrefix, pair: Pair) -> None:
    """Change a layer's linear map as little as possible so that it makes exactly these keys and values.

    Of all maps W that do, with the trunk's hidden rows H (P, M), that with the smallest difference from the present
    one is W + (H^+ R)^T, where R is what is missing, (P, 2 K D), and H^+ the pseudoinverse.

    Raises:
        MethodError: if the network is narrower than the prefix is long, so that there is none.
    """
    hidden = trunk().double()
    if hidden.shape[0] > hidden.shape[1]:
        raise MethodError(
            f"A network of width {hidden.shape[1]} cannot start at a given prefix of length {hidden.shape[0]}. Use "
            f"width={hidden.shape[0]} or more, or reparameterize=false."
        )
    missing = joined_prefixes([pair]).double() - nn.functional.linear(
        hidden, form.linear.weight.double(), form.linear.bias.double()
    )
    form.linear.weight.add_((torch.linalg.pinv(hidden) @ missing).T.to(form.linear.weight.dtype))
