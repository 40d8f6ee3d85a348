"""The autoscaling policy on recorded and simulated traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.autoscale import AutoscalePolicy, Decision, PoolSnapshot, State, decide

POLICY = AutoscalePolicy(minimum=1, maximum=8, target_busy=0.5, down_after_s=60, cool_down_s=0)
BEGINNING = State()


def snapshot(now_s: float, *busy_s: float, pairs: Sequence[int] = (), changing: bool = False) -> PoolSnapshot:
    names = [f"expert-{n}" for n in range(max(len(busy_s), len(pairs)))]
    return PoolSnapshot(
        now_s, len(names), dict(zip(names, busy_s, strict=False)), dict(zip(names, pairs, strict=False)), changing
    )


def replay(trace: Sequence[PoolSnapshot], policy: AutoscalePolicy = POLICY, state: State = BEGINNING) -> list[Decision]:
    decisions = []
    for shot in trace:
        decision, state = decide(shot, policy, state)
        decisions.append(decision)
    return decisions


def simulate(
    work: Callable[[float], float], policy: AutoscalePolicy, shards: int, until_s: float, delay: int = 0
) -> list[tuple[float, int]]:
    """(time, shards) of every change, for ``work(time)`` shard-seconds per second, a snapshot every 10 s.

    A change takes ``delay`` snapshots, in which the pool says that it is changing. No shard is more than wholly busy.
    """
    state, changes, coming = State(), [], (0, shards)
    busy = dict.fromkeys(range(shards), 0.0)
    for tick in range(int(until_s // 10)):
        for n in busy:
            busy[n] += 10 * min(1.0, work(tick * 10.0) / len(busy))
        changing = tick < coming[0]
        if not changing and len(busy) != coming[1]:
            busy = {n: busy.get(n, 0.0) for n in range(coming[1])}
        shot = PoolSnapshot(tick * 10.0, len(busy), {str(n): b for n, b in busy.items()}, {}, changing)
        decision, state = decide(shot, policy, state)
        if decision.change:
            changes.append((tick * 10.0, decision.wanted))
            coming = (tick + 1 + delay, decision.wanted)
    return changes


def test_steady_load_on_target_changes_nothing() -> None:
    assert simulate(lambda _: 1.0, POLICY, 2, 1000) == []
    assert simulate(lambda _: 1.09, POLICY, 2, 1000) == []  # within the tolerance
    assert simulate(lambda _: 1.11, POLICY, 2, 1000) == [(10.0, 3)]
    wide = replace(POLICY, maximum=20)
    assert simulate(lambda _: 5.45, wide, 12, 1000) == []
    assert simulate(lambda _: 5.35, wide, 12, 1000) == [(70.0, 11)]


def test_the_first_snapshot_changes_nothing() -> None:
    (first,) = replay([snapshot(0, 100.0, 100.0)])
    assert first == Decision(2, False, "no figures yet of 2 shards")


def test_the_reason_has_the_figures() -> None:
    policy = replace(POLICY, target_busy=0.6, target_pairs_per_s=1000.0)
    trace = [snapshot(0, 0.0, 0.0, pairs=(0, 0)), snapshot(10, 8.0, 8.4, pairs=(5000, 4000))]
    assert replay(trace, policy)[1] == Decision(3, True, "busy 0.82 of 0.60, pairs/s 450 of 1000 on 2 shards: 3 wanted")


def test_the_larger_of_two_signals_wins() -> None:
    policy = replace(POLICY, target_pairs_per_s=100.0)
    assert replay([snapshot(0, 0.0, pairs=(0,)), snapshot(10, 9.0, pairs=(3900,))], policy)[1].wanted == 4
    assert replay([snapshot(0, 0.0, pairs=(0,)), snapshot(10, 9.0, pairs=(100,))], policy)[1].wanted == 2
    rows_only = replace(policy, target_busy=0)
    assert replay([snapshot(0, pairs=(0,)), snapshot(10, pairs=(3900,))], rows_only)[1].wanted == 4
    assert replay([snapshot(0, 0.0, pairs=(0,)), snapshot(10, 9.0, pairs=(1000,))], rows_only)[1].change is False


def test_doubled_load_adds_and_is_given_back_only_after_the_window() -> None:
    policy = replace(POLICY, up_after_s=30, down_after_s=120)
    changes = simulate(lambda t: 2.0 if 200 <= t < 500 else 1.0, policy, 2, 1000)
    assert changes == [(230.0, 4), (620.0, 2)]  # figures of the first lower interval come at 500, a window before


def test_a_peak_shorter_than_the_delay_is_let_pass() -> None:
    policy = replace(POLICY, up_after_s=30)
    assert simulate(lambda t: 4.0 if 200 <= t < 230 else 1.0, policy, 2, 600) == []
    assert simulate(lambda t: 4.0 if 200 <= t < 240 else 1.0, policy, 2, 240) == [(230.0, 4)]


def test_up_to_what_was_wanted_throughout_and_down_to_the_most() -> None:
    policy = replace(POLICY, up_after_s=20, down_after_s=20)
    busy = [0.0, 8.0, 24.0, 48.0]  # 2, then 4, then 5 shards' work of target 0.5 on one that may count beyond 1
    rising = replay([snapshot(10.0 * i, b) for i, b in enumerate(busy)], policy)
    assert [d.wanted for d in rising] == [1, 1, 1, 2]
    assert rising[3].reason.endswith("on 1 shard: 5 wanted, 2 for now")
    falling = [snapshot(10.0 * i, b, b, b, b, b, b) for i, b in enumerate([0.0, 2.5, 3.3, 3.7])]
    decisions = replay(falling, policy)  # 3, then 1, then 1 wanted
    assert [d.wanted for d in decisions] == [6, 6, 6, 3]
    assert decisions[2].reason.endswith("1 wanted, but not for long enough")


def test_load_around_the_threshold_does_not_flap() -> None:
    changes = simulate(lambda t: 1.05 if t % 20 else 0.93, replace(POLICY, down_after_s=0), 2, 2000)
    assert changes == []
    around_a_step = simulate(lambda t: 1.2 if t % 40 else 0.85, POLICY, 2, 2000)
    assert around_a_step == [(10.0, 3)]


def test_the_cool_down_is_kept_after_any_change() -> None:
    policy = replace(POLICY, cool_down_s=100)
    assert simulate(lambda t: 0.9 + t / 100, policy, 2, 300) == [(30.0, 3), (130.0, 5), (230.0, 7)]
    trace = [snapshot(0, 0.0, changing=True), snapshot(10, 10.0), snapshot(90, 90.0), snapshot(100, 100.0)]
    decisions = replay(trace, policy)  # somebody else changed it
    assert [d.change for d in decisions] == [False, False, False, True]
    assert decisions[1].reason.endswith("2 wanted, but cooling down for 90 s more")


def test_nothing_is_decided_while_a_change_is_carried_out() -> None:
    assert simulate(lambda _: 8.0, POLICY, 1, 400, delay=5) == [(10.0, 2), (80.0, 4), (150.0, 8)]
    outside = snapshot(0, *[0.0] * 9, changing=True)
    assert replay([outside])[0] == Decision(8, False, "a change is being carried out")


def test_an_idle_pool_goes_to_the_minimum_and_a_busy_one_to_the_maximum() -> None:
    policy = replace(POLICY, minimum=2)
    assert simulate(lambda _: 0.0, policy, 6, 500) == [(70.0, 2)]
    assert simulate(lambda _: 100.0, policy, 2, 500)[-1][1] == 8
    full = [snapshot(0, *[0.0] * 8), snapshot(10, *[9.0] * 8)]
    assert replay(full)[1] == Decision(8, False, "busy 0.90 of 0.50 on 8 shards: 15 wanted, 8 allowed")


def test_outside_the_range_is_corrected_at_once() -> None:
    policy = replace(POLICY, minimum=3, maximum=4, cool_down_s=1000)
    state = State(changed_s=-1.0)
    assert replay([snapshot(0, *[5.0] * 6)], policy, state)[0] == Decision(
        4, True, "6 shards, from 3 to 4 are allowed: 4 wanted"
    )
    assert replay([snapshot(0, 5.0)], policy, state)[0].wanted == 3
    assert replay([PoolSnapshot(0, 0, {})], policy, state)[0].wanted == 3


def test_new_and_restarted_shards_count_from_their_second_snapshot() -> None:
    """A restarted shard's counter falls, a new one's begins high: neither is a rate."""
    trace = [snapshot(0, 500.0, 5.0), snapshot(10, 0.5, 10.0), snapshot(20, 5.5, 15.0)]
    assert [d.wanted for d in replay(trace)] == [2, 2, 2]
    assert replay(trace)[1].reason == "busy 0.50 of 0.50 on 2 shards: 2 wanted"
    grown = replay([snapshot(0, 0.0), snapshot(10, 5.0, 400.0), snapshot(20, 10.0, 405.0)])
    assert [d.wanted for d in grown] == [1, 2, 2]
    by_rows = [snapshot(0, 1.0, pairs=(900,)), snapshot(10, 9.9, pairs=(1,)), snapshot(20, 9.9, pairs=(1,))]
    assert replay(by_rows)[1].reason == "no figures yet of 1 shard"


def test_shards_without_figures_hold_both_directions_back() -> None:
    """Two of four at 0.9: not enough to grow while the others may be idle, nor to shrink while they may be busy."""
    policy = replace(POLICY, down_after_s=0)
    begun = snapshot(0, 0.0, 0.0)
    assert replay([begun, snapshot(10, 9.0, 9.0, 0.0, 0.0)], policy)[1].wanted == 4
    assert replay([begun, snapshot(10, 0.0, 0.0, 0.0, 0.0)], policy)[1].wanted == 2
    gone = [snapshot(0, 0.0, 0.0, 0.0, 0.0), snapshot(10, 2.0, 2.0), snapshot(20, 6.0, 6.0)]
    assert [d.wanted for d in replay(gone, policy)] == [4, 2, 2]


def test_the_state_does_not_change_with_the_callers_counters() -> None:
    busy = {"expert-0": 0.0}
    _, state = decide(PoolSnapshot(0, 1, busy), POLICY, State())
    busy["expert-0"] = 9.0
    assert decide(PoolSnapshot(10, 1, busy), POLICY, state)[0].wanted == 2


def test_the_state_stays_small() -> None:
    state = State()
    for tick in range(2000):
        _, state = decide(snapshot(tick * 1.0, tick * 0.5), POLICY, state)
    assert len(state.recommended) <= 62


def test_time_goes_forward() -> None:
    with pytest.raises(ValueError, match=r"now_s: 5.0; the snapshot before was taken at 5.0"):
        replay([snapshot(5.0, 0.0), snapshot(5.0, 1.0)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("minimum", 0),
        ("maximum", 0),
        ("target_busy", -0.1),
        ("target_busy", 0.95),
        ("target_busy", 0),
        ("target_pairs_per_s", -1.0),
        ("tolerance", 1.0),
        ("tolerance", float("nan")),
        ("up_after_s", -1.0),
        ("down_after_s", float("inf")),
        ("cool_down_s", float("nan")),
    ],
)
def test_policies_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {value}"):
        AutoscalePolicy(**{"minimum": 1, "maximum": 2, field: value})  # type: ignore[arg-type]


POLICIES = st.builds(
    lambda low, more, **rest: AutoscalePolicy(low, low + more, **rest),
    st.integers(1, 4),
    st.integers(0, 12),
    target_busy=st.floats(0.1, 0.65),
    tolerance=st.floats(0, 0.5),
    up_after_s=st.sampled_from([0.0, 25.0]),
    down_after_s=st.sampled_from([0.0, 45.0]),
    cool_down_s=st.sampled_from([0.0, 35.0]),
)


@settings(deadline=None, derandomize=True)
@given(POLICIES, st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1000), st.booleans()), max_size=20))
def test_the_number_wanted_is_always_within_the_range(
    policy: AutoscalePolicy, trace: list[tuple[int, float, bool]]
) -> None:
    shots = [snapshot(10.0 * i, *[busy + s for s in range(n)], changing=c) for i, (n, busy, c) in enumerate(trace)]
    for shot, decision in zip(shots, replay(shots, policy), strict=True):
        assert policy.minimum <= decision.wanted <= policy.maximum
        assert not (decision.change and (shot.changing or decision.wanted == shot.shards))


@settings(deadline=None, derandomize=True)
@given(POLICIES, st.floats(0, 20), st.integers(1, 16), st.integers(0, 3))
def test_constant_load_comes_to_rest_and_never_turns_back(
    policy: AutoscalePolicy, work: float, shards: int, delay: int
) -> None:
    first = policy.clamp(shards)
    changes = simulate(lambda _: work, policy, shards, 3000, delay)
    numbers = [first, *(n for _, n in changes)]
    assert numbers == sorted(numbers) or numbers == sorted(numbers, reverse=True)
    assert all(at_s < 1500 for at_s, _ in changes)
    at_rest = numbers[-1]
    low, high = (work / (policy.target_busy * (1 + sign * policy.tolerance)) for sign in (1, -1))
    assert at_rest in (policy.minimum, policy.maximum) or low - 1e-6 <= at_rest < high + 1
