"""What methods have in common that train keys and values in front of the real ones.

Letters: P length of the prefix, K key/value heads, D width of a head, M width of the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.additive.prefix_forms import Prefix, PrefixTrunk, ReparameterizedPrefix
from deltune.methods.additive.prefix_start import fit_network, saved_prefixes, solve_network, text_prefixes
from deltune.methods.base import Method, Placement
from deltune.methods.options import option
from deltune.sites import Form, Insertion, KeyValueSite, PositionShift, key_value_sites, position_sites

__all__ = ["PrefixMethod"]

#: Initialisations that need an option.
_GIVEN = {"text": "start_text", "trained": "start_from"}


@dataclass(frozen=True)
class PrefixMethod(Method):
    """A method that trains P keys and values in front of the real ones, in every selected attention function.

    An option that says from what they start (``start_text``, ``start_from``) sets ``initialization``.
    """

    length: int = option(
        10,
        "number P of additional keys and values; with start_text or start_from it is theirs, and any other is refused "
        "but the default",
        minimum=1,
    )
    reparameterize: bool = option(True, "train through a small network that is dropped after training")
    width: int = option(512, "hidden width M of that network", minimum=1)
    dropout: float = option(0.0, "dropout of keys and values while training", minimum=0, maximum=0.99)
    initialization: str = option(
        "random",
        "where the prefix starts; the last two are set by the options that they need",
        choices=("random", "text", "trained"),
    )
    start_text: str = option("", "text from whose keys and values in the frozen model the prefix starts")
    tokenizer: str = option("", "folder of the tokenizer for start_text; the model's own folder if empty")
    start_from: str = option("", "folder of a saved prefix to start from; a task head in it is not taken")
    shift_positions: bool = option(False, "let the text begin at position P, as if the prefix were text before it")
    targets: Targets = option(Targets(("attention",)), "which attention functions")

    insertion: ClassVar[Insertion] = Insertion.KEY_VALUE
    unchanged_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [word for word, name in _GIVEN.items() if getattr(self, name)]
        if len(given) > 1 or (given and self.initialization not in ("random", given[0])):
            names = [_GIVEN[word] for word in given]
            others = [] if len(given) > 1 else [f"initialization={self.initialization}"]
            raise MethodError(f"{self.name}: a prefix starts from one thing, not from {' and '.join(names + others)}.")
        if given:
            object.__setattr__(self, "initialization", given[0])
        elif self.initialization in _GIVEN:
            needed = _GIVEN[self.initialization]
            raise MethodError(f"{self.name}: initialization={self.initialization} needs the option {needed}.")
        if self.tokenizer and self.initialization != "text":
            raise MethodError(f"{self.name}: tokenizer is read for start_text only; give that, or no tokenizer.")

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A prefix in every selected attention function, and one shared trunk per kind of attention.

        Raises:
            TargetError: if a target selects nothing, or the positions of a selected stack cannot be shifted.
            MethodError: if the prefix cannot start from the text, or has another length than ``length`` says.
            CheckpointError: if the folder to start from holds no prefix that fits.
        """
        sites = key_value_sites(model, anatomy, self.targets)
        start = self._start(model, sites)
        length = self.length if start is None else self._length_of(start)
        trunks: dict[str, PrefixTrunk] = {}
        placements: list[Placement] = []
        forms: list[Prefix | ReparameterizedPrefix] = []
        for site in sites:
            stack = site.part.stack
            if self.reparameterize and stack not in trunks:
                trunks[stack] = PrefixTrunk(length, site.hidden_size, self.width, site.dtype, site.device)
                placements.append(Placement(None, trunks[stack], shared=f"{stack}.prefix"))
            forms.append(self._form(site, length, trunks.get(stack)))
            placements.append(Placement(site, forms[-1]))
        if start is not None:
            self._begin_at(sites, forms, trunks, start)
        yield from placements
        if self.shift_positions:
            stacks = dict.fromkeys(site.part.stack for site in sites if site.part.stack in anatomy.stacks)
            for position_site in position_sites(model, anatomy, tuple(stacks)):
                yield Placement(position_site, PositionShift(length))

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The flat form, without text and folders: its values are in the file, and nothing else is needed."""
        length = next(form.length for form in forms.values() if isinstance(form, Prefix | ReparameterizedPrefix))
        return replace(
            self,
            length=length,
            reparameterize=False,
            initialization="random",
            start_text="",
            tokenizer="",
            start_from="",
        )

    def _form(self, site: KeyValueSite, length: int, trunk: PrefixTrunk | None) -> Prefix | ReparameterizedPrefix:
        heads, head_dim = site.shape.key_value_heads, site.shape.head_dim
        if trunk is None:
            return Prefix(heads, length, head_dim, self.dropout, site.dtype, site.device)
        return ReparameterizedPrefix(trunk, heads, head_dim, self.dropout, site.dtype, site.device)

    def _start(self, model: nn.Module, sites: Sequence[KeyValueSite]) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values to start from for each site, each (K, P, D); None for random ones."""
        if self.start_text:
            return text_prefixes(model, sites, self.tokenizer, self.start_text)
        if self.start_from:
            return saved_prefixes(model, sites, self.start_from, self.shift_positions)
        return None

    def _length_of(self, start: Sequence[tuple[Tensor, Tensor]]) -> int:
        length = start[0][0].shape[1]
        default = next(item.default for item in dataclasses.fields(self) if item.name == "length")
        if self.length not in (default, length):
            source = f"{self.start_text!r} is {length} tokens" if self.start_text else f"{self.start_from} has {length}"
            raise MethodError(
                f"{self.name}: length is {self.length}, but {source}, and a prefix that starts there is as long. Use "
                f"length={length}, or leave it out."
            )
        return length

    def _begin_at(
        self,
        sites: Sequence[KeyValueSite],
        forms: Sequence[Prefix | ReparameterizedPrefix],
        trunks: Mapping[str, PrefixTrunk],
        start: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Give the forms these keys and values; a network is solved for a trained prefix, and fitted to text."""
        by_stack: dict[str, list[tuple[ReparameterizedPrefix, tuple[Tensor, Tensor]]]] = {}
        for site, form, pair in zip(sites, forms, start, strict=True):
            if isinstance(form, Prefix):
                form.start_at(*pair)
            elif self.start_from:
                solve_network(trunks[site.part.stack], form, pair)
            else:
                by_stack.setdefault(site.part.stack, []).append((form, pair))
        for stack, fitted in by_stack.items():
            fit_network(trunks[stack], [form for form, _ in fitted], [pair for _, pair in fitted])
