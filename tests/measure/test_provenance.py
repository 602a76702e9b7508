from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

from deltune.measure import cpu_count, provenance


def test_it_says_versions_machine_and_time():
    found = provenance(seed=3, threads=2)
    assert found["versions"]["python"] == platform.python_version()
    assert {"deltune", "torch", "transformers"} <= set(found["versions"])
    assert (found["seed"], found["threads"], found["device"]) == (3, 2, "cpu")
    assert found["cpu_count"] == cpu_count() >= 1
    assert found["date"].endswith("+00:00")


def test_it_names_no_user_and_no_path():
    text = json.dumps(provenance())
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert getpass.getuser() not in json.loads(text).values()


def test_importing_the_package_loads_no_torch():
    program = "import sys, deltune.measure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
