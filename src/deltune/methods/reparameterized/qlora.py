"""QLoRA: LoRA on every linear map of a model that is stored in four bits.

Letters: d_in and d_out the matrix's width and height, r the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltune.backbone import Targets
from deltune.methods.base import Paper
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.reparameterized.lora import LoRA
from deltune.quantization import NF4
from deltune.quantization.format import ENGINES

__all__ = ["QLoRA"]


@register
@dataclass(frozen=True)
class QLoRA(LoRA):
    r"""LoRA beside a quantised model, h = W4 x + s B A x with W4 the matrix as stored in 4 bits and s = alpha / r.

    ``deltune tune``, ``compare``, ``eval`` and ``predict`` load the model straight into 4 bits, a matrix at a time. In
    Python the model is quantised first (``deltune.quantize``, or ``deltune.quantization.load_quantized`` for one that
    does not fit into memory otherwise); the method is LoRA with the paper's hyperparameters and works on any model. B
    is zero at the start, so that the adapted model equals the quantised one, not the original, exactly.

    When to use:
        Where the frozen weights are what does not fit: models of some billions of parameters on one device. A small
        model gains little, and each product is slower because the matrix is made anew for it.
        All matrices of the layers should be adapted, which makes up for the error of the quantisation; which rank they
        have hardly matters.

    Cost:
        Parameters: r (d_in + d_out) for each matrix. BERT-base, all 72 matrices, r = 64: 10,616,832.
        Memory: 4.127 bits for each frozen weight of the layers instead of 16 or 32; gradients and optimizer state of A
            and B alone; activations as LoRA's.
        Time: above LoRA's on the unquantised model, as each matrix is dequantised in either direction.
        Inference: as in training. Folded into the 4-bit matrices most of the change would be lost: ``deltune merge``
            folds it into the dequantised model (``tuned.merge(dequantize=True, reversible=False)``), or into the
            original one with ``--into original``, and says how far the results are from those of training. ``--into
            quantized`` rounds to 4 bits all the same.

    Terms:
        Site: linear maps; by default all of the attention and feed-forward sublayers.
        Form: s B A, the product of two thin matrices.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = deltune.quantize(LlamaForCausalLM(config), deltune.NF4(engine="torch"))
        >>> tuned = deltune.attach(model, deltune.QLoRA(rank=4))
        >>> tuned.summary().parameters  # 2 layers: 4 matrices of 32 x 32 and 3 of 32 x 64, 4 (d_in + d_out) each
        4352

        $ deltune tune --model models/decoder --data data/texts.csv --evaluation 0.1 --output runs/qlora \
            --method qlora --rank 64

    Differs from the paper:
        The default rank is 16, not 64, which small models cannot have; alpha stays 16. Dropout is that of the paper's
        7B and 13B models; larger ones have 0.05 and a learning rate of 1e-4. A and B are kept in float32, unless the
        model computes in another type before it is quantised and is attached unquantised; the authors' code keeps them
        in bfloat16. The optimizer is AdamW with its whole state in memory; the paper's is the training setting
        ``optimizer=paged-adamw``, which needs CUDA.

    Source:
        Dettmers et al. 2023, arXiv 2305.14314, sections 3 and 4, appendix B; authors' code: artidoro/qlora.
    """

    rank: int = option(16, "rank r of the change: more capacity, more parameters", minimum=1)
    dropout: float = option(0.1, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention.*", "ffn.*")), "which matrices to change")

    double_quantization: bool = option(True, "store the scales of the 4-bit blocks in 8 bits")
    block: int = option(64, "weights that share one scale, a power of two from 32 to 4096", minimum=32, maximum=4096)
    compute_dtype: str = option(
        "auto",
        "type of the products; auto is that of the weights before",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    engine: str = option("bitsandbytes", "what quantises and multiplies", choices=ENGINES)

    name: ClassVar[str] = "qlora"
    paper: ClassVar[Paper] = Paper(
        "Dettmers et al.", "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, "2305.14314"
    )
    learning_rate: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base_format  # noqa: B018 - refuses what makes no format

    @property
    def base_format(self) -> NF4:
        """NF4, as the options say."""
        dtype = None if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)
        return NF4(self.double_quantization, dtype, self.block, self.engine)
