"""``python -m tests.manifests``: check ``k8s/`` and the Dockerfile; exit status 1 if there is a problem."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.manifests.check import check
from tests.manifests.dockerfile import dockerfile_problems


def main() -> int:
    """Print the problems, or how many documents there were."""
    report = check(Path("k8s"))
    problems = [*report.problems, *(f"Dockerfile: {problem}" for problem in dockerfile_problems(Path("Dockerfile")))]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{report.documents} documents and the Dockerfile are in order")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
