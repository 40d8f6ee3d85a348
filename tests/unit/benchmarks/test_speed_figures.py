"""Medians of what was not disturbed, ratios to the best peer, and what is wanted."""

from __future__ import annotations

import pytest

from benchmarks.speed_cases import Figure
from benchmarks.speed_figures import (
    LLAMACPP,
    ONE_PROCESS,
    OURS,
    RATIOS,
    TRANSFORMERS,
    VLLM,
    Contender,
    Key,
    Sample,
    Start,
    Wish,
    apart_wishes,
    best_peer,
    memory_wishes,
    most_memory,
    roof_wishes,
    settle,
    speed_wishes,
    start_seconds,
    start_wishes,
)

MINE = Contender(OURS, "bf16")
KEY = (MINE, "decode-1")
LIMIT = 0.1


def sample(round_number: int, rate: float, other_cpu: float = 0.0, tpot_s: float | None = 0.1) -> Sample:
    return Sample(MINE, "decode-1", round_number, Figure(rate, rate / 10, tpot_s), other_cpu)


def test_a_figure_is_the_median_of_the_rounds_that_nobody_disturbed() -> None:
    rounds = [sample(0, 10.0), sample(1, 99.0, 0.11), sample(2, 30.0), sample(3, 11.0, 0.1)]
    figures, notes = settle(rounds, LIMIT)
    assert figures == {KEY: Figure(11.0, 1.1, 0.1)}
    assert notes == {KEY: "disturbed: 1 of 4 rounds left out, others used 0.11 cores or more"}


def test_what_was_always_disturbed_is_left_out_with_a_note() -> None:
    figures, notes = settle([sample(0, 10.0, 0.5), sample(1, 10.0, 0.3)], LIMIT)
    assert figures == {}
    assert notes == {KEY: "disturbed: 2 of 2 rounds left out, others used 0.30 cores or more"}


def test_a_prefill_has_no_time_between_tokens() -> None:
    figures, notes = settle([sample(0, 10.0, tpot_s=None)], LIMIT)
    assert figures[KEY].tpot_s is None
    assert not notes


def test_starts_are_medians_of_the_undisturbed_and_memory_is_the_most() -> None:
    starts = [
        Start(MINE, n, seconds, pss, cpu) for n, (seconds, pss, cpu) in enumerate([(9, 5, 0), (1, 8, 1), (7, 6, 0)])
    ]
    starts.append(Start(Contender(LLAMACPP, "bf16"), 0, None, 4, 0))
    assert start_seconds(starts, LIMIT) == {MINE: 8}
    assert most_memory(starts) == {MINE: 8, Contender(LLAMACPP, "bf16"): 4}


def results(**rates: float) -> dict[Key, Figure]:
    """Of decode-1 in bf16."""
    names = {"ours": OURS, "one": ONE_PROCESS, "hf": TRANSFORMERS, "vllm": VLLM, "llama": LLAMACPP}
    return {(Contender(names[name], "bf16"), "decode-1"): Figure(rate, 1.0, 0.1) for name, rate in rates.items()}


def test_the_fastest_peer_counts() -> None:
    assert best_peer(results(hf=4.0, llama=8.0, vllm=7.0), (TRANSFORMERS, VLLM, LLAMACPP), "bf16", "decode-1") == (
        LLAMACPP,
        8.0,
    )
    assert best_peer(results(hf=4.0), (LLAMACPP,), "bf16", "decode-1") is None


def test_the_wish_names_the_best_peer_and_those_that_are_missing() -> None:
    (wish,) = speed_wishes(results(ours=12.0, hf=4.0, llama=8.0), ["decode-1"], ["bf16"])
    assert wish == Wish("decode-1, bf16", "llama.cpp (without vLLM)", 1.5, 1.5)
    assert wish.verdict == "met"


def test_without_a_peer_nothing_is_met() -> None:
    (wish,) = speed_wishes(results(ours=12.0), ["decode-1"], ["bf16"])
    assert (wish.against, wish.verdict) == ("no peer", "not measured")


def test_only_what_was_asked_for_is_wanted() -> None:
    assert not speed_wishes(results(ours=1.0), ["decode-64"], ["bf16"])
    whats = [wish.what for wish in speed_wishes({}, ["decode-1", "batch-96"], ["int8"])]
    assert whats == ["decode-1, int8", "batch-96, int8"]


def test_a_batch_in_a_quantised_format_is_compared_with_who_has_that_format() -> None:
    keys = {OURS: 6.0, LLAMACPP: 2.0}
    found = {(Contender(engine, "int8"), "batch-96"): Figure(rate, 1.0, 0.1) for engine, rate in keys.items()}
    (wish,) = speed_wishes(found, ["batch-96"], ["int8"])
    assert (wish.against, wish.value) == (LLAMACPP, 3.0)


def test_every_ratio_that_is_wanted_is_there() -> None:
    assert len(RATIOS) == 13
    assert {(precision, case): least for precision, case, _, least in RATIOS}["int8", "decode-32"] == 3.0


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [(1.25, True, "met"), (1.26, True, "not met"), (1.25, False, "met"), (1.24, False, "not met")],
)
def test_a_bound_itself_is_met(value: float, at_most: bool, verdict: str) -> None:
    assert Wish("x", "y", value, 1.25, at_most).verdict == verdict


def test_actors_apart_are_compared_with_one_process() -> None:
    (wish,) = apart_wishes(results(ours=9.8, one=10.0), ["decode-1"])
    assert wish.value == pytest.approx(0.98)
    assert wish.verdict == "met"
    assert not apart_wishes(results(ours=9.8), ["decode-1"])


def test_the_roof_is_wanted_of_ours_in_bf16_alone() -> None:
    other = (Contender(VLLM, "bf16"), "decode-1")
    (wish,) = roof_wishes({KEY: 0.84, other: 0.9, (Contender(OURS, "int8"), "decode-1"): 0.99})
    assert (wish.value, wish.verdict) == (0.84, "not met")


def test_our_start_is_compared_with_those_who_load_the_same() -> None:
    seconds = {MINE: 9.0, Contender(TRANSFORMERS, "bf16"): 18.0, Contender(LLAMACPP, "bf16"): 3.0}
    (wish,) = start_wishes(seconds)
    assert (wish.against, wish.value, wish.verdict) == (TRANSFORMERS, 0.5, "met")


def test_memory_is_compared_with_the_weights() -> None:
    (wish,) = memory_wishes({MINE: 13}, {"bf16": 10.0, "int8": 5.0})
    assert (wish.what, wish.value, wish.verdict) == ("memory, bf16", 1.3, "not met")


def test_a_label_tells_how_many_shards_are_unusual() -> None:
    assert [Contender(OURS, "bf16", shards).label for shards in (0, 1, 4)] == [
        "expertmesh",
        "expertmesh, 1 expert shard",
        "expertmesh, 4 expert shards",
    ]
