"""``python -m cluster.default_model [--force]``: make the default model and print its folder."""

from __future__ import annotations

import argparse
import sys

from cluster.default_model import DefaultModelError, ensure_default_model


def main() -> int:
    """Print the folder on stdout. Exit status 1, with the reason on stderr, if the model cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m cluster.default_model", description=main.__doc__)
    parser.add_argument("--force", action="store_true", help="make it anew even if it is in the cache")
    options = parser.parse_args()
    try:
        print(ensure_default_model(anew=options.force))
    except DefaultModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
