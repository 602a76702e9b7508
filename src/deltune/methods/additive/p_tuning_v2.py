"""P-tuning v2: deep prompts, which are the keys and values of prefix tuning without a network, for understanding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltune.methods.additive.prefix_method import PrefixMethod
from deltune.methods.base import Paper
from deltune.methods.options import option
from deltune.methods.registry import register

__all__ = ["PTuningV2"]


@register
@dataclass(frozen=True)
class PTuningV2(PrefixMethod):
    r"""P trainable keys and values in every layer, under an ordinary head: softmax(q [P_k; K]^T / sqrt(D)) [P_v; V].

    Prefix tuning for classification and tagging: by default the keys and values are parameters themselves, with
    dropout and a high learning rate. The head, which the task brings, is trained with them; the rest of the model,
    its pooler included, is frozen. The output has no positions of the prompt. Not the identity at the start.

    When to use:
        Classification and tagging with a frozen encoder, also a large one, where tasks shall share it. Results depend
        on length and rate: search over lengths of 4 to 128; simple classification prefers fewer than 20, tagging of
        sequences about 100. The paper finds that ``reparameterize`` helps some tasks and harms others. For generation
        take prefix-tuning.

    Cost:
        Parameters: 2 P times the width of all keys, for each layer, and the head. BERT-base, P = 20: 368,640
            (0.34 %).
        Memory: gradients and optimizer state of what trains. No weight gradients, but the backward pass goes
            through the whole model.
        Time: P more keys in each attention function.
        Inference: P more keys in each attention function; they cannot be merged.

    Terms:
        Site: attention functions; by default all of the model's. The upper layers matter most:
            ``targets="attention layers=-6:"``.
        Form: free keys and values; with ``reparameterize``, made by a network that the layers share.
        Combination: joined with the real keys and values inside the softmax.
        Control: live in every selected layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.PTuningV2(length=20), name="first")
        >>> tuned.summary().parameters - tuned.summary().head_parameters  # 2 layers, keys and values, 20 of 32 each
        2560

        Another task starts from the prompt that was trained on the first, with a head of its own:

        >>> import tempfile
        >>> folder = tuned.save(tempfile.mkdtemp())
        >>> tuned = tuned.attach(deltune.PTuningV2(start_from=str(folder)), name="second")
        >>> tuned.summary("second").parameters - tuned.summary("second").head_parameters
        2560

        $ deltune tune --model models/encoder --data data/reviews.csv --output runs/deep-prompt \
            --method p-tuning-v2 --length 8

    Differs from the paper:
        By default the prompt shifts no position of the text. The authors' code for BERT and RoBERTa lets the text
        begin at position P; ``shift_positions`` does the same. Dropout is an option, 0.1 as in these models; the
        authors take the model's own, and draw a mask for each row of a batch where here all rows have one. The length
        is 20 by default; the released scripts take 8 to 224. DeBERTa, which the paper uses too, cannot take additional
        keys here, because it does not go through transformers' attention interface.

        The paper may train the prompt on several tasks together before; no code of that was released. Here: attach
        to the bare model (``BertModel``), train it in a loop of your own under one head for each task, save, and give
        the folder to ``start_from``.

    Source:
        Liu et al. 2022, arXiv 2110.07602, section 3; authors' code: THUDM/P-tuning-v2.
    """

    length: int = option(
        20,
        "number P of additional keys and values; with start_text or start_from it is theirs, and any other is refused "
        "but the default",
        minimum=1,
    )
    reparameterize: bool = option(False, "train through a small network that is dropped after training")
    dropout: float = option(0.1, "dropout of keys and values while training", minimum=0, maximum=0.99)

    name: ClassVar[str] = "p-tuning-v2"
    branch: ClassVar[str] = "additive"
    paper: ClassVar[Paper] = Paper(
        "Liu et al.",
        "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
        2022,
        "2110.07602",
    )
    learning_rate: ClassVar[float] = 1e-2
