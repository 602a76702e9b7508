"""Threshold masks: which of the frozen weights to keep, one learned bit for each.

Letters: W the frozen matrix, S its scores and M its mask, all (d_out, d_in); tau the threshold, p the share of zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets, check_base_model, describe_base_model
from deltune.errors import CheckpointError, MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.saved import read
from deltune.sites import Form, Insertion, MaskForm, MaskSite, mask_sites

__all__ = ["PackedMask", "ScoredMask", "ThresholdMask", "pack", "unpack"]

#: The linear map of a pooler, by its dotted name.
_POOLER = re.compile(r"(.*\.)?pooler(\.dense)?")
_MATRICES = Targets(("attention.*", "ffn.*"))


def pack(mask: Tensor) -> Tensor:
    """The bits of a boolean tensor of n entries, eight to a byte, the first in the lowest bit: uint8, (ceil(n / 8))."""
    flat = nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor of that shape that was packed into ``bits``."""
    # eight entries at a time, looked up as one number of eight bytes
    byte = torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device)
    entries = (byte & 1).to(torch.bool).view(torch.int64).view(-1)
    return entries.take(bits.long()).view(torch.bool)[: math.prod(shape)].view(shape)


class ScoredMask(MaskForm):
    """M = S > tau, with dL/dS := dL/dM; a score that equals the threshold drops its weight.

    Scores are float32 at least, whatever type the model has, and stay so where it is moved to a narrower one: in half
    precision numbers near 0.5 are further apart than a step of the optimizer.

    Args:
        site: the matrix.
        scores: S at the start, (d_out, d_in).
        threshold: tau.
    """

    formula: ClassVar[str] = "S > tau"

    def __init__(self, site: MaskSite, scores: Tensor, threshold: float) -> None:
        super().__init__()
        self.key = site.key
        self.scores = nn.Parameter(scores)
        self.threshold = threshold

    def kept(self) -> Tensor:
        """The mask."""
        return self.scores.detach() > self.threshold

    def straight_through(self) -> nn.Parameter:
        """The scores."""
        return self.scores

    def stored(self) -> PackedMask:
        """The mask alone."""
        return PackedMask(self.key, self.kept())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= torch.float32.itemsize else tensor.to(moved.device)

        apply: Any = super()._apply
        moved: Self = apply(wide, recurse)
        return moved


class PackedMask(MaskForm):
    """A mask that does not train, at one bit for each weight.

    Args:
        key: of the matrix, for messages.
        kept: the mask, (d_out, d_in), boolean.
    """

    formula: ClassVar[str] = "M"

    saved_buffers = ("bits",)
    bits: Tensor

    def __init__(self, key: str, kept: Tensor) -> None:
        super().__init__()
        self.key = key
        self.shape = tuple(kept.shape)
        self.register_buffer("bits", pack(kept))

    def kept(self) -> Tensor:
        """The mask, unpacked."""
        return unpack(self.bits, self.shape)

    def restored(self) -> None:
        """Refuse a file whose mask keeps nothing."""
        self.refuse_empty(self.key)


@register
@dataclass(frozen=True)
class ThresholdMask(Method):
    r"""Learn which frozen weights to keep: y = (W * M) x + b with M_ij = 1 if S_ij > tau, else 0.

    Each weight of the chosen matrices has a score S. The gradient passes straight through the threshold:
    dL/dS := dL/dM = (dL/dy x^T) * W, for kept and dropped weights alike. Biases, norms and embeddings are neither
    masked nor trained. By default scores are uniform on (-a, b) with b = (a + tau) / p - a, so that a share p of the
    weights is dropped at the start.

    When to use:
        Where many tasks share one base model on disk and in memory and each may cost a bit per weight: more than a
        low-rank change, far less than a tuned copy, and the model runs as fast as it is. It cannot make a weight that
        the base does not have. Training it takes more memory than training everything. Use a rate near 1e-3: the rate
        of full fine-tuning flips no bit. No weight decay: it would pull every score below the threshold.

    Cost:
        Parameters: a score for each masked weight while training. BERT-base, layers 2 to 11 and the pooler: 71,368,704.
        Memory: scores, their gradients and optimizer state, 16 bytes for each masked weight, and the masked matrices
            beside the originals. Of activations the input of each masked matrix.
        Time: a full forward and backward pass with the products for the gradients of the masked matrices; they are
            masked anew after each step.
        Inference: none. On disk one bit for each masked weight, 8.9 MB for BERT-base, and the head; as much in memory
            for each mask that was loaded, and the masked matrices of the one that is live.

    Terms:
        Site: linear maps; by default all of attention and feed-forward above the lowest sixth of the layers, and the
            pooler where a model of one stack has one.
        Form: a mask of zeros and ones: scores while it trains, packed bits once it is saved.
        Combination: the masked matrix stands in the place of the original; with several live, their changes
            (M - 1) * W are added, scaled by their weights.
        Control: live while active; the original matrices come back bit for bit.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.ThresholdMask())
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers of 4 * 32 * 32 + 2 * 32 * 64, and the pooler
        17408

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/mask \
            --method threshold-mask --zeros-at-start 0.05

    Differs from the paper:
        The task head is trained as with every method here; the authors' default masks a random one. A score that equals
        tau drops its weight, as in the authors' code. With ``initialization=exact`` the dropped weights are drawn
        without replacement, as that code means to. It can also mask biases and share scores between heads or layers;
        that is left out, and so is its schedule of sparsity, which is off by default there.
        A saved mask holds bits, not scores: loaded it is fixed, and only a head trains. To train on, attach anew with
        ``start_from`` the folder: kept weights start at 2 tau and dropped ones at 0. A run that was interrupted goes
        on from its checkpoints, which hold the scores.

    Source:
        Zhao et al. 2020, arXiv 2004.12406, section 3; authors' code: ptlmasking/maskbert.
    """

    zeros_at_start: float = option(0.05, "share p of the masked weights that starts dropped", minimum=0, maximum=0.99)
    threshold: float = option(0.01, "threshold tau: weights whose score is greater are kept", minimum=0, exclusive=True)
    lower_bound: float = option(0.02, "a, where uniform scores start on (-a, (a + tau) / p - a)", minimum=0)
    initialization: str = option(
        "uniform",
        "which weights start dropped: uniform, by scores at random; exact, a random share of exactly p; magnitude, "
        "those nearest to zero. In the latter two, scores start at 0 or 2 tau",
        choices=("uniform", "exact", "magnitude"),
    )
    unmasked_layers: float = option(
        0.167, "share of each stack's layers, the lowest, that stays unmasked: 2 of 12", minimum=0, maximum=0.99
    )
    start_from: str | None = option(None, "folder of a saved mask to start from; a task head in it is not taken")
    fixed: bool = option(False, "the mask does not train and takes one bit per weight, as in saved ones")
    targets: Targets | None = option(
        None, "which matrices to mask; if none, all of attention and feed-forward, and the pooler"
    )

    name: ClassVar[str] = "threshold-mask"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Zhao et al.",
        "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models",
        2020,
        "2004.12406",
    )
    learning_rate: ClassVar[float] = 1e-3
    unchanged_at_start: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A mask at every selected matrix.

        Raises:
            CheckpointError: if ``start_from`` holds no mask for these matrices of this model.
            MethodError: if no layer is left to mask, a matrix is quantised or tied, or nothing of it would be kept.
            TargetError: if a target selects nothing.
        """
        sites = self._sites(model, anatomy)
        saved = _saved_masks(model, sites, self.start_from) if self.start_from else {}
        for site in sites:
            yield Placement(site, self._form(site, model, saved.get(site.key)))

    def stored(self, forms: Mapping[str, Form]) -> ThresholdMask:
        """The mask as it is now, fixed.

        Raises:
            StateError: if a mask keeps nothing of its matrix.
        """
        for key, form in forms.items():
            if isinstance(form, MaskForm):
                form.refuse_empty(key)
        return replace(self, fixed=True, start_from=None)

    def _sites(self, model: nn.Module, anatomy: Anatomy) -> tuple[MaskSite, ...]:
        targets = self.targets or _MATRICES
        sites = mask_sites(model, anatomy, targets)
        if not targets.layers:
            sites = tuple(site for site in sites if self._is_masked(site, anatomy))
            if not sites:
                raise MethodError(
                    f"{self.name}: unmasked_layers={self.unmasked_layers:g} leaves nothing of {targets} to mask. Take "
                    "less, or name the layers in the targets: layers=0."
                )
        poolers = () if self.targets else _poolers(model, anatomy)
        return (*sites, *mask_sites(model, anatomy, Targets(poolers))) if poolers else sites

    def _is_masked(self, site: MaskSite, anatomy: Anatomy) -> bool:
        layer = site.part.layer
        return layer is None or layer >= int(self.unmasked_layers * anatomy.layer_count(site.part.stack))

    def _form(self, site: MaskSite, model: nn.Module, saved: Tensor | None) -> MaskForm:
        shape = (site.out_features, site.in_features)
        if self.fixed:
            # a file's own bits follow
            kept = torch.ones(shape, dtype=torch.bool, device=site.device) if saved is None else saved
            return PackedMask(site.key, kept)
        scores = torch.empty(shape, dtype=torch.promote_types(site.dtype, torch.float32), device=site.device)
        if saved is not None:
            scores.copy_(2 * self.threshold * saved)
        elif self.initialization == "uniform" and self.zeros_at_start:
            scores.uniform_(
                -self.lower_bound, (self.lower_bound + self.threshold) / self.zeros_at_start - self.lower_bound
            )
        else:
            scores.fill_(2 * self.threshold)
            scores.view(-1)[self._dropped(site, model)] = 0
        form = ScoredMask(site, scores, self.threshold)
        if not scores.is_meta and not bool(form.kept().any()):
            raise MethodError(
                f"{self.name}: zeros_at_start={self.zeros_at_start:g} keeps none of the {scores.numel()} weights of "
                f"{site.key}. Take less."
            )
        return form

    def _dropped(self, site: MaskSite, model: nn.Module) -> Tensor:
        """Positions of the weights that start dropped, in the flattened matrix."""
        total = site.out_features * site.in_features
        count = round(self.zeros_at_start * total)
        if self.initialization == "magnitude":
            matrix = site.matrix(model.get_submodule(site.module)).detach()
            return matrix.abs().reshape(-1).topk(count, largest=False).indices
        return torch.randperm(total, device=site.device)[:count]


def _poolers(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Names of the linear maps that make one vector of the stack's states, but for those of a task head.

    None where there are several stacks: such models (BLIP) may have one that they never call.
    """
    if len(anatomy.stacks) != 1:
        return ()
    head = tuple(f"{name}." for name in anatomy.head) or ("\0",)
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _POOLER.fullmatch(name) and not f"{name}.".startswith(head)
    )


def _saved_masks(model: nn.Module, sites: tuple[MaskSite, ...], folder: str) -> dict[str, Tensor]:
    """The masks that a folder holds, boolean, by key of the matrix.

    Raises:
        CheckpointError: if it lacks one, or was trained on another model.
    """
    description, tensors = read(folder)
    check_base_model(description["base_model"], describe_base_model(model))
    masks = {}
    for site in sites:
        bits: Any = tensors.get(f"{site.key}.bits")
        size = -(-site.out_features * site.in_features // 8)
        if bits is None or tuple(bits.shape) != (size,):
            raise CheckpointError(
                f"{folder} holds no mask of {size} bytes for {site.key}: its method is "
                f"{description['method']['name']}. Give the folder of a saved mask of the same matrices, or choose "
                "targets and unmasked_layers as they were there."
            )
        masks[site.key] = unpack(bits.to(site.device), (site.out_features, site.in_features))
    return masks
