"""What commands say on a terminal."""

from __future__ import annotations

import sys


def complain(text: str) -> int:
    """Print an error to stderr; the exit status that goes with it."""
    print(f"error: {text}", file=sys.stderr)
    return 1
