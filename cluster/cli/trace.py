"""``expertmesh trace``: what every actor does in the next steps, as a file for https://ui.perfetto.dev and a table."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import grpc
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2_grpc import ControlStub
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.cli.chrome_trace import chrome_trace
from cluster.cli.client import explain, open_channel
from cluster.cli.connection import Connection
from cluster.cli.terminal import complain
from cluster.cli.trace_summary import kinds, times
from cluster.refusals import BadOperation
from cluster.tracer import DEFAULT_TIMEOUT_S, check

_LATE_S = 90.0  # to collect, shift and send what was recorded
_PIPED_WIDTH = 140
_VIEWER = "https://ui.perfetto.dev"


def run_trace(connection: Connection, steps: int, timeout_s: float, output: Path) -> int:
    """Record, write, summarise; the exit status."""
    try:
        check(steps, timeout_s)
        _check_writable(output)
        trace = _record(connection, pb.TraceRequest(steps=steps, timeout_s=timeout_s))
        if not any(counted(trace).values()):
            return complain(f"no step was run within {timeout_s or DEFAULT_TIMEOUT_S:g} s; nothing is written")
        write_whole(output, json.dumps(chrome_trace(trace), separators=(",", ":")))
    except BadOperation as error:
        return complain(f"--{error.field.removesuffix('_s')}: {error.description}")
    except OSError as error:
        return complain(f"--output: {output}: {error.strerror or error}")
    except grpc.RpcError as error:
        return complain(explain(error, connection))
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 130
    print_summary(trace)
    print(f"{told(trace, steps)}: {output}; open it at {_VIEWER}")
    return 0


def counted(trace: pb.TraceResponse) -> dict[str, int]:
    """Steps that were recorded, by attention shard."""
    shards = [actor for actor in trace.actors if actor.role == pb.ROLE_ATTENTION]
    return {shard.name: sum(span.name == "step" for span in shard.spans) for shard in shards}


def told(trace: pb.TraceResponse, wanted: int) -> str:
    """What was recorded, and what is missing of it, in one line."""
    fewest, most = trace.steps, max(counted(trace).values())
    steps = str(most) if fewest == most else f"{fewest} to {most}"
    steps += f" step{'s' * (steps != '1')}" if fewest == wanted else f" of {wanted} steps"
    answered = [actor for actor in trace.actors if actor.pid]
    silent = [actor.name for actor in trace.actors if not actor.pid]
    dropped = sum(actor.dropped for actor in trace.actors)
    text = f"{steps}, {sum(len(actor.spans) for actor in answered):,} spans of {len(answered)} actors"
    text += f", {dropped:,} more dropped" if dropped else ""
    return text + (f", no answer from {', '.join(silent)}" if silent else "")


def print_summary(trace: pb.TraceResponse) -> None:
    """Each actor's spans as a table on stdout, and what they say about the two fleets."""
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("actor", "span", "count", "mean", "share of time"):
        table.add_column(column, justify="left" if column in ("actor", "span") else "right")
    before = ""
    for actor, name, spans, mean_s, share in kinds(trace):
        table.add_row("" if actor == before else actor, name, f"{spans:,}", _ms(mean_s), f"{share:.1%}")
        before = actor
    console.print(table)
    attention, experts, transfer = times(trace)
    if attention is not None and experts is not None and transfer is not None:
        verdict = "keep up with" if experts <= attention else "take longer than"
        figures = f"T_a {_ms(attention)}   T_e {_ms(experts)}   T_c {_ms(transfer)}"
        console.print(f"{figures}   a batch of a layer: experts {verdict} attention")


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing, in place of what is there. Raises OSError."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _check_writable(path: Path) -> None:
    """Raises OSError now, rather than when everything is recorded."""
    if path.is_dir():
        raise IsADirectoryError(None, "is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(None, "its folder does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(None, "its folder cannot be written to")


def _record(connection: Connection, request: pb.TraceRequest) -> pb.TraceResponse:
    waiting = f"recording {request.steps} steps of each attention shard"
    with open_channel(connection) as channel, Console(stderr=True).status(waiting):
        call = ControlStub(channel).Trace.future(request, timeout=(request.timeout_s or DEFAULT_TIMEOUT_S) + _LATE_S)
        try:
            response: pb.TraceResponse = call.result()
        except KeyboardInterrupt:
            call.cancel()
            raise
        return response


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3f} ms"
