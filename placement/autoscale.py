"""The autoscaling policy: from a snapshot of a pool of shards to the number wanted. Pure; snapshots carry the time.

The rule is that of Kubernetes' Horizontal Pod Autoscaler: ``wanted = ceil(shards * measured / target)``, nothing
within the tolerance, and a stabilisation window for giving shards back. Shards that just came or went have no figures:
they are taken to have been idle where that speaks against growing, and on target where that speaks against shrinking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class PoolSnapshot:
    """A pool at time ``now_s``, on any clock that only goes forward.

    ``shards``: how many are ready. By shard name, counted since its start: ``busy_s``, seconds spent computing, and
    ``pairs``, (row, expert) pairs computed. ``changing``: a change of the pool is being carried out.
    """

    now_s: float
    shards: int
    busy_s: Mapping[str, float]
    pairs: Mapping[str, int] = field(default_factory=dict)
    changing: bool = False


@dataclass(frozen=True)
class AutoscalePolicy:
    """How many shards a pool may have, and when their number changes.

    ``minimum``, ``maximum``: the range; outside of it the number is corrected at once.
    ``target_busy``: wanted share of a shard's time spent computing; ``target_pairs_per_s``: wanted (row, expert) pairs
    per second and shard. 0: not used. Where both are, the larger number wins.
    ``tolerance``: no change while measured / target is within 1 ± this.
    ``up_after_s``: more are wanted only after that long, and as many as were wanted all that time.
    ``down_after_s``: fewer likewise, and as many as were wanted at most in all that time.
    ``cool_down_s``: after any change, the next one waits that long.
    """

    minimum: int
    maximum: int
    target_busy: float = 0.6
    target_pairs_per_s: float = 0.0
    tolerance: float = 0.1
    up_after_s: float = 0.0
    down_after_s: float = 300.0
    cool_down_s: float = 30.0

    def __post_init__(self) -> None:
        if self.minimum < 1:
            raise ValueError(f"minimum: {self.minimum}; at least 1")
        if self.maximum < self.minimum:
            raise ValueError(f"maximum: {self.maximum}; at least the minimum, {self.minimum}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: {self.tolerance}; from 0 to below 1")
        if not 0 <= self.target_busy * (1 + self.tolerance) < 1:  # a shard that is always busy would not be too busy
            below = 1 / (1 + self.tolerance)
            raise ValueError(f"target_busy: {self.target_busy}; from 0 to below 1 / (1 + tolerance) = {below:.3f}")
        for name in ("target_pairs_per_s", "up_after_s", "down_after_s", "cool_down_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; at least 0, and finite")
        if self.target_busy == 0 and self.target_pairs_per_s == 0:
            raise ValueError("target_busy: 0, and so is target_pairs_per_s; one of them has to be used")

    def clamp(self, shards: int) -> int:
        """The nearest number within the range."""
        return min(max(shards, self.minimum), self.maximum)


@dataclass(frozen=True)
class State:
    """What the next decision needs to know of the past. ``State()`` is the beginning.

    ``recommended``: (time, number) as the figures alone had it, oldest first. ``changed_s``: when the pool was last
    seen changing, or told to.
    """

    last: PoolSnapshot | None = None
    recommended: tuple[tuple[float, int], ...] = ()
    changed_s: float = -math.inf


@dataclass(frozen=True)
class Decision:
    """``wanted`` shards, within the range. ``change``: do it now. ``reason``: for people, with the figures."""

    wanted: int
    change: bool
    reason: str


def decide(snapshot: PoolSnapshot, policy: AutoscalePolicy, state: State) -> tuple[Decision, State]:
    """The decision for now, and the state for the next one.

    Errors: ValueError when the snapshot is not later than the one before.
    """
    number, figures = _recommend(snapshot, policy, state.last)
    state = replace(
        state,
        last=replace(snapshot, busy_s=dict(snapshot.busy_s), pairs=dict(snapshot.pairs)),
        recommended=_remember(state.recommended, snapshot.now_s, number, policy),
        changed_s=snapshot.now_s if snapshot.changing else state.changed_s,
    )
    decision = _decide(snapshot, policy, state, number, figures)
    return decision, replace(state, changed_s=snapshot.now_s) if decision.change else state


def _decide(
    snapshot: PoolSnapshot, policy: AutoscalePolicy, state: State, number: int | None, figures: str
) -> Decision:
    shards, now_s = snapshot.shards, snapshot.now_s
    allowed = policy.clamp(shards)
    if snapshot.changing:
        return Decision(allowed, False, "a change is being carried out")
    if allowed != shards:
        limits = f"from {policy.minimum} to {policy.maximum} are allowed"
        return Decision(allowed, True, f"{_count(shards)}, {limits}: {allowed} wanted")
    if number is None:
        return Decision(shards, False, f"no figures yet of {_count(shards)}")
    limited = policy.clamp(number)
    reason = f"{figures} on {_count(shards)}: {number} wanted" + (f", {limited} allowed" if limited != number else "")
    wanted = policy.clamp(_stable(shards, state.recommended, number, policy, now_s))
    if wanted == shards:
        return Decision(shards, False, reason + (", but not for long enough" if limited != shards else ""))
    cooling_s = state.changed_s + policy.cool_down_s - now_s
    if cooling_s > 0:
        return Decision(shards, False, f"{reason}, but cooling down for {cooling_s:.0f} s more")
    return Decision(wanted, True, reason + (f", {wanted} for now" if wanted != limited else ""))


def _recommend(snapshot: PoolSnapshot, policy: AutoscalePolicy, last: PoolSnapshot | None) -> tuple[int | None, str]:
    """The number that the figures since ``last`` call for, None without figures; and these, for people."""
    if last is None or snapshot.shards == 0:
        return None, ""
    if snapshot.now_s <= last.now_s:
        raise ValueError(f"now_s: {snapshot.now_s}; the snapshot before was taken at {last.now_s}")
    restarted = _fallen(last.busy_s, snapshot.busy_s) | _fallen(last.pairs, snapshot.pairs)
    numbers, figures = [], []
    for name, target, before, now in (
        ("busy", policy.target_busy, last.busy_s, snapshot.busy_s),
        ("pairs/s", policy.target_pairs_per_s, last.pairs, snapshot.pairs),
    ):
        known = [shard for shard in now if shard in before and shard not in restarted]
        if target == 0 or not known:
            continue
        total = sum(now[shard] - before[shard] for shard in known) / (snapshot.now_s - last.now_s)
        untold = max(0, snapshot.shards - len(known)) + sum(shard not in now for shard in before)
        numbers.append(_number(total / target, untold, snapshot.shards, policy.tolerance))
        digits = 2 if name == "busy" else 0
        figures.append(f"{name} {total / len(known):.{digits}f} of {target:.{digits}f}")
    return max(numbers, default=None), ", ".join(figures)


def _number(worth: float, untold: int, shards: int, tolerance: float) -> int:
    """Shards for the work of ``worth`` shards on target, and of ``untold`` ones that may have worked beside them."""
    if worth > shards * (1 + tolerance):
        return math.ceil(worth - 1e-9)
    if worth + untold < shards * (1 - tolerance):
        return math.ceil(worth + untold - 1e-9)
    return shards


def _stable(
    shards: int, recommended: tuple[tuple[float, int], ...], number: int, policy: AutoscalePolicy, now_s: float
) -> int:
    """``number`` as far as it was wanted throughout its window; ``shards`` until the window has passed."""
    window_s = policy.up_after_s if number > shards else policy.down_after_s
    if recommended[0][0] > now_s - window_s:
        return shards
    inside = [n for at_s, n in recommended if at_s >= now_s - window_s]
    return max(shards, min(inside)) if number > shards else min(shards, max(inside))


def _remember(
    recommended: tuple[tuple[float, int], ...], now_s: float, number: int | None, policy: AutoscalePolicy
) -> tuple[tuple[float, int], ...]:
    """With the newest, and without those older than both windows but the last of them, which tells they have passed."""
    start_s = now_s - max(policy.up_after_s, policy.down_after_s)
    old = [entry for entry in recommended if entry[0] <= start_s]
    kept = (*old[-1:], *recommended[len(old) :])
    return kept if number is None else (*kept, (now_s, number))


def _fallen(before: Mapping[str, float], now: Mapping[str, float]) -> set[str]:
    """Shards whose counter went down: their process is a new one."""
    return {shard for shard in now if shard in before and now[shard] < before[shard]}


def _count(shards: int) -> str:
    return f"{shards} shard" if shards == 1 else f"{shards} shards"
