"""What routers and gateways report: shards whose wires they have lost, dead or not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from actors.losses import Known
from cluster.roster import Member

_PATIENCE_S = 30.0


class LossWatch:
    """Keeps one question open at every witness; ``on_loss(names)`` is called when one has lost shards.

    Routers are witnesses for expert shards, gateways for attention shards. They learn of a death within milliseconds, a
    node's death included, which Ray notices after many seconds; and they alone know that a wire broke though both ends
    live.
    """

    def __init__(self, on_loss: Callable[[frozenset[str]], None]) -> None:
        self._on_loss = on_loss

    def follow(self, witness: Member, epoch: int = 0) -> None:
        """From now on until the witness is gone; ``epoch`` is that of a router's map."""
        self._ask(witness, (epoch, frozenset()))

    def _ask(self, witness: Member, known: Known) -> None:
        call = witness.handle.begin("wait_for_loss", *known, _PATIENCE_S)
        call.add_done_callback(lambda answer: self._answered(witness, known, answer))

    def _answered(self, witness: Member, known: Known, answer: Future[Known]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return  # the witness is gone, which is noticed elsewhere
        epoch, lost = answer.result()
        fresh = lost - known[1] if epoch == known[0] else lost
        if fresh:
            self._on_loss(fresh)
        self._ask(witness, (epoch, lost))
