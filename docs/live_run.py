"""Draws docs/live_run.svg: what ``expertmesh demo`` prints, as a terminal shows it. ``make picture`` runs it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_WIDTH = 140
_QUESTION = "What is the capital of France?"


def main() -> int:
    """Run the demo and draw what it printed; the demo's exit status."""
    expertmesh = Path(sys.executable).with_name("expertmesh")
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(_WIDTH)}
    shown = subprocess.run(
        [expertmesh, "demo", _QUESTION], capture_output=True, text=True, env=environment, check=False
    )
    if shown.returncode:
        sys.stderr.write(shown.stderr)
    else:
        console = Console(width=_WIDTH, record=True, file=io.StringIO(), force_terminal=True)
        console.print(Text("$ expertmesh demo", style="bold"))
        console.print(Text.from_ansi(shown.stdout.rstrip()))
        console.save_svg(str(Path(__file__).with_name("live_run.svg")), title="expertmesh")
    return shown.returncode


if __name__ == "__main__":
    sys.exit(main())
