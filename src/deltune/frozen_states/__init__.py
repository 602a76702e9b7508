"""Layers below everything that trains run once for each text; what they made is kept in a folder."""

from __future__ import annotations

from deltune.frozen_states.states import FrozenStates, frozen_states
from deltune.frozen_states.store import StateStore
from deltune.frozen_states.trunk import Trunk, refuse_dropout

__all__ = ["FrozenStates", "StateStore", "Trunk", "frozen_states", "refuse_dropout"]
