"""How a peer talks to the benchmark: a line of JSON for each run, over stdin and stdout.

Needs the standard library alone, since peers run in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[float]]]
"""(prompts, new tokens) to the seconds after the start at which each stream's tokens came."""


def answer(load: Callable[[], tuple[Generate, dict[str, str]]]) -> None:
    """Load, say that it is ready and in which versions, then answer until stdin ends.

    Whatever a library prints goes to stderr: stdout is for answers alone.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate, versions = load()

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    say({"versions": versions})
    for line in sys.stdin:
        asked = json.loads(line)
        say({"times": generate(asked["prompts"], asked["new"])})
