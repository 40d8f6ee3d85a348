"""The streams of one request: as many as it asks for answers."""

from __future__ import annotations

from dataclasses import replace

from cluster.access import Caller
from cluster.gateway.errors import ServiceError
from cluster.gateway.stream import Stream, Watch
from cluster.gateway.validation import ValidRequest


class StreamGroup:
    """One request that was let in, and a stream for each of its answers, by choice.

    Each goes its own way: has its own engine request, log and replays. They are admitted, aborted and closed together.
    """

    def __init__(self, caller: Caller, request: ValidRequest, deadline: float, recovery_s: float, watch: Watch) -> None:
        self.client = (caller.tenant, request.request_id)
        self.request = request
        self.streams = tuple(
            Stream(caller, request, choice, deadline, recovery_s, watch) for choice in range(request.n)
        )

    @property
    def ended(self) -> bool:
        """True when every stream's end is known."""
        return all(stream.ended for stream in self.streams)

    def fail(self, error: ServiceError) -> None:
        """It ends here: the call that waits gets ``error``, after the tokens that are there."""
        for stream in self.streams:
            stream.fail(error)

    def same_body(self, other: ValidRequest) -> bool:
        """True if ``other`` asks for what these streams give, perhaps from a later token on."""
        seed = self.request.sampling.seed if not other.seed_given else other.sampling.seed
        other = replace(other, next_index=0, seed_given=False, sampling=replace(other.sampling, seed=seed))
        return other == replace(self.request, next_index=0, seed_given=False)

    def with_own_seed(self, other: ValidRequest) -> ValidRequest:
        """``other``, which has the same body, drawing as these streams do."""
        return replace(other, sampling=self.request.sampling)
