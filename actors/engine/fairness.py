"""What each tenant was served, so that the next turn is that of the one served least.

Source: virtual token counters (VTC) of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.
"""

from __future__ import annotations

from collections import Counter
from heapq import nlargest

LEAST_SHARE = 1e-3
"""Shares must be at least this: a counter, a float, stays exact to a token until it has grown by 1e12 tokens."""


class TokenCounters:
    """Virtual tokens of each tenant in one priority class: tokens served divided by its share.

    A tenant is *active* while it has a request here. One that becomes active is lifted to the least counter of the
    active ones, or to that of who was active last: nobody saves up turns while idle. Between two tenants that wait
    all the time, the counters differ by no more than the tokens that fit into the running requests.

    Who is ahead of the least active one and becomes idle is remembered, so that nobody gets rid of a debt by going;
    but of no more than ``MOST_IDLE`` tenants. Beyond that the smallest debts are forgiven: a tenant whose debt was, is
    treated like a new one, and has got ahead of the others by that debt, once.
    """

    MOST_IDLE = 1024
    _FEW = 64

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._shares: dict[str, float] = {}  # of the active ones
        self._n_requests: Counter[str] = Counter()
        self._floor = 0.0
        self._sweep_at = self._FEW

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
        if len(self._served) > self._sweep_at:
            self._forget()

    def _least(self) -> float:
        return max(self._floor, min((self._served[tenant] for tenant in self._shares), default=self._floor))

    def _forget(self) -> None:
        """Drop idle tenants that would be lifted anyway, and debts beyond ``MOST_IDLE``; O(1) per tenant that came."""
        floor = self._least()
        debts = {t: n for t, n in self._served.items() if t not in self._shares and n > floor}
        kept = nlargest(self.MOST_IDLE, debts, key=debts.__getitem__)
        self._served = {t: self._served[t] for t in (*self._shares, *kept)}
        self._sweep_at = 2 * len(self._served) + self._FEW
