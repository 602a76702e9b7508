"""Prompts that were trained on other tasks: reading them, how similar they are, and their mixtures (SPoT).

Letters: P number of rows, d width of an embedding.

Source: Vu et al. 2022, SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, arXiv 2110.07904,
sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltune.backbone import check_base_model
from deltune.errors import CheckpointError, MethodError
from deltune.methods.saved import read

__all__ = ["mix_prompts", "most_similar", "prompt_similarity", "read_prompt", "transfer_weights"]


def prompt_similarity(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between the means of two prompts' rows: how similar their tasks are.

    Args:
        one: a prompt, (P, d).
        other: a prompt of the same model, (Q, d).

    Raises:
        MethodError: if they are not of one width.
    """
    if one.dim() != 2 or other.dim() != 2 or one.shape[1] != other.shape[1]:
        raise MethodError(
            f"Prompts of one model are compared, (P, d) and (Q, d), not {tuple(one.shape)} and {tuple(other.shape)}."
        )
    first, second = (prompt.detach().cpu().double().mean(0) for prompt in (one, other))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def most_similar(target: Tensor, sources: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """The sources by their similarity to a target, the most similar first; equal ones in the order given.

    Args:
        target: a prompt that was trained for a short time on the target task, (P, d).
        sources: prompts of other tasks by name, (P, d).
    """
    similarities = {name: prompt_similarity(target, source) for name, source in sources.items()}
    return sorted(similarities.items(), key=lambda item: -item[1])


def transfer_weights(similarities: Sequence[float], nearest: int | None = None) -> Tensor:
    """Weights of source prompts: similarities without the negative ones, divided by their sum; float64.

    Args:
        similarities: of each source to the target.
        nearest: how many sources have a weight, the most similar ones (of equal ones the first); all by default.

    Raises:
        MethodError: if no source is similar at all.
    """
    values = torch.tensor(list(similarities), dtype=torch.float64)
    kept = values.argsort(descending=True, stable=True)[:nearest]
    weights = torch.zeros_like(values).index_copy(0, kept, values[kept].clamp(min=0))
    if not bool(weights.sum() > 0):
        raise MethodError(
            "No source prompt is similar to the target: the cosines are "
            f"{', '.join(f'{value:.3f}' for value in values.tolist()) or 'none'}. Start from another source, or from "
            "the vocabulary."
        )
    return weights / weights.sum()


def mix_prompts(prompts: Sequence[Tensor], similarities: Sequence[float], nearest: int | None = None) -> Tensor:
    """The average of prompts, weighted by :func:`transfer_weights`, (P, d).

    Where one prompt has all the weight the result is that prompt, bit for bit.

    Args:
        prompts: all (P, d).
        similarities: of each to the target; equal ones give the plain average.
        nearest: how many of them to use, the most similar ones; all by default.

    Raises:
        MethodError: if shapes or numbers do not fit, or no prompt is similar at all.
    """
    if len(prompts) != len(similarities) or len({prompt.shape for prompt in prompts}) != 1:
        raise MethodError(
            f"Prompts of one shape and as many similarities are mixed, not {[tuple(item.shape) for item in prompts]} "
            f"and {len(similarities)} similarities."
        )
    weights = transfer_weights(similarities, nearest)
    used = [(prompt, weight) for prompt, weight in zip(prompts, weights.tolist(), strict=True) if weight > 0]
    if len(used) == 1:
        return used[0][0].detach().clone()
    mixture = torch.stack([weight * prompt.detach().double() for prompt, weight in used]).sum(0)
    return mixture.to(prompts[0].dtype)


def read_prompt(folder: str | Path, key: str | None = None, base_model: Mapping[str, Any] | None = None) -> Tensor:
    """The rows of a saved prompt, (P, d), as :class:`deltune.PromptTuning` stores them.

    Args:
        folder: that ``save`` wrote.
        key: the input whose prompt it is, such as ``encoder.embeddings``; by default the only one in the folder.
        base_model: what the model that the prompt is for says of itself; another one is refused.

    Raises:
        CheckpointError: if the folder holds no delta or one without such a prompt, or it was trained on another model.
    """
    description, tensors = read(folder)
    prompts = {name.removesuffix(".rows"): value for name, value in tensors.items() if name.endswith("embeddings.rows")}
    if key is None and len(prompts) == 1:
        key = next(iter(prompts))
    if key not in prompts:
        wanted = "for one input" if key is None else f"for {key}"
        raise CheckpointError(
            f"{folder} holds no prompt {wanted}: it holds {', '.join(prompts) or 'none'}, and its method is "
            f"{description['method']['name']}. Give the folder of a saved prompt-tuning delta."
        )
    if base_model is not None:
        try:
            check_base_model(description["base_model"], base_model)
        except CheckpointError as error:
            raise CheckpointError(
                f"The prompt in {folder} was trained on another model than the given one, whose embeddings mean "
                "something else. Train it on this model."
            ) from error
    return prompts[key]
