"""Prompt tuning: trainable rows in front of the embedded input.

Letters: P number of rows, d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.methods.additive.prompt_rows import first_stack
from deltune.methods.additive.prompt_start import PromptMethod
from deltune.methods.base import Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, TokenForm, TokenSite, token_sites

__all__ = ["Prompt", "PromptTuning"]


class Prompt(TokenForm):
    """P free rows, (P, d).

    Args:
        rows: their initial values.
    """

    formula: ClassVar[str] = "P"

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())
        self.length = rows.shape[0]

    def forward(self) -> Tensor:
        """The rows, (P, d)."""
        return self.rows


@register
@dataclass(frozen=True)
class PromptTuning(PromptMethod):
    r"""P trainable embedding vectors in front of the embedded text: the model reads [E_p; X].

    They take positions 0 to P-1 and the text begins at P; their outputs never reach the head or the loss. In
    encoder-decoder models they enter the encoder. Not the identity at the start.

    When to use:
        Large frozen models and very many tasks, because a task is P vectors. Below a billion parameters expect
        less than an adapter or LoRA gives, and compare with a trained head on the frozen model. A rate that suits
        LoRA leaves a prompt untrained: keep the default or go higher. Where related tasks have prompts, start from
        them (``start_from``). Several prompts of one task can vote at the cost of one model: ``PromptEnsemble``.

    Cost:
        Parameters: P d. BERT-base, P = 20: 15,360 (0.014 %).
        Memory: optimizer state of P d values. Frozen matrices need no input, but every text is P positions longer:
            with a long prompt the activations are more than in full fine-tuning.
        Time: that of P more positions in every layer; the backward pass goes down to the input.
        Inference: P more positions in every layer, and in the cache. Text and prompt together must fit the
            model's positions. It cannot be merged.

    Terms:
        Site: the embedded input of a stack; by default of the first.
        Form: P free rows.
        Combination: joined with the embedded text.
        Control: live for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2))
        >>> tuned = deltune.attach(model, deltune.PromptTuning(length=20))
        >>> tuned.summary().parameters  # 20 rows of 32
        640

        $ deltune tune --model models/decoder --data data/instructions.jsonl --task instruction-tuning \
            --output runs/prompt --method prompt-tuning --length 20 --learning-rate 0.1

        $ deltune tune --model models/decoder --data data/instructions.jsonl --task instruction-tuning \
            --output runs/transfer --method prompt-tuning --start-from runs/prompt

    Differs from the paper:
        20 rows by default, the paper's is 100. ``vocabulary`` draws distinct rows of the embedding table from its
        first 5,000; ``uniform`` is U(-0.5, 0.5) as the paper says (the authors' code draws from [0, 0.5)). Inputs
        without a table of tokens, such as images, start uniform. ``start_labels`` cuts each label into tokens as it is
        written: where a word inside a sentence is another token than the word alone, write the space before it.
        ``start_text`` is not in the paper. Trained with AdamW; the paper uses Adafactor at a constant 0.3.

        ``start_from`` is the transfer of prompts (Vu et al. 2022, arXiv 2110.07904). With ``similar_to``, a prompt
        of the target task after a short training, the sources are weighted by the cosine of the means of their rows,
        negative ones by zero; their second measure, over all pairs of rows, is not offered.

        ``behind_embeddings`` is what adapter-hub/adapters does in encoders such as BERT: the rows are what the first
        layer reads, without positions and norm, and the text keeps its positions. Rows from the vocabulary or from text
        are still those of the table.

    Source:
        Lester et al. 2021, arXiv 2104.08691, section 2; authors' code: google-research/prompt-tuning.
    """

    behind_embeddings: bool = option(
        False, "put the rows behind the embedding of positions and its norm, where a model has such a module (BERT)"
    )

    name: ClassVar[str] = "prompt-tuning"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.TOKENS
    paper: ClassVar[Paper] = Paper(
        "Lester et al.", "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, "2104.08691"
    )
    learning_rate: ClassVar[float] = 5e-2
    unchanged_at_start: ClassVar[bool] = False

    def input_sites(self, model: nn.Module, anatomy: Anatomy) -> tuple[TokenSite, ...]:
        """The inputs that the prompt stands in front of, or behind whose embedding it stands."""
        targets = self.targets or first_stack(anatomy)
        return token_sites(model, anatomy, targets, behind=self.behind_embeddings)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """Rows for the input of every selected stack."""
        for site, rows in self.prompt_sites(model, anatomy):
            yield Placement(site, Prompt(rows))
