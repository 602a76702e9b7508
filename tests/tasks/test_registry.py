from __future__ import annotations

import subprocess
import sys

import pytest

import deltune.tasks
from deltune.errors import DataError
from deltune.tasks import get_task, task_from_description, task_names


@pytest.mark.parametrize("name", task_names())
def test_every_task_is_complete(name):
    task = get_task(name)
    assert task.name == name
    assert task.__name__ in deltune.tasks.__all__
    names = {"text-classification": ("a", "b"), "cloze": ("a", "b"), "token-tagging": ("O", "B", "I")}
    options = {"label_names": names[name]} if name in names else {}
    built = task(**options)
    assert task_from_description(built.describe()) == built
    assert built.columns(labelled=False)
    assert hash(built) == hash(task(**options))


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match=r"no task 'text-clasification'. Did you mean 'text-classification'"):
        get_task("text-clasification")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        deltune.tasks.Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "must name its task under 'task'"),
        ({"task": "text-regresion", "options": {}}, "Did you mean 'text-regression'"),
        ({"task": "text-regression"}, "has the parts task"),
        ({"task": "text-regression", "options": {}, "los": ""}, "unknown part 'los'.*Did you mean 'loss'"),
        ({"task": "text-regression", "options": {"labels": "x"}}, "no option 'labels'.*Did you mean 'label'"),
    ],
)
def test_wrong_descriptions_are_refused(description, message):
    with pytest.raises(DataError, match=message):
        task_from_description(description)
    with pytest.raises(DataError, match="not a description of the task 'text-classification'"):
        get_task("text-classification").from_description({"task": "text-regression", "options": {}})


def test_every_public_name_exists():
    assert all(getattr(deltune.tasks, name) is not None for name in deltune.tasks.__all__)
    assert set(dir(deltune.tasks)) == set(deltune.tasks.__all__)


def test_importing_is_cheap():
    code = (
        "import sys; from deltune.tasks import *; from deltune.tasks import task_names, get_task;"
        "[get_task(n) for n in task_names()];"
        "print([m for m in ('torch', 'transformers', 'datasets', 'sklearn', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_missing_packages_are_explained(monkeypatch):
    from deltune.errors import DeltuneError
    from deltune.tasks._optional import require

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(DeltuneError, match=r"needs the package 'scikit-learn'.*pip install 'deltune\[train\]'"):
        require("sklearn.metrics")
