"""An expert shard between its calls: what it reads and lets go, and requests that it cannot compute."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from safetensors.torch import load_file, save_file

from actors import batch_spans
from actors.expert import ExpertShard
from actors.frames import Kind, array_bytes, expect_parts
from actors.log_fields import fields_of
from actors.messages import failure_text, seconds_from, tensor_from
from actors.model.experts import ExpertBank
from actors.model.parallel import READERS
from actors.model.safetensors_header import Header, read_header
from actors.settings import ModelSettings
from actors.transport.base import Frame, FrameTag, Wire
from actors.transport.local import LocalNetwork
from tests.checkpoints import write_deepseek_v3
from tests.shared_memory import shm_endpoint
from tests.span_recorder import PARENT_ID, TRACE_ID, TRACEPARENT, about, named, parent_id, span_id

HELD = [(1, 0), (1, 1), (2, 3)]


def soon() -> float:
    return time.monotonic() + 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v3")
    write_deepseek_v3(path, seed=1)
    return path


@pytest.fixture(params=["local", "shm"])
def shard(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[ExpertShard, Wire]]:
    """One that holds HELD, and a router's wire to it."""
    endpoint = shm_endpoint if request.param == "shm" else LocalNetwork().endpoint
    shard = ExpertShard("expert-0", ModelSettings(checkpoint, "float32", 0, 1, 10.0), endpoint)
    address = shard.listen()
    assert shard.load(1, HELD) == 3
    router = endpoint("router-0", lambda wire: None)
    wire = router.connect(address, soon())
    yield shard, wire
    wire.close()
    router.close()
    shard.stop()


def ask(wire: Wire, layer: int, pair_row: list[int], experts: list[int], width: int, *trace: bytes) -> Frame:
    """Two rows of ones, of so many floats, to these experts."""
    rows = np.ones((2, width), np.float32)
    parts = [array_bytes(rows), array_bytes(np.array(pair_row, np.int32)), array_bytes(np.array(experts, np.int32))]
    wire.send(Kind.DISPATCH, FrameTag(epoch=6, step=1, layer=layer), [*parts, *trace], soon())
    return wire.recv(soon())


def width(shard: ExpertShard) -> int:
    return shard._spec.d_model


@pytest.mark.parametrize(
    ("layer", "pair_row", "experts", "why"),
    [
        (1, [0, 1], [0, 2], "expert 2 of layer 1"),
        (0, [0], [0], "expert 0 of layer 0"),
        (1, [0, 5], [0, 1], "index 5"),
        (1, [0], [0, 1], "1 rows of pairs, but 2 experts"),
    ],
)
def test_a_request_that_cannot_be_computed_ends_alone(
    shard: tuple[ExpertShard, Wire], layer: int, pair_row: list[int], experts: list[int], why: str
) -> None:
    """The router is told; the wire, the shard and the next request are as if nothing had happened."""
    actor, wire = shard
    frame = ask(wire, layer, pair_row, experts, width(actor))
    assert frame.kind == Kind.FAILED
    assert why in failure_text(frame)
    sound = ask(wire, 1, [0, 1, 1], [0, 0, 1], width(actor))
    assert sound.kind == Kind.RESULTS
    out = tensor_from(expect_parts(sound, 2)[0], torch.float32, width(actor))
    assert out.shape[0] == 3
    assert torch.equal(out[0], out[1])
    assert actor.stats().experts == 3


def test_it_keeps_what_it_is_told_and_reads_only_what_it_lacks(shard: tuple[ExpertShard, Wire]) -> None:
    actor, _ = shard
    assert actor.load(2, [*HELD, (2, 5)]) == 1
    actor.keep(2, [(1, 0), (2, 5)])
    assert (actor.stats().experts, actor.stats().epoch) == (2, 2)
    assert actor.load(3, HELD) == 2


def test_a_keep_that_was_overtaken_by_a_later_load_is_ignored(shard: tuple[ExpertShard, Wire]) -> None:
    """The change of epoch 2 has failed, that of epoch 3 needs what it had read: the calls come in the wrong order."""
    actor, _ = shard
    actor.load(2, [*HELD, (2, 5)])
    actor.load(3, [*HELD, (2, 5)])
    actor.keep(2, HELD)
    assert actor.stats().experts == 4
    actor.keep(3, HELD)
    assert actor.stats().experts == 3


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose headers are parsed from now on."""
    files: list[Path] = []

    def noted(path: Path) -> Header:
        files.append(path)
        return read_header(path)

    monkeypatch.setattr("actors.model.weight_files.read_header", noted)
    return files


def test_headers_are_parsed_once_as_long_as_the_files_stay(
    checkpoint: Path, tmp_path: Path, opened: list[Path]
) -> None:
    """While it serves, parsing would keep the interpreter from those who are served."""
    copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    actor = ExpertShard("expert-0", ModelSettings(tmp_path, "float32", 0, 1, 10.0), LocalNetwork().endpoint)
    actor.load(1, HELD)
    once = len(opened)
    assert once > 0
    assert (actor.load(2, [*HELD, (2, 5)]), actor.load(3, [(1, 7)]), len(opened)) == (1, 1, once)
    for file in opened:
        save_file(load_file(file), file)
        os.utime(file, ns=(0, 1))
    assert (actor.load(4, [(2, 6)]), len(opened)) == (1, 2 * once)
    actor.stop()


def test_with_nothing_to_read_no_file_is_opened(shard: tuple[ExpertShard, Wire], opened: list[Path]) -> None:
    actor, _ = shard
    actor._checkpoint = None
    assert actor.load(2, HELD[:2]) == 0
    assert (actor.stats().epoch, actor.stats().experts, opened) == (2, 3, [])


def test_who_serves_reads_with_one_thread(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> ExpertBank:
        readers.append(kwargs["readers"])
        return load(*args, **kwargs)

    load = ExpertBank.load
    monkeypatch.setattr(ExpertBank, "load", noted)
    actor = ExpertShard("expert-0", ModelSettings(checkpoint, "float32", 0, 1, 10.0), LocalNetwork().endpoint)
    actor.load(1, HELD)
    actor.load(2, [(2, 5)])
    assert readers == [READERS, 1]
    actor.stop()


def test_the_heap_is_trimmed_when_something_went(
    shard: tuple[ExpertShard, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, _ = shard
    trims: list[int] = []
    monkeypatch.setattr("actors.model.heap._malloc_trim", trims.append)
    actor.load(2, [*HELD, (2, 5)])
    actor.keep(2, [*HELD, (2, 5)])
    assert trims == []
    actor.keep(2, HELD)
    assert trims == [0]


def test_batches_are_counted_and_those_with_a_trace_make_a_span(
    shard: tuple[ExpertShard, Wire], spans: InMemorySpanExporter
) -> None:
    actor, wire = shard
    plain = ask(wire, 1, [0, 1, 1], [0, 0, 1], width(actor))
    wanted, seconds = bytes(expect_parts(plain, 2)[0]), seconds_from(plain.parts[1])
    assert seconds == actor.stats().busy_s > 0
    assert spans.get_finished_spans() == ()
    marked = ask(wire, 1, [0, 1, 1], [0, 0, 1], width(actor), TRACEPARENT.encode())
    assert (marked.kind, bytes(expect_parts(marked, 2)[0])) == (Kind.RESULTS, wanted)
    (span,) = named(spans, "experts")
    assert parent_id(span) == PARENT_ID
    figures = {key: about(span, key) for key in ("actor", "layer", "epoch", "rows", "pairs", "experts")}
    assert figures == {"actor": "expert-0", "layer": 1, "epoch": 6, "rows": 2, "pairs": 3, "experts": 2}
    assert actor.stats().batches == 2
    assert actor.stats().busy_s > 0


def test_what_goes_back_to_routers_is_counted(shard: tuple[ExpertShard, Wire]) -> None:
    actor, wire = shard
    size = expect_parts(ask(wire, 1, [0, 1, 1], [0, 0, 1], width(actor)), 2)[0].nbytes
    stats = actor.stats()
    (back,) = stats.wires
    assert (back.peer, back.medium, stats.bytes_sent) == ("router-0", wire.medium, {wire.medium: back.bytes_sent})
    assert back.bytes_sent >= size > 0
    assert back.bytes_received > 0


def test_a_request_that_fails_is_logged_with_its_trace(
    shard: tuple[ExpertShard, Wire], spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    actor, wire = shard
    assert ask(wire, 1, [0], [2], width(actor), TRACEPARENT.encode()).kind == Kind.FAILED
    (span,) = named(spans, "experts")
    (entry,) = caplog.records
    assert entry.exc_info
    told = {"trace_id": f"{TRACE_ID:032x}", "span_id": f"{span_id(span):016x}"}
    assert fields_of(entry.exc_info[1]) == told


def test_a_span_that_fails_costs_no_result(shard: tuple[ExpertShard, Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    actor, wire = shard
    plain = ask(wire, 1, [0, 1, 1], [0, 0, 1], width(actor))
    wanted = bytes(expect_parts(plain, 2)[0])
    monkeypatch.setattr(batch_spans, "_TRACER", Mock(start_span=Mock(side_effect=KeyError("broken"))))
    traced = ask(wire, 1, [0, 1, 1], [0, 0, 1], width(actor), TRACEPARENT.encode())
    assert (traced.kind, bytes(expect_parts(traced, 2)[0])) == (Kind.RESULTS, wanted)


def test_a_trace_that_cannot_be_read_is_a_request_that_cannot(
    shard: tuple[ExpertShard, Wire], spans: InMemorySpanExporter
) -> None:
    actor, wire = shard
    frame = ask(wire, 1, [0], [0], width(actor), b"00-nonsense")
    assert (frame.kind, spans.get_finished_spans()) == (Kind.FAILED, ())
    assert "its trace cannot be read: traceparent is '00-nonsense'" in failure_text(frame)
    assert ask(wire, 1, [0], [0], width(actor)).kind == Kind.RESULTS
