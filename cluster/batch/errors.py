"""Why a batch cannot be run, or not to its end. The text is for people and says what to do."""

from __future__ import annotations


class BatchError(Exception):
    """The run ends here; what is finished stays in the output."""


class BadInput(BatchError):
    """Lines of the input are no batch rows; nothing was sent."""

    def __init__(self, name: str, problems: list[str], cut: bool) -> None:
        more = "\n  (the rest was not read)" if cut else ""
        super().__init__(f"{name}: not a batch input; nothing was sent\n  " + "\n  ".join(problems) + more)
        self.problems = problems


class Changed(BatchError):
    """The output was begun with another input, model or seed than the ones at hand."""

    def __init__(self, name: str, differences: list[str]) -> None:
        super().__init__(
            f"{name} was begun otherwise:\n  "
            + "\n  ".join(differences)
            + "\nanswers of both would be mixed: choose another output (-o), or go on with --accept-changes"
        )


class OutOfPatience(BatchError):
    """The cluster gave no token for too long."""
