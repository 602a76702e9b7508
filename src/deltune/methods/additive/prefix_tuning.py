"""Prefix tuning: trainable keys and values in front of the real ones, in every attention function.

The forms are in :mod:`deltune.methods.additive.prefix_forms`, what p-tuning v2 shares in
:mod:`deltune.methods.additive.prefix_method`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltune.methods.additive.prefix_method import PrefixMethod
from deltune.methods.base import Paper
from deltune.methods.registry import register

__all__ = ["PrefixTuning"]


@register
@dataclass(frozen=True)
class PrefixTuning(PrefixMethod):
    r"""P trainable keys and values in front of the real ones: softmax(q [P_k; K]^T / sqrt(D)) [P_v; V].

    With ``reparameterize`` they are made by a small network, [P_k, P_v] = W2 tanh(W1 P' + b1) + b2, which
    trains more steadily and is dropped when the delta is saved; without it they are parameters themselves.
    In encoder-decoder models the encoder, the decoder and its cross attention have a prefix each. Not the
    identity at the start: more keys take their share of every softmax.

    When to use:
        Generation with a frozen decoder or encoder-decoder, and wherever one batch shall hold several tasks, since
        the prefix is data and no change of weights. Short prefixes (5 to 20) suit short outputs; the paper takes
        200 for summaries. Leave ``reparameterize`` on unless memory forbids it. With little data start from
        a ``start_text`` that names the task.

    Cost:
        Parameters: stored, 2 P times the width of all keys, for each attention function. BERT-base, P = 10:
            184,320 (0.17 %). While training with the network far more: 9,857,024 there.
        Memory: gradients and optimizer state of what trains, the network included. No weight gradients, but
            the backward pass goes through the whole model.
        Time: P more keys in each attention function, and the network once a forward pass. Starting from text
            takes one pass of the model and 500 steps of the network.
        Inference: P more keys in each attention function. They are not in the cache, take no position, and
            cannot be merged.

    Terms:
        Site: attention functions; by default all of the model's.
        Form: keys and values, free or made by a network that the layers of one kind of attention share.
        Combination: joined with the real keys and values inside the softmax.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2))
        >>> tuned = deltune.attach(model, deltune.PrefixTuning(length=5, reparameterize=False))
        >>> tuned.summary().parameters  # 2 layers, keys and values, 5 of 32 each
        640

        $ deltune tune --model models/decoder --data data/instructions.jsonl --task instruction-tuning \
            --output runs/prefix --method prefix-tuning --start-text "answer the question"

    Differs from the paper:
        By default a prefix shifts no position of the text. In the authors' code for GPT-2 the text begins at position
        P; ``shift_positions`` does the same, where the model takes positions, and in the decoder of T5, where they are
        relative. A prefix enters after rotary embeddings and normalisation of keys. The paper's last linear map serves
        all layers at once; here each layer owns its rows of it, which is the same map. Dropout is one mask for all rows
        of a batch; the authors' code draws one for each.

        ``start_text`` is tokenised as it is written: where a word inside a sentence is another token than the word
        alone, write the space before it, which the authors' code does by itself. As there, the length of the prefix
        becomes the number of its tokens, and the network is fitted to the keys and values that the frozen model makes
        of them (500 steps of Adam at 1e-4, P' fixed), which it comes near only; without the network the prefix is
        these keys and values exactly. In encoder-decoder models the encoder reads the text, and the decoder reads it
        again beside the encoder's states. With ``start_from`` the network makes the saved prefix exactly. Infixes,
        activations between source and target that the target alone sees, are not offered.

    Source:
        Li and Liang 2021, arXiv 2101.00190, sections 4 and 7.4 (real words); authors' code: XiangLi1999/PrefixTuning.
    """

    name: ClassVar[str] = "prefix-tuning"
    branch: ClassVar[str] = "additive"
    paper: ClassVar[Paper] = Paper(
        "Li and Liang", "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, "2101.00190"
    )
    learning_rate: ClassVar[float] = 1e-3
