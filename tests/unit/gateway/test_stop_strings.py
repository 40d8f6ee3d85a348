from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.stops import StopMatcher


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The plain reference, on the whole text: first to end, then longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            found = max(ending, key=len)
            return text[: end - len(found)], found
    return text, None


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """What is sent for each piece and at the end, and the stop that was met."""
    matcher = StopMatcher(stops)
    sent = []
    for piece in pieces:
        text, found = matcher.push(piece)
        sent.append(text)
        if found is not None:
            assert matcher.flush() == ""
            return sent, found
    return [*sent, matcher.flush()], None


def test_without_stops_everything_passes_at_once() -> None:
    assert run([], ["ab", "", "c"]) == (["ab", "", "c", ""], None)


def test_a_possible_beginning_is_held_back() -> None:
    assert run(["END"], ["aE", "N", "xE", "ND!"]) == (["a", "", "ENx", ""], "END")
    assert run(["END"], ["aEN"]) == (["a", "EN"], None)


def test_a_beginning_inside_a_failed_beginning_is_kept() -> None:
    assert run(["aab"], ["aaa", "b"]) == (["a", ""], "aab")


def test_the_stop_that_is_complete_first_wins() -> None:
    assert run(["abcd", "bc"], ["abcd"]) == (["a"], "bc")
    assert run(["c", "abc"], ["xabc"]) == (["x"], "abc")


def test_nothing_is_sent_after_a_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("one. two") == ("one", ".")
    assert matcher.push("three") == ("", ".")
    assert matcher.flush() == ""


def test_flush_forgets_what_it_gave() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("a") == ("", None)
    assert matcher.flush() == "a"
    assert matcher.push("b") == ("b", None)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty string among 2"):
        StopMatcher(["a", ""])


def test_long_stops_do_not_slow_the_stream() -> None:
    """16 stops of 1,000 characters over text that nearly matches: linear, or the timeout tells."""
    stops = ["a" * (999 - n) + "b" for n in range(16)]
    sent, found = run(stops, ["a"] * 5000 + ["b"])
    assert found == stops[0]
    assert "".join(sent) == "a" * (5000 - 999)


TEXT = st.text(alphabet="abé", max_size=30)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text(alphabet="abé", max_size=6), max_size=12),
)
def test_any_cut_gives_what_the_whole_text_gives(stops: list[str], pieces: list[str]) -> None:
    sent, found = run(stops, pieces)
    assert ("".join(sent), found) == first_stop("".join(pieces), stops)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3), text=TEXT)
def test_no_more_is_held_back_than_has_to_be(stops: list[str], text: str) -> None:
    matcher, seen, sent = StopMatcher(stops), "", ""
    for char in text:
        piece, found = matcher.push(char)
        if found is not None:
            return
        seen += char
        sent += piece
        held = max((n for s in stops for n in range(len(s)) if seen.endswith(s[:n])), default=0)
        assert sent == seen[: len(seen) - held]
