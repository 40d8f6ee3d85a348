"""One row through everything that can go wrong on its way."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from expertmesh.v1 import inference_pb2 as pb

from cluster.batch.answers import Result
from cluster.batch.door import Door
from cluster.batch.errors import BatchError, Changed, OutOfPatience
from cluster.batch.manifest import Manifest, describe_model
from cluster.batch.patience import Patience
from cluster.batch.rows import InputIdentity, Row
from cluster.batch.seeds import row_seed
from cluster.batch.sender import Sender
from cluster.batch.tally import Tally
from cluster.gateway import errors
from cluster.openai.requests import Endpoint
from tests.unit.batch.scripted import INFO, ScriptedGateway, Time, bare, lost, messages, refusal

MANIFEST = Manifest("0123456789abcdef", "", "", 7, InputIdentity(1, 1, ""), describe_model(INFO))


class Sending:
    """A sender over a scripted gateway, with all that it needs."""

    def __init__(self, *streams: list[Any], retries: int = 2, patience_s: float = 100) -> None:
        self.gateway = ScriptedGateway(*streams)
        self.time = Time()
        self.tally = Tally(1, 0, 0)
        patience = Patience(patience_s, self.time)
        self.door = Door(self.gateway.why_not_ready, patience, self.time.sleep)
        self.sender = Sender(self.gateway, self.door, patience, MANIFEST, retries, self.tally, self.time.sleep)

    async def answer(self, **body: Any) -> Result:
        """The answer to one row."""
        row = Row("a", Endpoint.COMPLETIONS, {"prompt": "x"} | body, "d" * 32)
        return await self.sender.answer(row)


def text(result: Result) -> str:
    assert result.response is not None
    return str(result.response[1]["choices"][0]["text"])


def refused(result: Result) -> tuple[int, str, str]:
    assert result.response is not None
    status, body = result.response
    return status, body["error"]["param"], body["error"]["message"]


async def test_an_answer() -> None:
    sending = Sending(messages([5, 6]))
    result = await sending.answer(temperature=0.5)
    assert (text(result), result.good, result.prompt_tokens, result.completion_tokens) == ("5 6 ", True, 3, 2)
    (request,) = sending.gateway.requests
    assert request.request_id == f"0123456789ab-{'d' * 32}"
    assert request.sampling.seed == row_seed(7, "a")
    assert sending.tally.streamed == 2
    assert result.line("a", "id") == {
        "id": "batch_req_id",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "id", "body": result.response and result.response[1]},
        "error": None,
    }


async def test_a_seed_of_the_rows_own_stays() -> None:
    sending = Sending(messages([5]))
    await sending.answer(seed=11)
    assert sending.gateway.requests[0].sampling.seed == 11


def test_seeds_differ_by_row_and_batch_and_are_what_they_always_were() -> None:
    assert len({row_seed(7, "a"), row_seed(7, "b"), row_seed(8, "a")}) == 3
    assert row_seed(7, "a") == 4603907606400335


async def test_a_broken_stream_is_resumed_where_it_was() -> None:
    broken = [*messages([5, 6], end=False), lost()]
    again = [*messages([7], first=2, end=False), lost()]
    sending = Sending(broken, again, messages([8, 9], first=3))
    result = await sending.answer()
    assert text(result) == "5 6 7 8 9 "
    assert result.completion_tokens == 5
    requests = sending.gateway.requests
    assert [request.next_index for request in requests] == [0, 2, 3]
    for request in requests:
        request.next_index = 0
    assert requests[0] == requests[1] == requests[2]
    assert sending.tally.streamed == 5
    assert sending.tally.repeated == 2


async def test_several_answers_are_made_anew_and_not_doubled() -> None:
    first, second = messages([5, 6], end=False), messages([7], choice=1)[1:]
    whole = [*messages([5, 6]), *messages([7], choice=1)[1:]]
    sending = Sending([*first, *second, lost()], [*first, lost()], whole)
    result = await sending.answer(n=2)
    assert result.response is not None
    assert [choice["text"] for choice in result.response[1]["choices"]] == ["5 6 ", "7 "]
    assert (result.prompt_tokens, result.completion_tokens) == (3, 3)
    assert [request.next_index for request in sending.gateway.requests] == [0, 0, 0]


async def test_several_answers_that_never_get_to_their_end_are_given_up() -> None:
    broken = [*messages([5, 6], end=False), lost()]
    sending = Sending(broken, broken, broken, retries=2)
    assert (await sending.answer(n=2)).error is not None


async def test_rows_come_after_interactive_requests_unless_they_say_otherwise() -> None:
    sending = Sending(messages([5]), messages([5]))
    await sending.answer()
    await sending.answer(priority="interactive")
    assert [r.priority for r in sending.gateway.requests] == [pb.PRIORITY_BATCH, pb.PRIORITY_INTERACTIVE]


async def test_without_a_tokenizer_tokens_are_told_by_their_ids() -> None:
    given = messages([5])
    given[1].logprobs.add(token_id=5, logprob=-1.0, rank=1)
    result = await Sending(given).answer(logprobs=0)
    assert result.response is not None
    assert result.response[1]["choices"][0]["logprobs"]["tokens"] == ["token_id:5"]


async def test_only_the_last_message_was_lost() -> None:
    sending = Sending([*messages([5, 6], end=False), lost()], messages([], first=2))
    assert text(await sending.answer()) == "5 6 "


async def test_a_body_that_is_refused_here_is_the_rows_answer() -> None:
    sending = Sending()
    status, param, message = refused(await sending.answer(temperature="hot"))
    assert (status, param) == (400, "temperature")
    assert "is a string; allowed is a number" in message
    assert refused(await sending.answer(stream=True))[:2] == (400, "stream")
    assert refused(await sending.answer(unknown=1))[:2] == (400, "unknown")


async def test_what_the_gateway_refuses_is_the_rows_answer() -> None:
    too_many = refusal(errors.InvalidRequest("stopping.max_tokens", "is 9; allowed is 1 to 8"))
    unknown = refusal(errors.UnknownModel("other", "tiny"))
    large = bare(grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: Sent message larger than max (5 vs. 4)")
    sending = Sending([too_many], [unknown], [large])
    assert refused(await sending.answer()) == (400, "max_tokens", "max_tokens: is 9; allowed is 1 to 8")
    assert refused(await sending.answer())[:2] == (404, "model")
    assert refused(await sending.answer())[0] == 413
    assert sending.time.slept == []


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "NOT_FOUND"])
async def test_what_a_proxy_says_is_not_about_the_row(code: str) -> None:
    error = bare(grpc.StatusCode[code])
    assert text(await Sending([error], [error], messages([5])).answer()) == "5 "
    failed = await Sending(*[[error]] * 3).answer()
    assert failed.response is None
    assert failed.error is not None
    assert failed.error[1] == f"{code}: bare"


async def test_a_row_that_fails_again_and_again() -> None:
    sending = Sending(*[[refusal(errors.Internal("secret"))] for _ in range(3)])
    result = await sending.answer()
    assert (result.response, result.good) == (None, False)
    assert result.error is not None
    assert result.error[0] == "internal_error"
    assert "secret" not in result.error[1]
    assert len(sending.gateway.requests) == 3
    assert result.line("a", "id")["error"]["code"] == "internal_error"


async def test_a_full_queue_costs_no_attempt_and_its_hint_is_kept() -> None:
    full = refusal(errors.Overloaded("QUEUE_FULL", 3.0))
    sending = Sending(*[[full]] * 5, messages([5]), retries=0)
    assert text(await sending.answer()) == "5 "
    assert len(sending.time.slept) == 5
    assert all(seconds > 3 for seconds in sending.time.slept)


DOWN = refusal(errors.Unavailable("SHARDS_DOWN", 1.0))


async def test_a_cluster_that_says_it_is_down_costs_no_attempt() -> None:
    sending = Sending(*[[DOWN]] * 12, messages([5]), retries=0, patience_s=1000)
    assert text(await sending.answer()) == "5 "
    assert sending.tally.repeated == 12
    assert all(seconds > 1 for seconds in sending.time.slept)


@pytest.mark.parametrize("before", [[], messages([], end=False)])
async def test_a_cluster_that_only_looks_ready_ends_the_run(before: list[Any]) -> None:
    sending = Sending(*[[*before, DOWN]] * 200, patience_s=100)
    with pytest.raises(OutOfPatience, match=r"no token came for 100 s .*UNAVAILABLE: "):
        await sending.answer()
    assert 100 < sending.time.now < 120


async def test_to_wait_in_silence_is_no_trouble() -> None:
    sending = Sending(patience_s=300)
    silence = sending.time.passes(400)
    sending.gateway.streams.extend([[lost()], [silence, lost()], [silence, *messages([5])]])
    assert text(await sending.answer()) == "5 "
    assert sending.time.now > 800


async def test_a_queue_that_stays_full_ends_the_run() -> None:
    sending = Sending(*[[refusal(errors.Overloaded("QUEUE_FULL", 3.0))]] * 20, patience_s=30)
    with pytest.raises(OutOfPatience, match=r"no token came for 30 s .*queue full"):
        await sending.answer()


async def test_an_attempt_that_gave_tokens_counts_as_none() -> None:
    streams = [[*messages([n], first=n, end=False), lost()] for n in range(5)]
    assert text(await Sending(*streams, messages([5], first=5), retries=1).answer()) == "0 1 2 3 4 5 "
    stuck = [[*messages([], first=1, end=False), lost()] for _ in range(2)]
    result = await Sending(streams[0], *stuck, retries=2).answer()
    assert result.error == ("unavailable", "UNAVAILABLE: Socket closed")


async def test_while_the_gateway_is_away_no_attempt_is_used_up() -> None:
    sending = Sending([lost()], messages([5]), retries=1, patience_s=1000)
    sending.gateway.troubles.extend(["away"] * 20)
    assert text(await sending.answer()) == "5 "
    assert len(sending.time.slept) == 21
    assert len(sending.gateway.requests) == 2


async def test_patience_ends() -> None:
    sending = Sending([lost()], patience_s=30)
    sending.gateway.troubles.extend(["away"] * 100)
    with pytest.raises(OutOfPatience, match=r"no token came for 30 s \(--patience\): away"):
        await sending.answer()
    assert 30 < sending.time.now < 60


async def test_patience_begins_anew_with_each_token() -> None:
    streams = [[*messages([n], first=n, end=False), lost()] for n in range(4)]
    sending = Sending(*streams, messages([4], first=4), retries=1, patience_s=30)
    sending.gateway.troubles.extend([*["away"] * 6, ""] * len(streams))
    assert text(await sending.answer()) == "0 1 2 3 4 "
    assert sending.time.now > 30


REFUSALS = [errors.Unauthenticated("TOKEN_UNKNOWN", "who"), errors.PermissionDenied("ADMIN_NEEDED", "no")]


@pytest.mark.parametrize("error", REFUSALS)
async def test_who_may_not_ask_ends_the_run(error: errors.ServiceError) -> None:
    with pytest.raises(BatchError, match=str(error)):
        await Sending([refusal(error)], retries=0).answer()


async def test_another_model_ends_the_run_before_its_text_is_mixed_in() -> None:
    sending = Sending([*messages([5], end=False), lost()], messages([6], first=1, model="other"))
    with pytest.raises(Changed, match="model: tiny → other"):
        await sending.answer()


async def test_a_stream_that_just_ends_is_no_answer() -> None:
    with pytest.raises(BatchError, match="without its last message"):
        await Sending(messages([5], end=False)).answer()
