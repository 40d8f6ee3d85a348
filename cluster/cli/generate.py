"""``expertmesh generate``: one answer, streamed to the terminal, or several, one after the other."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import grpc
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceStub

from cluster.cli.client import explain, open_channel
from cluster.cli.connection import Connection
from cluster.cli.terminal import complain


@dataclass(frozen=True)
class Sampling:
    """As the API's ``SamplingParameters``; only what was given on the command line is sent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


@dataclass(frozen=True)
class Stopping:
    """As the API's ``StoppingParameters``."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()


NEUTRAL, UNLIMITED = Sampling(), Stopping()


def run_generate(
    text: str,
    connection: Connection,
    chat: bool = True,
    sampling: Sampling = NEUTRAL,
    stopping: Stopping = UNLIMITED,
    n: int | None = None,
    priority: str | None = None,
) -> int:
    """Stream the answer to stdout, several of them when all are there; the exit status. ``priority``: interactive or
    batch."""
    try:
        request = _request(text, chat, sampling, stopping)
        request.MergeFrom(pb.GenerateRequest(n=n, priority=priority and f"PRIORITY_{priority.upper()}"))
    except (ValueError, OverflowError, TypeError) as error:
        return complain(str(error))
    with open_channel(connection) as channel:
        call = InferenceStub(channel).Generate(request)
        begun = False
        try:
            first = next(call)  # a request that is refused ends here
            begun = True
            _show(itertools.chain([first], call), request.n)
        except grpc.RpcError as error:
            if begun:
                _end_line()
            return complain(explain(error, connection))
        except KeyboardInterrupt:
            call.cancel()
            _end_line()
            return 130
    _end_line()
    return 0


def _show(messages: Iterable[pb.GenerateResponse], n: int) -> None:
    """One answer as it comes; several, which come at the same time, under their numbers in the end."""
    texts: dict[int, str] = {}
    for message in messages:
        if n > 1:
            texts[message.choice] = texts.get(message.choice, "") + message.text
        else:
            sys.stdout.write(message.text)
            sys.stdout.flush()
    sys.stdout.write("\n".join(f"[{choice + 1}]\n{text}" for choice, text in sorted(texts.items())))


def _request(text: str, chat: bool, sampling: Sampling, stopping: Stopping) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        sampling=pb.SamplingParameters(**asdict(sampling)),
        stopping=pb.StoppingParameters(**asdict(stopping)),
    )
    if chat:
        request.messages.messages.add(role="user", content=text)
    else:
        request.prompt = text
    return request


def _end_line() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()
