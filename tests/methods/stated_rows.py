"""What a row of the unified view says, computed: its text evaluated with a form's own matrices, on a bare model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import deltune
from deltune.methods.additive.bottleneck import Bottleneck
from deltune.methods.reparameterized.low_rank import LowRank
from deltune.sites import KeyValueForm, KeyValueSite, ParallelSite, SublayerSite, WeightSite

__all__ = ["rows_computed"]


def matrices(form: Any) -> dict[str, Tensor]:
    """The matrices of a form under their names in its text, as they multiply rows from the right."""
    if isinstance(form, Bottleneck):
        assert not form.down.bias.any()
        assert not form.up.bias.any()
        return {"W_down": form.down.weight.T, "W_up": form.up.weight.T}
    assert isinstance(form, LowRank)
    return {"W_down": form.A.T, "W_up": form.B.T}


FUNCTIONS = {"relu": lambda x: x.clamp(min=0), "gelu": nn.functional.gelu, "softmax": lambda x: x.softmax(-1)}


def evaluated(text: str, names: dict[str, Tensor]) -> Tensor:
    """The value of a product such as ``relu(x W_down) W_up``: factors apart by spaces, ^T for transposed."""
    value: Tensor | None = None
    while text := text.strip():
        call = re.match(r"(\w+)\(([^()]*)\)", text)
        name = call or re.match(r"\w+(\^T)?", text)
        assert name is not None, text
        if call is not None:
            factor = FUNCTIONS[call[1]](evaluated(call[2], names))
        else:
            factor = names[name[0].removesuffix("^T")]
            factor = factor.mT if name[0].endswith("^T") else factor
        value = factor if value is None else value @ factor
        text = text[name.end() :]
    assert value is not None
    return value


def combined(text: str, **values: Any) -> Tensor:
    """The value of ``h + 4 dh`` and ``(1 - lam) h + lam dh``: a space between two factors is a product."""
    product = re.sub(r"(?<=[\w)]) (?=\w)", " * ", text)
    result: Tensor = eval(product, {}, values)
    return result


class Read:
    """What a module is given."""

    def __init__(self) -> None:
        self.x = torch.empty(0)

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.x = args[0]


@contextmanager
def rows_computed(model: Any, tuned: deltune.Tuned) -> Iterator[None]:
    """The bare ``model`` computes what the rows of the method that is attached to ``tuned`` say."""
    heads: dict[int, tuple[KeyValueSite, Any]] = {}
    for _, site, form in tuned.attachments["default"].sites:
        scale = {"s": form.scale.detach()} if isinstance(getattr(form, "scale", None), Tensor) else {}
        if isinstance(site, KeyValueSite):
            heads[id(model.get_submodule(site.part.module))] = (site, form)
            continue
        read = Read()
        text, how = form.as_text(site.reads), site.combination(form.factor())

        def change(
            h: Tensor, form: Any = form, read: Read = read, text: str = text, how: str = how, scale: Any = scale
        ) -> Tensor:
            with torch.no_grad():
                return combined(how, h=h, dh=evaluated(text, {**matrices(form), "x": read.x, "h": h}), **scale)

        def after(module: nn.Module, args: Any, result: Any, change: Any = change) -> Any:
            return change(result) if isinstance(result, Tensor) else (change(result[0]), *result[1:])

        if isinstance(site, ParallelSite):
            model.get_submodule(site.reader).register_forward_pre_hook(read)
            changed = model.get_submodule(site.changed)
            if site.side == "output":
                changed.register_forward_hook(after)
            else:
                changed.register_forward_pre_hook(lambda module, args, change=change: (change(args[0]),))
        elif isinstance(site, SublayerSite):
            model.get_submodule(site.result).register_forward_hook(after)
        else:
            assert isinstance(site, WeightSite)
            model.get_submodule(site.module).register_forward_pre_hook(read)
            model.get_submodule(site.module).register_forward_hook(after)
    with heads_computed(heads, model):
        yield


@contextmanager
def heads_computed(heads: dict[int, tuple[KeyValueSite, Any]], model: nn.Module) -> Iterator[None]:
    """As above, of changes inside attention functions, one head after the other."""

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> Any:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        site, form = heads[id(module)]
        pair = form() if isinstance(form, KeyValueForm) else (form.keys, form.values)
        made = []
        for head in range(query.shape[1]):
            q, k, v = (
                query[:, head],
                key[:, head * key.shape[1] // query.shape[1]],
                value[:, head * key.shape[1] // query.shape[1]],
            )
            scores = scaling * q @ k.mT
            scores = scores if mask is None else scores + mask.expand(-1, query.shape[1], -1, -1)[:, head]
            p_k, p_v = (rows[head * len(rows) // query.shape[1]].detach() for rows in pair)
            # the queries are x W_q already, and the model scales all of its products
            names = {"x": scaling * q, "W_q": torch.eye(q.shape[-1], dtype=q.dtype), "P_k": p_k, "P_v": p_v}
            dh = evaluated(form.as_text(site.reads), names)
            lam = torch.sigmoid((scaling * q @ p_k.T).logsumexp(-1) - scores.logsumexp(-1))[..., None]
            made.append(combined(site.combination(form.factor()), h=scores.softmax(-1) @ v, dh=dh, lam=lam))
        return torch.stack(made, dim=2), None

    files = {sys.modules[type(module).__module__] for module in model.modules() if id(module) in heads}
    originals = {file: vars(file)["eager_attention_forward"] for file in files}
    try:
        for file in files:
            vars(file)["eager_attention_forward"] = function
        yield
    finally:
        for file, original in originals.items():
            vars(file)["eager_attention_forward"] = original
