"""What is computed between the exchanges of rows."""

from __future__ import annotations

from actors.span_log import FORWARD, HEAD, PUBLISH, ROWS_OUT, SAMPLE, WAIT, Span
from cluster.compute_spans import with_compute


def sent(start: int, end: int, layer: int, micro_batch: int = 0) -> Span:
    return Span(ROWS_OUT, "loop", start, end - start, {"layer": layer, "micro_batch": micro_batch, "rows": 9})


def waited(start: int, end: int, layer: int, micro_batch: int = 0) -> Span:
    return Span(WAIT, "loop", start, end - start, {"layer": layer, "micro_batch": micro_batch})


def whole(name: str, start: int, end: int) -> Span:
    return Span(name, "loop", start, end - start, {})


def told(spans: list[Span]) -> list[tuple[str, int, int, int | None, int | None]]:
    numbers = [(s.numbers.get("layer"), s.numbers.get("micro_batch")) for s in spans]
    return [(s.name, s.start_ns, s.end_ns, *pair) for s, pair in zip(spans, numbers, strict=True)]


def test_two_layers_of_one_batch() -> None:
    recorded = [sent(20, 22, 1), whole(PUBLISH, 26, 29), waited(30, 40, 1), sent(50, 53, 2), waited(53, 60, 2)]
    recorded += [whole(HEAD, 61, 70), whole(SAMPLE, 70, 74)]
    spans = with_compute([*reversed(recorded), whole(FORWARD, 10, 75), whole("step", 5, 80)])
    assert told(spans) == [
        ("step", 5, 80, None, None),
        ("forward", 10, 75, None, None),
        ("compute", 10, 20, 1, 0),
        (ROWS_OUT, 20, 22, 1, 0),
        ("shared expert", 22, 26, 1, 0),
        (PUBLISH, 26, 29, None, None),
        ("shared expert", 29, 30, 1, 0),
        (WAIT, 30, 40, 1, 0),
        ("compute", 40, 50, 2, 0),
        (ROWS_OUT, 50, 53, 2, 0),
        (WAIT, 53, 60, 2, 0),
        ("compute", 60, 61, 2, 0),
        (HEAD, 61, 70, None, None),
        (SAMPLE, 70, 74, None, None),
    ]


def test_micro_batches_interleave() -> None:
    recorded = [sent(10, 11, 1, 0), sent(20, 21, 1, 1), waited(30, 31, 1, 0), sent(40, 41, 2, 0), waited(50, 51, 1, 1)]
    recorded += [whole(HEAD, 51, 60)]
    spans = with_compute([*recorded, whole("forward", 0, 60), whole("step", 0, 61)])
    assert [one for one in told(spans) if one[0] not in (ROWS_OUT, WAIT)] == [
        ("step", 0, 61, None, None),
        ("forward", 0, 60, None, None),
        ("compute", 0, 10, 1, 0),
        ("compute", 11, 20, 1, 1),
        ("shared expert", 21, 30, 1, 1),
        ("compute", 31, 40, 2, 0),
        ("shared expert", 41, 50, 2, 0),
        (HEAD, 51, 60, None, None),
    ]


def test_steps_do_not_mix_and_a_void_one_is_left_as_it_is() -> None:
    """A forward pass that failed has no span of its own."""
    first = [whole("step", 0, 50), whole("forward", 0, 40), sent(10, 12, 1), waited(12, 20, 1), whole(HEAD, 20, 40)]
    void = [whole("step", 100, 150), sent(110, 112, 1), waited(112, 149, 1)]
    spans = with_compute([*first, *void])
    assert [one for one in told(spans) if one[0] in ("compute", "shared expert")] == [("compute", 0, 10, 1, 0)]
