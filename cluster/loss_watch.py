"""What routers report: expert shards whose wires they have lost, dead or not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from cluster.roster import Member

_PATIENCE_S = 30.0

Known = tuple[int, frozenset[str]]


class LossWatch:
    """Keeps one question open at every router; ``on_loss(names)`` is called when one has lost shards.

    A router learns of a death within milliseconds, a node's death included, which Ray notices after many seconds; and
    it alone knows that a wire broke though both ends live.
    """

    def __init__(self, on_loss: Callable[[frozenset[str]], None]) -> None:
        self._on_loss = on_loss

    def follow(self, router: Member, epoch: int) -> None:
        """From now on until the router is gone; ``epoch`` is that of its map."""
        self._ask(router, (epoch, frozenset()))

    def _ask(self, router: Member, known: Known) -> None:
        call = router.handle.begin("wait_for_loss", *known, _PATIENCE_S)
        call.add_done_callback(lambda answer: self._answered(router, known, answer))

    def _answered(self, router: Member, known: Known, answer: Future[Known]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return  # the router is gone, which is noticed elsewhere
        epoch, lost = answer.result()
        fresh = lost - known[1] if epoch == known[0] else lost
        if fresh:
            self._on_loss(fresh)
        self._ask(router, (epoch, lost))
