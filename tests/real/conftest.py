"""The lessons, each encoded once, and runs that several tests look at, each done once."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from deltune.tasks import InstructionTuning, SequenceToSequence, TextClassification
from tests.assets import asset
from tests.real import texts
from tests.real.tuning import Lesson, Outcome, Runs

#: The pooler's outputs are small and the head is new, so it needs a high rate of its own.
HEAD_RATE = 0.01
SENTIMENT_STEPS = 50


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import datasets

    torch.set_num_threads(1)
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def sentiment() -> Lesson:
    """Short movie reviews for the MiniLM encoder. Half of the held-out rows are positive."""
    task = TextClassification(label_names=("negative", "positive"), max_length=32)
    return Lesson.of(task, asset("minilm"), *texts.reviews(1300, 300, longest=12))


@pytest.fixture(scope="session")
def person_or_number() -> Lesson:
    """Another task with two classes for the same encoder."""
    task = TextClassification(label_names=("number", "person"), max_length=32)
    return Lesson.of(task, asset("minilm"), *texts.questions(1000, 200))


@pytest.fixture(scope="session")
def review_questions() -> Lesson:
    """Movie reviews as instructions for MiniMind2-Small, which answers with one word."""
    return Lesson.of(InstructionTuning(context="input"), asset("minimind2-small"), *texts.review_questions(400, 24))


@pytest.fixture(scope="session")
def review_words() -> Lesson:
    """Movie reviews for Flan-T5-small, which writes one word."""
    task = SequenceToSequence(source="input", target="output", max_target_length=8)
    return Lesson.of(task, asset("flan-t5-small"), *texts.review_questions(400, 32))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Shared by the processes of pytest-xdist, whose folders lie in a common one."""
    folder = tmp_path_factory.getbasetemp()
    return Runs((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "runs")


Learned = Callable[[str], Outcome]


@pytest.fixture(scope="session")
def learned(sentiment: Lesson, runs: Runs) -> Learned:
    """The outcome of a method on the sentiment lesson."""
    return lambda method: runs.of(sentiment, method, SENTIMENT_STEPS, head_learning_rate=HEAD_RATE)
