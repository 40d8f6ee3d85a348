"""Lines of the output, in the shape of OpenAI's batch API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What became of one row. ``response`` is (HTTP status, body), None when the row got no answer; ``error`` is (code,
    message), None when it got one. Tokens are those of a complete answer."""

    response: tuple[int, dict[str, Any]] | None
    error: tuple[str, str] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def good(self) -> bool:
        """True for a complete answer."""
        return self.response is not None and self.response[0] == 200

    def line(self, custom_id: str, request_id: str) -> dict[str, Any]:
        """The object of the output's line."""
        response = error = None
        if self.response is not None:
            response = {"status_code": self.response[0], "request_id": request_id, "body": self.response[1]}
        if self.error is not None:
            error = {"code": self.error[0], "message": self.error[1]}
        return {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": error}
