"""Where the rows of a prompt start: at random, or from the table of token embeddings.

Letters: P number of rows, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.sites import TokenSite

__all__ = ["first_stack", "label_rows", "open_tokenizer", "random_rows", "text_rows", "token_table"]

#: The vocabulary initialisation draws from the first ids, where tokenizers keep frequent tokens (the paper).
_FREQUENT = 5000


def first_stack(anatomy: Anatomy) -> Targets:
    """The first stack whose input can be widened: of encoder-decoder models the encoder, as in the paper."""
    able = [name for name, stack in anatomy.stacks.items() if stack.tokens is not None]
    return Targets(("embeddings",), stacks=tuple(able[:1]))


def token_table(model: nn.Module, site: TokenSite) -> nn.Module | None:
    """The module that embeds the tokens of a stack; None if the stack has none, as with images.

    Rows are read through the module and not from its weight, because some models scale their embeddings.
    """
    return model.get_submodule(site.embeddings) if site.embeddings else None


def random_rows(site: TokenSite, table: nn.Module | None, length: int, kind: str) -> Tensor:
    """P random rows, (P, d).

    Args:
        site: the input that they are for.
        table: see :func:`token_table`; without one the rows are uniform.
        length: P.
        kind: ``uniform`` for U(-0.5, 0.5), ``vocabulary`` for distinct rows of the first 5,000 of the table.

    Raises:
        MethodError: if the table has not so many rows.
    """
    if kind == "uniform" or table is None:
        return torch.empty(length, site.hidden_size, dtype=site.dtype, device=site.device).uniform_(-0.5, 0.5)
    count = min(_FREQUENT, int(table.num_embeddings))  # type: ignore[arg-type]
    if length > count:
        raise MethodError(
            f"{length} distinct rows cannot be drawn from a vocabulary of {count}. Use a shorter prompt or "
            "initialization=uniform."
        )
    return _embedded(site, table, torch.randperm(count)[:length])


def text_rows(site: TokenSite, table: nn.Module | None, tokenizer: Any, text: str, length: int) -> Tensor:
    """The embeddings of a text's tokens, repeated or cut to P rows, (P, d).

    Raises:
        MethodError: if the text has no tokens, or they are not in the table.
    """
    ids = _tokens(site, table, tokenizer, text)
    assert table is not None
    return _embedded(site, table, ids.repeat(-(-length // len(ids)))[:length])


def label_rows(site: TokenSite, table: nn.Module | None, tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """A row for each label, the mean of the embeddings of its sub-tokens, (labels, d).

    Raises:
        MethodError: if a label has no tokens, or they are not in the table.
    """
    rows = [_tokens(site, table, tokenizer, label) for label in labels]
    assert table is not None
    return torch.stack([_embedded(site, table, ids).mean(0) for ids in rows])


def open_tokenizer(folder: str | None, model: nn.Module, option: str) -> Any:
    """The tokenizer in ``folder``; without one, in the folder that the model was loaded from.

    Args:
        folder: of the tokenizer, if it is not the folder of the model.
        model: the model.
        option: what the tokenizer is wanted for, for the message.

    Raises:
        MethodError: if there is no tokenizer.
    """
    import transformers

    place = folder or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    advice = "Give its folder: tokenizer=FOLDER."
    if not place:
        raise MethodError(f"{option} needs the model's tokenizer, and the model was not loaded from a folder. {advice}")
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MethodError(
            f"{option} needs the model's tokenizer, but there is none that can be read in {place} ({reason}). {advice}"
        ) from error


def _tokens(site: TokenSite, table: nn.Module | None, tokenizer: Any, text: str) -> Tensor:
    """The ids of ``text`` without special tokens."""
    if table is None:
        raise MethodError(
            f"The input of the {site.part.stack} is not made of tokens, so that a prompt for it cannot start from "
            "text. Use initialization=uniform."
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if not len(ids):
        raise MethodError(f"The tokenizer makes no tokens of {text!r}. Give it words.")
    size = int(table.num_embeddings)  # type: ignore[arg-type]
    if int(ids.max()) >= size:
        raise MethodError(
            f"The tokenizer makes the token {int(ids.max())} of {text!r}, but the model embeds {size} tokens: it is "
            "the tokenizer of another model. Give the model's own: tokenizer=FOLDER."
        )
    return ids


def _embedded(site: TokenSite, table: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        rows: Tensor = table(ids.to(site.device))
    return rows.to(site.dtype)
