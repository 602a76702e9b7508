"""Packages that only training needs, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from deltune.errors import DeltuneError

_PACKAGES = {"sklearn": "scikit-learn", "scipy": "scikit-learn", "pyarrow": "datasets"}


def require(module: str) -> Any:
    """Imports a module of the ``train`` extra.

    Args:
        module: Dotted name, such as ``sklearn.metrics``.

    Returns:
        The module.

    Raises:
        DeltuneError: The package is not installed; the message says how to install it.
    """
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise DeltuneError(
            f"This needs the package {_PACKAGES.get(top, top)!r}, which is not installed. "
            "Install what training needs with: pip install 'deltune[train]'"
        ) from error
