"""What each tenant was served, so that the next turn is that of the one served least.

Source: virtual token counters (VTC) of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.
"""

from __future__ import annotations

from collections import Counter


class TokenCounters:
    """Virtual tokens of each tenant in one priority class: tokens served divided by its share.

    A tenant is *active* while it has a request here. One that becomes active is lifted to the least counter of the
    active ones, or to that of who was active last: nobody saves up turns while idle. Between two tenants that wait
    all the time, the counters differ by no more than the tokens that fit into the running requests.
    """

    _FEW = 64

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._shares: dict[str, float] = {}  # of the active ones
        self._n_requests: Counter[str] = Counter()
        self._floor = 0.0

    def __getitem__(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def join(self, tenant: str, share: float) -> None:
        """A request of ``tenant`` came. The share that was named last holds."""
        if tenant not in self._shares:
            self._served[tenant] = max(self[tenant], self._least())
        self._shares[tenant] = share
        self._n_requests[tenant] += 1

    def charge(self, tenant: str, n_tokens: int) -> None:
        """``n_tokens`` were computed or generated for an active tenant."""
        self._served[tenant] += n_tokens / self._shares[tenant]

    def leave(self, tenant: str) -> None:
        """A request of ``tenant`` ended."""
        self._n_requests[tenant] -= 1
        if self._n_requests[tenant]:
            return
        self._floor = self._least()
        del self._n_requests[tenant], self._shares[tenant]
        if len(self._served) > 2 * len(self._shares) + self._FEW:
            self._forget()

    def _least(self) -> float:
        return max(self._floor, min((self._served[tenant] for tenant in self._shares), default=self._floor))

    def _forget(self) -> None:
        """Drop idle tenants that would be lifted anyway."""
        floor = self._least()
        self._served = {t: n for t, n in self._served.items() if t in self._shares or n > floor}
