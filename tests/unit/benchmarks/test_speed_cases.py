"""The cases of the comparison, their prompts, and what times come to."""

from __future__ import annotations

import pytest

from benchmarks.arrivals import FIRST_ID
from benchmarks.speed_cases import DEFAULT_CASES, QUICK_CASES, Case, figure, parse_case, prompts

DECODE = Case("decode", 2, 128, 32)


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("decode-8", Case("decode", 8, 128, 32)),
        ("decode-1x2048", Case("decode", 1, 2048, 32)),
        ("prefill-32x128", Case("prefill", 32, 128, 1)),
        ("batch-96", Case("batch", 96, 128, 32)),
    ],
)
def test_a_case_is_read_and_written_alike(text: str, case: Case) -> None:
    assert parse_case(text) == case
    assert case.name == text


@pytest.mark.parametrize("text", ["decode", "decode-0", "decode-8x", "prefil-8x128", "decode-8x0", "xdecode-8"])
def test_what_is_no_case_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=f"case '{text}': allowed is decode-STREAMS"):
        parse_case(text)


def test_all_usual_cases_are_cases() -> None:
    assert [parse_case(text).name for text in (*DEFAULT_CASES, *QUICK_CASES)] == [*DEFAULT_CASES, *QUICK_CASES]


def test_prompts_are_the_same_for_everybody_and_others_each_time() -> None:
    first = prompts(DECODE, 1000, 0, 0)
    assert first == prompts(DECODE, 1000, 0, 0)
    assert [len(ids) for ids in first] == [128, 128]
    assert all(FIRST_ID <= token < 1000 for ids in first for token in ids)
    others = [prompts(DECODE, 1000, 1, 0), prompts(DECODE, 1000, 0, 1), prompts(Case("batch", 2, 128, 32), 1000, 0, 0)]
    assert len({ids[0][0] for ids in others} | {first[0][0]}) > 1
    assert first[0] != first[1]
    assert all(first != other for other in others)


def test_prefill_is_measured_to_the_last_first_token() -> None:
    found = figure(Case("prefill", 3, 100, 1), [[1.0], [2.0], [4.0]])
    assert (found.rate, found.ttft_s, found.tpot_s) == (75.0, 2.0, None)


def test_decoding_is_measured_while_all_streams_run() -> None:
    early = [1.0, 9.0, 10.0, 10.5, 11.0, 11.5]
    late = [10.0, 10.5, 11.0, 11.5, 20.0]
    found = figure(DECODE, [early, late])
    assert found.rate == pytest.approx(4.0)
    assert found.tpot_s == pytest.approx(0.5)
    assert found.ttft_s == 5.5


def test_tokens_of_a_step_that_arrive_one_after_the_other_do_not_slow_it() -> None:
    steps = [[10.0 + step + late for step in range(9)] for late in (0.0, 0.01, 0.02)]
    assert figure(Case("decode", 3, 128, 32), steps).rate == pytest.approx(3.0)


def test_a_batch_is_measured_from_start_to_end() -> None:
    found = figure(Case("batch", 2, 128, 3), [[1.0, 2.0, 3.0], [4.0, 4.5, 6.0]])
    assert (found.rate, found.ttft_s, found.tpot_s) == (1.0, 2.5, 1.0)


@pytest.mark.parametrize("times", [[[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0, 2.0], []]])
def test_a_stream_too_few_or_too_short_is_refused(times: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"decode-2: .* 2 with 2 or more"):
        figure(DECODE, times)


def test_streams_that_never_run_together_have_no_rate() -> None:
    with pytest.raises(ValueError, match="decode-2: its streams do not run at the same time"):
        figure(DECODE, [[1.0, 2.0], [3.0, 4.0]])
