from __future__ import annotations

import pytest

from actors.engine.fairness import LEAST_SHARE, TokenCounters


def test_tokens_count_by_share() -> None:
    counters = TokenCounters()
    counters.join("a", 1.0)
    counters.join("b", 4.0)
    counters.charge("a", 8)
    counters.charge("b", 8)
    assert (counters["a"], counters["b"]) == (8.0, 2.0)


def test_who_comes_back_is_lifted_to_the_least_of_the_active() -> None:
    counters = TokenCounters()
    for tenant in ("a", "b", "idle"):
        counters.join(tenant, 1.0)
    for tenant, tokens in (("a", 30), ("b", 20), ("idle", 5)):
        counters.charge(tenant, tokens)
    counters.leave("idle")
    counters.charge("a", 1)
    counters.join("idle", 1.0)
    assert counters["idle"] == 20.0
    counters.join("idle", 1.0)  # it is active: nothing is lifted
    counters.charge("b", 20)
    counters.join("idle", 1.0)
    assert counters["idle"] == 20.0


@pytest.mark.parametrize(
    ("active", "comes"),
    [(("a", "b"), "a"), (("a",), "new")],
    ids=["its own debt outlives idling", "the last one leaves its counter behind"],
)
def test_who_comes_once_a_tenant_went_begins_where_that_one_was(active: tuple[str, ...], comes: str) -> None:
    counters = TokenCounters()
    for tenant in active:
        counters.join(tenant, 1.0)
    counters.charge("a", 50)
    counters.leave("a")
    counters.join(comes, 1.0)
    assert counters[comes] == 50.0


def test_tenants_that_went_are_forgotten() -> None:
    counters = TokenCounters()
    for n in range(10_000):
        counters.join(f"t{n}", 1.0)
        counters.charge(f"t{n}", n % 3)
        counters.leave(f"t{n}")
    assert len(counters._served) < 300


def test_small_debts_are_forgiven_where_many_tenants_have_some() -> None:
    """One tenant is far behind all who come and go; who owes much is still remembered, and seldom are they sorted."""
    counters = TokenCounters()
    counters.join("steady", 1000.0)
    n_sweeps = 0
    for n in range(20_000):
        counters.charge("steady", 1)
        counters.join(f"t{n}", 1.0)
        counters.charge(f"t{n}", 10_000 if n == 0 else 100)
        known = len(counters._served)
        counters.leave(f"t{n}")
        n_sweeps += len(counters._served) < known
    assert len(counters._served) < 4 * TokenCounters.MOST_IDLE
    assert n_sweeps < 40
    counters.join("t0", 1.0)
    assert counters["t0"] > 10_000
    counters.join("t1", 1.0)
    assert counters["t1"] == counters["steady"]


def test_counters_stay_exact_with_the_least_share() -> None:
    counters = TokenCounters()
    counters.join("least", LEAST_SHARE)
    counters.charge("least", 10**12)
    counters.join("one", 1.0)
    before = counters["one"]
    counters.charge("one", 1)
    assert counters["one"] == before + 1
