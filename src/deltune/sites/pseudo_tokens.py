"""Pseudo tokens: positions of the input whose embeddings a form makes, wherever they stand.

Letters: B batch, T positions, P pseudo tokens, d width of an embedding.

A pseudo token is an id beyond every vocabulary (:data:`deltune.tasks.template.FIRST_PSEUDO_TOKEN` and the following, in
their order). Where the table of embeddings looks ids up, another id stands in for it, and the form's row takes the
place of what was found. Neither length, positions nor masks change, so that caches of any kind, padding on any side and
token types work as without. Rows that are made are not scaled, as models do that scale their embeddings: a form's row
is what the first layer reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.errors import StateError, TargetError
from deltune.sites.base import Control, Insertion, Site, Tap, named_arguments
from deltune.sites.embedding import TokenForm
from deltune.tasks.template import FIRST_PSEUDO_TOKEN

__all__ = ["PseudoTokenSite", "pseudo_token_sites"]

#: Attribute under which the ids that were given travel with those that the table looks up: data of one call, so that
#: threads do not meet and nothing is kept.
_GIVEN = "deltune_given_ids"


@dataclass(frozen=True)
class PseudoTokenSite(Site):
    """The table of token embeddings of a stack.

    Attributes:
        tables: names of the modules that look ids up in that table: one, or several that are tied.
        entry: name of the module that the stack's ids are given to.
        hidden_size: width d of an embedding.
        dtype: of the embeddings.
        device: of the embeddings.
    """

    tables: tuple[str, ...]
    entry: str
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.TOKENS

    @property
    def modified(self) -> str:
        """What the stack reads."""
        return "embedded input"

    def combination(self, factor: str) -> str:
        """Rows of their own among the others."""
        return "[.., dh, .., h]"

    @property
    def identity(self) -> str:
        """Apart from that of a :class:`TokenSite` of the same stack."""
        return f"{self.insertion.value}:pseudo:{self.key}"

    def tap(self, control: Control) -> PseudoTokenTap:
        """A tap that puts rows where pseudo tokens stand."""
        return PseudoTokenTap(self, control)


class PseudoTokenTap(Tap):
    """Hooks on the tables, and one at the entry that checks what is given."""

    watches = True
    site: PseudoTokenSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook entry and tables."""
        entry = modules[self.site.entry]
        names = tuple(inspect.signature(entry.forward).parameters)
        # before a hook that embeds the input, so that the ids are seen
        handle = entry.register_forward_pre_hook(_Check(self, names), with_kwargs=True, prepend=True)
        self._handles.append(handle)
        for name in self.site.tables:
            self._handles.append(modules[name].register_forward_pre_hook(_StandIn()))
            self._handles.append(modules[name].register_forward_hook(_PutRows(self)))

    def groups(self, batch: int) -> Iterator[tuple[list[int] | None, list[TokenForm]]]:
        """The forms of each live attachment, and which of ``batch`` rows they serve; None for all.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        routes = self.control.routes(batch) if self.control.route else None
        forms: dict[str, list[TokenForm]] = {}
        for name, form, _ in self._acting():
            assert isinstance(form, TokenForm)
            forms.setdefault(name, []).append(form)
        if routes is None:
            yield None, [form for several in forms.values() for form in several]
            return
        for name, several in forms.items():
            yield [row for row, other in enumerate(routes) if other == name], several


@dataclass
class _Check:
    """Before the stack: refuse rows whose pseudo tokens are not those of the live forms.

    A call with filled caches goes on with rows that were checked. A compiled graph does not check.
    """

    tap: PseudoTokenTap
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        arguments = named_arguments(self.names, args, kwargs)
        cache = arguments.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return
        ids = arguments.get("input_ids")
        if ids is None and arguments.get("encoder_outputs") is not None:
            return
        if ids is None:
            if any(forms for _, forms in self.tap.groups(len(arguments.get("inputs_embeds", ())))):
                raise StateError(
                    f"{type(module).__name__} was given no input_ids. Pseudo tokens are known by their ids, so give "
                    "the ids of a template that has some, and not embeddings."
                )
            return
        wanted = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        for rows, forms in self.tap.groups(len(ids)):
            wanted[slice(None) if rows is None else rows] = sum(form.length for form in forms)
        pseudo = ids >= FIRST_PSEUDO_TOKEN
        in_order = (ids - FIRST_PSEUDO_TOKEN == pseudo.cumsum(1) - 1) | ~pseudo
        right = (pseudo.sum(1) == wanted) & in_order.all(1)
        if not bool(right.all()):
            row = int(right.long().argmin())
            raise StateError(_difference(row, int(pseudo[row].sum()), int(wanted[row])))


def _difference(row: int, found: int, wanted: int) -> str:
    """What is wrong with one row."""
    start = f"Row {row + 1} of the batch has {found or 'no'} pseudo token{'s' * (found != 1)}, but "
    if not wanted:
        return (
            f"{start}nothing that is active for it makes their embeddings. Attach p-tuning(placement=template, "
            f"length={found}), or activate the attachment that does."
        )
    if found == wanted:
        return f"The pseudo tokens of row {row + 1} of the batch are not in their order. Encode it with a template."
    if found:
        return f"{start}the active ones make {wanted}. Let the template have {wanted}, or attach with length={found}."
    return (
        f"{start}the active ones make {wanted}. Encode the data with a template that has them, such as "
        f"'{{text}} [P{wanted}] [MASK]' of the task cloze; or attach p-tuning with placement=front, which needs none."
    )


@dataclass
class _StandIn:
    """Before a table: give it an id that it has in the place of each pseudo token."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given: Tensor = args[0]
        if hasattr(given, _GIVEN):  # another tap's, on the same table
            return args
        looked_up = given.masked_fill(given >= FIRST_PSEUDO_TOKEN, _harmless(module))
        setattr(looked_up, _GIVEN, given)
        return (looked_up, *args[1:])


def _harmless(module: nn.Module) -> int:
    """An id of the table that is not its padding, which some tables treat apart."""
    return 1 if getattr(module, "padding_idx", None) == 0 else 0


@dataclass
class _PutRows:
    """After a table: put the forms' rows where pseudo tokens stand."""

    tap: PseudoTokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        given: Tensor = getattr(args[0], _GIVEN)
        places = given - FIRST_PSEUDO_TOKEN
        made: list[Tensor] = []
        for rows, forms in self.tap.groups(len(given)):
            if rows is not None:
                # behind the rows of the attachments before
                places[rows] += sum(len(several) for several in made)
            made.extend(form() for form in forms)
        if not made:
            return output
        pseudo = given >= FIRST_PSEUDO_TOKEN
        places = places.masked_fill(~pseudo, 0)
        return torch.where(pseudo[..., None], F.embedding(places, torch.cat(made).to(output)), output)


def pseudo_token_sites(model: nn.Module, anatomy: Anatomy, targets: Targets | None) -> tuple[PseudoTokenSite, ...]:
    """The tables of token embeddings of the stacks that ``targets`` selects; that of the first stack for None.

    Args:
        model: the model.
        anatomy: its parts.
        targets: the role ``embeddings``, or patterns of module names.

    Raises:
        TargetError: if a target selects nothing, or what is no table of token embeddings, or whose model reads ids
            elsewhere too.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    selected = _first(model, anatomy, modules) if targets is None else targets.select(anatomy, tuple(modules), _ROLES)
    sites = tuple(_site(part, anatomy, modules) for part in selected)
    owners: dict[str, str] = {}
    for site in sites:
        for table in site.tables:
            if owners.setdefault(table, site.key) != site.key:
                raise TargetError(
                    f"{owners[table]} and {site.key} share one table, so their pseudo tokens could not be told apart. "
                    "Choose one of them with stacks=."
                )
    return sites


_ROLES = ("embeddings",)


def _first(model: nn.Module, anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> tuple[Part, ...]:
    """The table of the first stack that has one; of a model that nobody has described, the one that it names."""
    for part in anatomy.of("embeddings"):
        if isinstance(modules[part.module], nn.Embedding):
            return (part,)
    named = getattr(model, "get_input_embeddings", lambda: None)() if not anatomy.stacks else None
    for name, module in modules.items():
        if module is named and isinstance(module, nn.Embedding):
            return (Part("module", "", None, name),)
    raise TargetError(f"This model ({anatomy.family}) has no table of token embeddings, so it reads no pseudo tokens.")


def _site(part: Part, anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> PseudoTokenSite:
    table = modules[part.module]
    if not isinstance(table, nn.Embedding):
        raise TargetError(
            f"{part.key} is a {type(table).__name__}, not a table of token embeddings, so it reads no pseudo tokens."
        )
    for other in anatomy.stacks.values():
        inside = other.tokens.embeddings if other.tokens is not None else None
        if inside is not None and part.module.startswith(f"{inside}."):
            raise TargetError(
                f"The {other.name} of {anatomy.family} finds the end of its text by the ids, which pseudo tokens would "
                "disturb. Use placement=front, which puts the rows in front of the embedded text."
            )
    stack = anatomy.stacks.get(part.stack)
    tied = {
        id(module): name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and module.weight is table.weight
    }
    entry = stack.tokens.entry if stack is not None and stack.tokens is not None else ""
    weight = table.weight
    return PseudoTokenSite(
        part, tuple(sorted(tied.values())), entry, int(table.embedding_dim), weight.dtype, weight.device
    )
