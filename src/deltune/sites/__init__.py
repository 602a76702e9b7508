"""The only code that touches a model's modules: every mechanism by which a delta acts."""

from __future__ import annotations

from deltune.sites.attention import KeyValueForm, KeyValueSite, key_value_sites
from deltune.sites.base import Control, Form, Insertion, Site, Tap
from deltune.sites.embedding import TokenForm, TokenSite, token_sites
from deltune.sites.parallel import ParallelForm, ParallelSite, parallel_sites
from deltune.sites.parameter import ParameterSite, Selection, parameter_modules
from deltune.sites.sublayer import SublayerForm, SublayerSite, sublayer_sites
from deltune.sites.weight import WeightForm, WeightSite, weight_sites

__all__ = [
    "Control",
    "Form",
    "Insertion",
    "KeyValueForm",
    "KeyValueSite",
    "ParallelForm",
    "ParallelSite",
    "ParameterSite",
    "Selection",
    "Site",
    "SublayerForm",
    "SublayerSite",
    "Tap",
    "TokenForm",
    "TokenSite",
    "WeightForm",
    "WeightSite",
    "key_value_sites",
    "parallel_sites",
    "parameter_modules",
    "sublayer_sites",
    "token_sites",
    "weight_sites",
]
