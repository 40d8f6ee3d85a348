"""``expertmesh generate``: one answer, streamed to the terminal."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import grpc
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceStub

from cluster.cli.client import explain, open_channel
from cluster.cli.connection import Connection
from cluster.cli.terminal import complain


@dataclass(frozen=True)
class Sampling:
    """Only what was given on the command line is sent."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None


def run_generate(
    text: str, connection: Connection, chat: bool, max_tokens: int | None, sampling: Sampling, stop: list[str]
) -> int:
    """Stream the answer to stdout; the exit status."""
    try:
        request = _request(text, chat, max_tokens, sampling, stop)
    except (ValueError, OverflowError, TypeError) as error:
        return complain(str(error))
    with open_channel(connection) as channel:
        call = InferenceStub(channel).Generate(request)
        try:
            for message in call:
                sys.stdout.write(message.text)
                sys.stdout.flush()
        except grpc.RpcError as error:
            _end_line()
            return complain(explain(error, connection))
        except KeyboardInterrupt:
            call.cancel()
            _end_line()
            return 130
    _end_line()
    return 0


def _request(text: str, chat: bool, max_tokens: int | None, sampling: Sampling, stop: list[str]) -> pb.GenerateRequest:
    given = {name: value for name, value in asdict(sampling).items() if value is not None}
    request = pb.GenerateRequest(
        sampling=pb.SamplingParameters(**given),
        stopping=pb.StoppingParameters(stop=stop, max_tokens=max_tokens),
    )
    if chat:
        request.messages.messages.add(role="user", content=text)
    else:
        request.prompt = text
    return request


def _end_line() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()
