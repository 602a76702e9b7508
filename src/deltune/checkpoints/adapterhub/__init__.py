"""Folders of AdapterHub's library ``adapters``, as its version 1.3.0 writes and reads them."""

from __future__ import annotations

from deltune.checkpoints.adapterhub.folders import AdapterHub

__all__ = ["AdapterHub"]
