"""Save every fixture as AdapterHub's library reads it: ``python -m tests.checkpoints.write_adapterhub OUT``.

``make_adapterhub_fixtures.py --check OUT`` then loads these folders with that library and compares logits.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import deltune
from tests.checkpoints.adapterhub_cases import FIXTURES, build, cases


def main(target: Path) -> None:
    warnings.simplefilter("ignore")
    for kind, case in cases():
        if not case.startswith("flex_"):
            deltune.load(build(kind), FIXTURES / kind / case, pickled=True).save(
                target / kind / case, format="adapterhub"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
