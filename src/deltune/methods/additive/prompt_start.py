"""What methods have in common that train a prompt: its length, where it starts, and in front of which input.

Letters: P number of rows, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets, describe_base_model
from deltune.errors import CheckpointError, MethodError
from deltune.methods.additive.prompt_rows import (
    first_stack,
    label_rows,
    open_tokenizer,
    random_rows,
    text_rows,
    token_table,
)
from deltune.methods.additive.prompt_transfer import mix_prompts, prompt_similarity, read_prompt
from deltune.methods.base import Method
from deltune.methods.options import option
from deltune.sites import Form, TokenSite, token_sites

__all__ = ["PromptMethod"]

#: Initialisations that need an option of the same meaning.
_GIVEN = {"text": "start_text", "labels": "start_labels", "trained": "start_from"}


@dataclass(frozen=True)
class PromptMethod(Method):
    """A method that trains P rows in front of the embedded input.

    An option that says from what the rows start (``start_text``, ``start_labels``, ``start_from``) sets
    ``initialization``.
    """

    length: int = option(20, "number P of rows", minimum=1)
    initialization: str = option(
        "vocabulary",
        "where the rows start; the last three are set by the options that they need",
        choices=("vocabulary", "uniform", "text", "labels", "trained"),
    )
    start_text: str | None = option(None, "text from whose tokens the rows start, repeated or cut to P")
    start_labels: tuple[str, ...] = option((), "labels, for each a row from its tokens; the rest from the vocabulary")
    tokenizer: str | None = option(None, "folder of the tokenizer for these; that of the model if none")
    start_from: tuple[str, ...] = option((), "folders of saved prompts to start from, of several their average")
    similar_to: str | None = option(
        None, "folder of a saved prompt; its similarity to those of start_from weights them"
    )
    nearest: int | None = option(None, "how many of start_from to use, the most similar; all if none", minimum=1)
    targets: Targets | None = option(None, "the input of which stacks; of the first that can be widened if none")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [word for word, name in _GIVEN.items() if getattr(self, name)]
        if len(given) > 1 or (given and self.initialization not in ("vocabulary", given[0])):
            names = [_GIVEN[word] for word in given]
            others = [] if len(given) > 1 else [f"initialization={self.initialization}"]
            raise MethodError(f"{self.name}: a prompt starts from one thing, not from {' and '.join(names + others)}.")
        if given:
            object.__setattr__(self, "initialization", given[0])
        elif self.initialization in _GIVEN:
            needed = _GIVEN[self.initialization]
            raise MethodError(f"{self.name}: initialization={self.initialization} needs the option {needed}.")
        if self.tokenizer and self.initialization not in ("text", "labels"):
            raise MethodError(f"{self.name}: tokenizer is read for start_text or start_labels only; give one of these.")
        if (self.similar_to or self.nearest) and not (self.similar_to and self.start_from):
            raise MethodError(
                f"{self.name}: similar_to and nearest choose among the prompts of start_from by their similarity to "
                "that of similar_to. Give start_from and similar_to."
            )
        if self.nearest is not None and self.nearest > len(self.start_from):
            raise MethodError(
                f"{self.name}: nearest is {self.nearest}, but start_from has {len(self.start_from)} folders."
            )
        if len(self.start_labels) > self.length:
            raise MethodError(
                f"{self.name}: {len(self.start_labels)} start_labels need as many rows, but length is {self.length}. "
                f"Use length={len(self.start_labels)} or more."
            )

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """Without text, labels and folders: the rows are in the file, and nothing else is needed to load them."""
        if self.initialization not in _GIVEN:
            return self
        return replace(
            self,
            initialization="uniform",
            start_text=None,
            start_labels=(),
            tokenizer=None,
            start_from=(),
            similar_to=None,
            nearest=None,
        )

    def prompt_sites(self, model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[TokenSite, Tensor]]:
        """Every input that the prompt stands in front of, and the rows it starts with, (P, d).

        Raises:
            MethodError: if the rows cannot be made for this model.
            CheckpointError: if a folder holds no prompt, or one of another model.
        """
        for site in self.input_sites(model, anatomy):
            yield site, self._rows(model, site)

    def input_sites(self, model: nn.Module, anatomy: Anatomy) -> tuple[TokenSite, ...]:
        """The inputs that the prompt stands in front of."""
        return token_sites(model, anatomy, self.targets or first_stack(anatomy))

    def saved_rows(self, model: nn.Module, site: TokenSite, folder: str) -> Tensor:
        """The prompt in a folder, (P, d), for this site.

        Raises:
            CheckpointError: if there is none that fits.
        """
        rows = read_prompt(folder, site.key, describe_base_model(model))
        if tuple(rows.shape) != (self.length, site.hidden_size):
            hint = f" Use length={rows.shape[0]}." if rows.shape[1] == site.hidden_size else ""
            raise CheckpointError(
                f"The prompt in {folder} has the shape {tuple(rows.shape)}, but {(self.length, site.hidden_size)} is "
                f"wanted.{hint}"
            )
        return rows.to(site.device, site.dtype)

    def _rows(self, model: nn.Module, site: TokenSite) -> Tensor:
        table = token_table(model, site)
        if self.start_from:
            return self._transferred(model, site)
        if self.start_text:
            tokenizer = open_tokenizer(self.tokenizer, model, "start_text")
            return text_rows(site, table, tokenizer, self.start_text, self.length)
        if self.start_labels:
            tokenizer = open_tokenizer(self.tokenizer, model, "start_labels")
            rows = label_rows(site, table, tokenizer, self.start_labels)
            rest = self.length - len(rows)
            return torch.cat([rows, random_rows(site, table, rest, "vocabulary")]) if rest else rows
        return random_rows(site, table, self.length, self.initialization)

    def _transferred(self, model: nn.Module, site: TokenSite) -> Tensor:
        """The source prompt, or the mixture of several: retrieval as in SPoT, section 3."""
        sources = [self.saved_rows(model, site, folder) for folder in self.start_from]
        similarities = [1.0] * len(sources)
        if self.similar_to:
            target = read_prompt(self.similar_to, site.key, describe_base_model(model))
            similarities = [prompt_similarity(target, source) for source in sources]
        return mix_prompts(sources, similarities, self.nearest)
