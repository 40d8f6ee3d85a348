"""``python -m actors.native``: which CPU kernels this machine runs; exit status 1 where they are not built."""

from __future__ import annotations

import sys

from .library import functions, instruction_sets


def main() -> int:
    found = functions()
    if found is None:
        print("the CPU kernels are not built", file=sys.stderr)
        return 1
    print(f"CPU kernels for {', '.join(instruction_sets(found))}; the first is used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
