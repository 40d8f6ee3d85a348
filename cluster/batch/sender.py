"""One row: from its body to its answer, over lost connections and full queues."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import grpc
from expertmesh.v1 import inference_pb2 as pb

from cluster.batch.answers import Result
from cluster.batch.backoff import Backoff, Sleep
from cluster.batch.door import Door
from cluster.batch.errors import BatchError, Changed
from cluster.batch.gateway import Failure, Gateway, judge
from cluster.batch.manifest import Manifest
from cluster.batch.patience import Patience
from cluster.batch.rows import Row
from cluster.batch.seeds import row_seed
from cluster.batch.tally import Tally
from cluster.gateway.errors import InvalidRequest
from cluster.openai.errors import HttpError, from_rpc_error, http_error
from cluster.openai.logprobs import spelled_as_id
from cluster.openai.requests import Parsed, parse_request
from cluster.openai.responses import Answer


class _Attempts:
    """One row on its way; its answer grows over all attempts as if a single one gave it.

    Only one answer can be resumed: several are made anew in each attempt, and what earlier ones gave is forgotten.
    """

    def __init__(self, parsed: Parsed) -> None:
        self.parsed = parsed
        self.failed = 0
        self.backoff = Backoff()
        self._created = int(time.time())
        self._resumes = parsed.message.n <= 1
        self._answer = self._new_answer()

    def begin(self) -> None:
        """Another attempt."""
        if not self._resumes:
            self._answer = self._new_answer()

    def take(self, message: pb.GenerateResponse) -> None:
        """One more message. What was taken is not asked for again, and a row that gets on is not a failing one."""
        self._answer.push(message)
        if self._resumes:
            self.parsed.message.next_index = message.next_index
            if message.token_ids:
                self.failed, self.backoff = 0, Backoff()

    def result(self) -> Result | None:
        """The complete answer, None while it is not."""
        if not self._answer.finished:
            return None
        usage = self._answer.usage
        return Result((200, self._answer.body()), None, usage.prompt_tokens, usage.completion_tokens)

    def _new_answer(self) -> Answer:
        # token ids for their texts: the tokenizer is at the gateway
        return Answer(self.parsed, self._created, spelled_as_id)


class Sender:
    """Sends the rows of one batch; any number at the same time."""

    def __init__(
        self,
        gateway: Gateway,
        door: Door,
        patience: Patience,
        manifest: Manifest,
        retries: int,
        tally: Tally,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """``retries``: attempts without a new token, after a first one, before a row counts as failed for good. Those
        that the gateway itself says it could not take at the time do not count."""
        self._gateway = gateway
        self._door = door
        self._patience = patience
        self._manifest = manifest
        self._retries = retries
        self._tally = tally
        self._sleep = sleep

    def request_id(self, row: Row) -> str:
        """The same in every run of this batch: should the gateway still compute the row for a run that was killed, the
        new stream takes the old one's place."""
        return f"{self._manifest.batch[:12]}-{row.digest}"

    async def answer(self, row: Row) -> Result:
        """What is to be written of ``row``. Raises BatchError when no row can be sent any more."""
        try:
            attempts = _Attempts(self._parse(row))
        except InvalidRequest as error:
            refused = http_error(error)
            return Result((refused.status, refused.body))
        while True:
            opening = await self._door.enter()
            self._patience.calm()
            try:
                return await self._stream(attempts)
            except grpc.RpcError as error:
                told = from_rpc_error(error, attempts.parsed)
                result = self._weigh(error, told, attempts, opening)
                if result is not None:
                    return result
                self._tally.repeated += 1
                await self._sleep(attempts.backoff.next(told.retry_after_s or 0.0))

    def _parse(self, row: Row) -> Parsed:
        parsed = parse_request(row.endpoint, row.body)
        if parsed.stream:
            raise InvalidRequest("stream", "is true; allowed in a batch is false: its answers are whole")
        parsed.message.request_id = self.request_id(row)
        if parsed.message.priority == pb.PRIORITY_UNSPECIFIED:
            parsed.message.priority = pb.PRIORITY_BATCH
        if not parsed.message.sampling.HasField("seed"):
            parsed.message.sampling.seed = row_seed(self._manifest.seed, row.custom_id)
        return parsed

    async def _stream(self, attempts: _Attempts) -> Result:
        """One attempt, from the first token that is missing. Raises grpc.RpcError and BatchError."""
        attempts.begin()
        async with aclosing(self._gateway.generate(attempts.parsed.message)) as messages:
            async for message in messages:
                self._check_model(message)
                attempts.take(message)
                if message.token_ids or message.HasField("finished"):
                    self._patience.progress()
                self._tally.streamed += len(message.token_ids)
        result = attempts.result()
        if result is None:
            raise BatchError("the gateway ended a stream without its last message; is it of another version?")
        return result

    def _check_model(self, message: pb.GenerateResponse) -> None:
        """The probe asks only when the gateway was away; another one may have come without being missed."""
        begun = self._manifest.model["model"]
        if message.HasField("started") and message.started.model != begun:
            raise Changed("this batch", [f"model: {begun} → {message.started.model}"])

    def _weigh(self, error: grpc.RpcError, told: HttpError, attempts: _Attempts, opening: int) -> Result | None:
        """What a failed attempt means: the row's result, or None if another attempt makes sense.

        Raises BatchError if no row can be sent any more.
        """
        failure, text = judge(error), self._gateway.explain(error)
        if failure == Failure.CALLER:
            raise BatchError(text)
        if failure == Failure.ROW:
            return Result((told.status, told.body))
        if failure in (Failure.LOST, Failure.AWAY):
            self._door.lost(opening)
        attempts.failed += failure in (Failure.LOST, Failure.ATTEMPT)
        if attempts.failed > self._retries:
            return Result(None, (told.code, text))
        self._patience.trouble(text)
        return None
