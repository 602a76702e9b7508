"""How much of each of its parts UniPELT uses after a training: ``python -m benchmarks.unipelt_gates --picture FILE``.

MiniLM, movie reviews; the mean value of each gate on the sentences that nothing was trained on, as a table and as a
picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deltune
from benchmarks.sentiment import Sentiment
from deltune.measure import gate_picture, gate_table
from deltune.training.evaluation import batches_of


def main() -> None:
    """Train, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="unipelt")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-size", type=int, default=2000)
    parser.add_argument("--evaluation-size", type=int, default=1000)
    parser.add_argument("--split-seed", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--picture", type=Path, default=None, help="draw into this file: .svg, .png or .pdf")
    given = parser.parse_args()
    lesson = Sentiment(given.steps, given.train_size, given.split_seed, given.evaluation_size)
    tuned = lesson.train(given.method, given.seed, given.rate)
    values = deltune.gate_values(tuned, batches_of(lesson.task, lesson.data.evaluation, lesson.tokenizer, 64))
    print(f"accuracy {lesson.accuracy(tuned):.1f} %")
    print(gate_table(values))
    if given.picture is not None:
        gate_picture(values, given.picture, f"gates of {given.method} after {given.steps} steps")


if __name__ == "__main__":
    main()
