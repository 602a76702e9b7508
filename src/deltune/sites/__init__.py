"""The only code that touches a model's modules: every mechanism by which a delta acts."""

from __future__ import annotations

from deltune.sites.attention import HeadForm, HeadSite, KeyValueForm, KeyValueSite, head_sites, key_value_sites
from deltune.sites.attention_positions import PositionShift, PositionSite, position_sites
from deltune.sites.attention_records import recorded_keys_and_values
from deltune.sites.base import Control, Form, Insertion, Site, Tap
from deltune.sites.embedding import ReadingTokenForm, TokenForm, TokenSite, token_sites
from deltune.sites.entries import EntriesForm, EntriesSite, Piece, entries_below, entries_site
from deltune.sites.gate import GateForm, GateSite, Pooling, causal_at, gate_site
from deltune.sites.grouped import GroupableForm, GroupedForms
from deltune.sites.layer import LayerForm, LayerSite, NormedSumSite, layer_sites, residual_sum_sites
from deltune.sites.mask import MaskForm, MaskSite, mask_sites
from deltune.sites.parallel import ParallelForm, ParallelSite, parallel_sites
from deltune.sites.parameter import ParameterSite, Selection, SelectionForm, parameter_modules
from deltune.sites.pseudo_tokens import PseudoTokenSite, pseudo_token_sites
from deltune.sites.states import StackStates, StatesForm, StatesSite, states_sites
from deltune.sites.sublayer import SublayerForm, SublayerSite, sublayer_sites
from deltune.sites.weight import WeightForm, WeightSite, weight_sites

__all__ = [
    "Control",
    "EntriesForm",
    "EntriesSite",
    "Form",
    "GateForm",
    "GateSite",
    "GroupableForm",
    "GroupedForms",
    "HeadForm",
    "HeadSite",
    "Insertion",
    "KeyValueForm",
    "KeyValueSite",
    "LayerForm",
    "LayerSite",
    "MaskForm",
    "MaskSite",
    "NormedSumSite",
    "ParallelForm",
    "ParallelSite",
    "ParameterSite",
    "Piece",
    "Pooling",
    "PositionShift",
    "PositionSite",
    "PseudoTokenSite",
    "ReadingTokenForm",
    "Selection",
    "SelectionForm",
    "Site",
    "StackStates",
    "StatesForm",
    "StatesSite",
    "SublayerForm",
    "SublayerSite",
    "Tap",
    "TokenForm",
    "TokenSite",
    "WeightForm",
    "WeightSite",
    "causal_at",
    "entries_below",
    "entries_site",
    "gate_site",
    "head_sites",
    "key_value_sites",
    "layer_sites",
    "mask_sites",
    "parallel_sites",
    "parameter_modules",
    "position_sites",
    "pseudo_token_sites",
    "recorded_keys_and_values",
    "residual_sum_sites",
    "states_sites",
    "sublayer_sites",
    "token_sites",
    "weight_sites",
]
