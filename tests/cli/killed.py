"""Runs of the command line in processes that may be killed; everything that is slow to import is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import datasets  # noqa: F401
import torch
import transformers  # noqa: F401

import deltune.cli.progress
import deltune.training.fitting  # noqa: F401
from deltune.cli import main

torch.set_num_threads(1)


def run(arguments: Sequence[str], log: str) -> None:
    """Run a command; what it prints goes to the file ``log``."""
    with open(log, "a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        main(list(arguments))
