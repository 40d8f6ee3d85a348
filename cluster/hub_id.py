"""What a repository of the hub is called."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_ID = 96


@dataclass(frozen=True, slots=True)
class HubId:
    """``org/name@revision``; the revision is a branch, a tag, or a commit (40 hex digits: then it is *pinned*)."""

    repo: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None for what cannot be one."""
        match = _ID.fullmatch(text)
        if match is None or ".." in text or "--" in match["repo"] or len(match["repo"]) > _LONGEST_ID:
            return None
        return cls(match["repo"], match["revision"] or "main")

    @property
    def pinned(self) -> bool:
        """Whether it always means the same files."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"
