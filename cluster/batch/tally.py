"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Rows: of the input, finished and failed by earlier runs, answered and failed by this one. Tokens: of the rows
    that this run answered, and ``streamed``, generated ones as they come."""

    rows: int
    earlier: int
    earlier_failed: int
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    streamed: int = 0
    repeated: int = 0
    """Attempts after a first one."""

    @property
    def finished(self) -> int:
        """Rows with a result on disk, good or bad."""
        return self.earlier + self.earlier_failed + self.answered + self.failed

    @property
    def all_failed(self) -> int:
        """Of these, the bad ones."""
        return self.earlier_failed + self.failed

    @property
    def left(self) -> int:
        """Rows without a result."""
        return self.rows - self.finished
