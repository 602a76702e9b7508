"""Methods that the unified view suggests: one line each, known by name wherever a method is typed.

Each is a method, or a sum, with other options than the defaults. Options behind the name change it further:
``multi-head-parallel-adapter(width=8)``. He et al. 2022 (arXiv 2110.04366) measure those of their tables 2 to 6.
"""

from __future__ import annotations

from deltune.backbone import Targets
from deltune.methods.additive.head_adapter import HeadAdapter
from deltune.methods.additive.parallel_adapter import ParallelAdapter
from deltune.methods.additive.prefix_tuning import PrefixTuning
from deltune.methods.additive.sequential_adapter import SequentialAdapter
from deltune.methods.registry import variant
from deltune.methods.reparameterized.lora import LoRA

_ATTENTION, _FEED_FORWARD = Targets(("attention",)), Targets(("ffn.up", "ffn.down"))

PlainParallelAdapter = variant("plain-parallel-adapter", ParallelAdapter(scale=1.0))
ScaledParallelAdapter = variant("scaled-parallel-adapter", ParallelAdapter(scale=4.0))
ParallelAttentionAdapter = variant(
    "parallel-attention-adapter",
    ParallelAdapter(targets=_ATTENTION, scale=1.0, layer_norm=True, initialization="normal"),
)
MultiHeadParallelAdapter = variant("multi-head-parallel-adapter", HeadAdapter(activation="relu"))
ScaledMultiHeadParallelAdapter = variant("scaled-multi-head-parallel-adapter", HeadAdapter(scale=4.0))
AddedPrefix = variant("added-prefix", HeadAdapter(activation="softmax", grouped=True))
ScaledPrefix = variant("scaled-prefix", HeadAdapter(activation="softmax", grouped=True, scale=4.0))
FeedForwardLoRA = variant("feed-forward-lora", LoRA(rank=102, alpha=408.0, targets=_FEED_FORWARD))
SequentialBesideParallel = variant(
    "sequential-beside-parallel",
    SequentialAdapter(targets=_ATTENTION, train_norms=False) + ParallelAdapter(),
)
ParallelMAM = variant("parallel-mam", ParallelAttentionAdapter + ParallelAdapter())
MultiHeadMAM = variant("multi-head-mam", MultiHeadParallelAdapter + ParallelAdapter())
PrefixAndFeedForwardLoRA = variant("prefix-and-feed-forward-lora", PrefixTuning(length=30, width=800) + FeedForwardLoRA)
