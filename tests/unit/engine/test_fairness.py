from __future__ import annotations

from actors.engine.fairness import TokenCounters


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


def test_a_debt_outlives_idling() -> None:
    counters = TokenCounters()
    counters.join("a", 1.0)
    counters.join("b", 1.0)
    counters.charge("a", 50)
    counters.leave("a")
    counters.join("a", 1.0)
    assert counters["a"] == 50.0


def test_the_last_one_leaves_its_counter_behind() -> None:
    counters = TokenCounters()
    counters.join("a", 1.0)
    counters.charge("a", 7)
    counters.leave("a")
    counters.join("new", 1.0)
    assert counters["new"] == 7.0


def test_tenants_that_went_are_forgotten() -> None:
    counters = TokenCounters()
    for n in range(10_000):
        counters.join(f"t{n}", 1.0)
        counters.charge(f"t{n}", n % 3)
        counters.leave(f"t{n}")
    assert len(counters._served) < 100
