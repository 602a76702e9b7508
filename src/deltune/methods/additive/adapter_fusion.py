"""AdapterFusion: trained adapters of several tasks, mixed by a small attention in each place.

Letters: d hidden size, N adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy, check_base_model, describe_base_model
from deltune.errors import CheckpointError, MethodError
from deltune.methods.additive.bottleneck import Bottleneck, BottleneckMethod
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import parse, register
from deltune.methods.saved import TENSOR_FILE, read
from deltune.sites import Form, Insertion, LayerForm, ParallelForm, Site, SublayerForm

__all__ = ["AdapterFusion", "FusedAdapters"]


class FusedAdapters(SublayerForm, ParallelForm, LayerForm):
    r"""dh = W_v sum_t p_t z_t with p = softmax_t(q . k_t / tau), z_t = A_t(h), q = W_q h + b_q, k_t = W_k z_t + b_k.

    W_q and W_k start normal with a standard deviation of 0.02, W_v as the identity with ``off_diagonal`` elsewhere;
    biases are zero. The dot products are not divided by sqrt(d), and are made in float32.

    Args:
        adapters: N bottlenecks, which are frozen here.
        features: d.
        value: whether there is W_v.
        temperature: tau.
        dropout: of the dot products while training.
        off_diagonal: value of W_v at the start beside its diagonal.
        regularization: factor of the penalty ||I - W_v||^2.
        dtype: type of the parameters.
        device: where they are.
    """

    formula: ClassVar[str] = "sum_t softmax_t(q . k_t) A_t({x}) W_v"

    #: (N,) boolean: which adapters take part.
    kept: Tensor

    def __init__(
        self,
        adapters: Sequence[Bottleneck],
        features: int,
        value: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.0,
        off_diagonal: float = 1e-6,
        regularization: float = 0.01,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(_frozen(adapter) for adapter in adapters)
        self.query = nn.Linear(features, features, dtype=dtype, device=device)
        self.key = nn.Linear(features, features, dtype=dtype, device=device)
        self.value = nn.Linear(features, features, bias=False, dtype=dtype, device=device) if value else None
        self.temperature, self.dropout, self.regularization = temperature, dropout, regularization
        self.register_buffer("kept", torch.ones(len(adapters), dtype=torch.bool, device=device))
        self.saved_buffers = tuple(name for name, _ in self.named_buffers())
        self._indices = list(range(len(adapters)))
        with torch.no_grad():
            for linear in (self.query, self.key):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
            if self.value is not None:
                self.value.weight.fill_(off_diagonal).fill_diagonal_(1.0)

    def keep(self, indices: Sequence[int]) -> None:
        """Let only these adapters take part; the weights of the others go to them."""
        self._indices = sorted(indices)
        self.kept.fill_(False)
        self.kept[self._indices] = True

    def restored(self) -> None:
        """After the file was read: the adapters that it keeps."""
        self._indices = self.kept.nonzero().flatten().tolist()

    def changes(self, h: Tensor) -> Tensor:
        """What each kept adapter would change alone, (..., n, d) for h (..., d)."""
        return torch.stack([self.adapters[index](h) for index in self._indices], dim=-2)

    def weights(self, h: Tensor, changes: Tensor) -> Tensor:
        """p, (..., n) in float32: non-negative and 1 in sum."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            query = F.linear(h.to(wide), self.query.weight.to(wide), self.query.bias.to(wide))
            keys = F.linear(changes.to(wide), self.key.weight.to(wide), self.key.bias.to(wide))
            scores = (keys @ query[..., None])[..., 0]
            return F.softmax(F.dropout(scores, self.dropout, self.training) / self.temperature, dim=-1)

    def as_text(self, x: str) -> str:
        """Without W_v where there is none."""
        return super().as_text(x) if self.value is not None else super().as_text(x).removesuffix(" W_v")

    def forward(self, h: Tensor) -> Tensor:
        """The change (..., d) for h (..., d)."""
        changes = self.changes(h)
        weights = self.weights(h, changes).to(changes.dtype)
        mixed = (weights[..., None, :] @ changes)[..., 0, :]
        # the values of a weighted sum are the weighted sum of the values
        return mixed if self.value is None else F.linear(mixed, self.value.weight.to(mixed.dtype))

    def penalty(self) -> Tensor | None:
        """``regularization`` times ||I - W_v||^2; None without W_v."""
        if self.value is None or not self.regularization:
            return None
        weight = self.value.weight.float()
        identity = torch.eye(weight.shape[0], device=weight.device)
        return self.regularization * (identity - weight).square().sum()


def _frozen(adapter: Bottleneck) -> Bottleneck:
    """``adapter`` itself, with buffers in the place of its parameters."""
    for module in adapter.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return adapter


@register
@dataclass(frozen=True)
class AdapterFusion(Method):
    r"""Mixes trained adapters of several tasks for a target task: o = sum_t softmax_t(q . k_t) W_v z_t, for each token.

    z_t is what adapter t would change alone, q is made of what the adapters read, k_t of z_t. The adapters and the
    model are frozen; q, k and W_v are trained on the target task, with its head. The target task's own adapter may be
    among them. At the start the change is close to the adapters' mean.

    When to use:
        A small target task, and adapters that were trained on other tasks with the same model: it can draw on them
        without forgetting any. Not to save parameters: the attention is a fifth of the model.

    Cost:
        Parameters: 3 d^2 + 2 d in each place, however many adapters there are. BERT-base, one place in a layer:
            21,252,096 (19.4 %); 14,174,208 with ``value=false``.
        Memory: as full fine-tuning of a fifth of the model; and the frozen adapters, which are in the file as well.
        Time: all N adapters and the attention in each place.
        Inference: the same; 62 % slower than the model alone was measured with 8 adapters (Rücklé et al. 2021,
            arXiv 2010.11918). Keep the most used ones only: ``deltune.prune_adapters``.

    Terms:
        Site: the places of the adapters that are fused.
        Form: the adapters, frozen, and an attention over what they give.
        Combination: a sum weighted by that attention, added as each adapter's change would be.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> # in earnest folders: adapters=("runs/reviews", "runs/questions"); a method stands for an untrained one
        >>> method = deltune.AdapterFusion(adapters=("pfeiffer-adapter(width=8)", "pfeiffer-adapter(width=4)"))
        >>> tuned = deltune.attach(BertForSequenceClassification(config), method)
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 3 * 32 * 32 + 2 * 32 each
        6272

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/fusion \
            --method adapter-fusion --adapters "pfeiffer-adapter, pfeiffer-adapter(width=4)"

    Differs from the paper:
        The regulariser of W_v is a part of the loss; the authors' code adds its gradient after the step, where it
        falls into the next one or is lost. W_v starts with 1e-6 beside its diagonal as in that code; ``off_diagonal=0``
        is the paper's identity. Dropout acts on the dot products, as in the code. The query is made of what the
        adapters read, in pfeiffer-adapter the normalised sum. The temperature is constant. All kinds of adapters here
        can be fused, as long as all of them stand in the same places.

    Source:
        Pfeiffer et al. 2021, arXiv 2005.00247, section 3.2; authors' code: adapter-hub/adapters.
    """

    adapters: tuple[str, ...] = option((), "folders of saved adapters, or methods for untrained ones")
    value: bool = option(True, "whether there is a matrix W_v of values")
    temperature: float = option(1.0, "tau, which divides the dot products", minimum=0, exclusive=True)
    dropout: float = option(0.0, "dropout of the dot products while training", minimum=0, maximum=0.99)
    off_diagonal: float = option(1e-6, "value of W_v at the start beside its diagonal")
    regularization: float = option(0.01, "factor of the penalty that holds W_v near the identity", minimum=0)

    name: ClassVar[str] = "adapter-fusion"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    specimen: ClassVar[str] = "adapters='pfeiffer-adapter, pfeiffer-adapter'"
    paper: ClassVar[Paper] = Paper(
        "Pfeiffer et al.",
        "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
        2021,
        "2005.00247",
    )
    learning_rate: ClassVar[float] = 5e-4
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The adapters of all sources together, in each of their places.

        Raises:
            MethodError: if there are no sources, or they are not adapters in the same places.
            CheckpointError: if a folder holds no adapter of this model.
        """
        if not self.adapters:
            raise MethodError(
                f"{self.name} needs trained adapters: adapters=FOLDER,FOLDER with the folders that tuning with "
                "pfeiffer-adapter or another adapter wrote."
            )
        sources = [_placed(source, model, anatomy) for source in self.adapters]
        first = sources[0]
        for source, places in zip(self.adapters, sources, strict=True):
            if places.keys() != first.keys():
                other = sorted(places.keys() ^ first.keys())
                raise MethodError(
                    f"{self.name}: {source} and {self.adapters[0]} stand in different places ({', '.join(other[:4])}). "
                    "Fuse adapters of one method with the same targets."
                )
        for identity, (site, _) in first.items():
            features: int = site.hidden_size  # type: ignore[attr-defined]
            yield Placement(
                site,
                FusedAdapters(
                    [places[identity][1] for places in sources],
                    features,
                    self.value,
                    self.temperature,
                    self.dropout,
                    self.off_diagonal,
                    self.regularization,
                    dtype=site.dtype,  # type: ignore[attr-defined]
                    device=site.device,  # type: ignore[attr-defined]
                ),
            )

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """With methods in the place of folders: the file holds the adapters."""
        return replace(self, adapters=tuple(str(_method_of(source)) for source in self.adapters))


def _method_of(source: str) -> Method:
    """The method of a source: of a folder, the one that was saved there."""
    if _is_folder(source):
        return parse(read(source, tensors=False)[0]["method"])
    return parse(source)


def _is_folder(source: str) -> bool:
    return (Path(source) / TENSOR_FILE).is_file() or "/" in source or Path(source).is_dir()


def _placed(source: str, model: nn.Module, anatomy: Anatomy) -> dict[str, tuple[Site, Bottleneck]]:
    """A source's bottlenecks by the identity of their sites, filled with what its folder holds."""
    found: dict[str, tuple[Site, Bottleneck]] = {}
    method = _method_of(source)
    if not isinstance(method, BottleneckMethod):
        raise MethodError(f"adapter-fusion: {source} is {method.name}, which is no adapter. Fuse adapters.")
    tensors: dict[str, Tensor] | None = None
    if _is_folder(source):
        description, tensors = read(source)
        check_base_model(description["base_model"], describe_base_model(model))
    for placement in method.place(model, anatomy):
        site, form = placement.site, placement.form
        if not isinstance(form, Bottleneck) or not isinstance(site, Site):
            raise MethodError(
                f"adapter-fusion: {source} ({method}) trains parameters of the model besides its adapters, which "
                "cannot be mixed. Train adapters with train_norms=false for that."
            )
        if tensors is not None:
            _fill(form, site.key, tensors, source)
        found[site.identity] = (site, form)
    return found


@torch.no_grad()
def _fill(form: Bottleneck, key: str, tensors: Mapping[str, Tensor], source: str) -> None:
    for name, parameter in form.named_parameters():
        saved = tensors.get(f"{key}.{name}")
        if saved is None or saved.shape != parameter.shape:
            state = "is missing" if saved is None else f"has the shape {tuple(saved.shape)}"
            raise CheckpointError(
                f"{source} does not fit this model: {key}.{name} {state}, but {tuple(parameter.shape)} is wanted."
            )
        parameter.copy_(saved)
