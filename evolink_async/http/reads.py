"""Calls that change nothing: tried again until they succeed, their timeout passes or the service says no for good."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from evolink_async.errors import ConnectionFailedError, EvoLinkError
from evolink_async.http.answers import Answer, hint_of, read_json, status_error
from evolink_async.http.exchange import AnswerLost, Exchange, NotSent
from evolink_async.http.keys import ApiKey
from evolink_async.http.retry import RETRIED_READ_STATUSES, RetryPolicy
from evolink_async.requests import encode_json


class Reader:
    """Reads from the service on one loop."""

    def __init__(self, exchange: Exchange, api_key: ApiKey, retry: RetryPolicy, *, request_timeout: float) -> None:
        self._exchange = exchange
        self._api_key = api_key
        self._retry = retry
        self._request_timeout = request_timeout

    async def attempt(self, method: str, path: str, json: Any = None) -> Answer:
        """One exchange. Raises `ConnectionFailedError` if no whole answer came, `ConfigurationError` without a key."""
        content = None if json is None else encode_json(json)
        key = await self._api_key.get()
        try:
            return await self._exchange.send(
                method, path, key=key, lane="read", seconds=self._request_timeout, content=content
            )
        except (NotSent, AnswerLost) as error:
            raise ConnectionFailedError(str(error)) from error.__cause__

    async def json(self, method: str, path: str, *, timeout: float | None) -> Any:
        """The parsed answer, see `answer`. Raises `ResponseError` for one that is no JSON."""
        return read_json(await self.answer(method, path, timeout=timeout))

    async def answer(self, method: str, path: str, *, timeout: float | None) -> Answer:
        """A 2xx answer, asked for again for `timeout` seconds in all (None: for ever).

        Raises the `APIStatusError` of a refusal, and what stood in the way last when the time is over, or as soon as
        the next attempt would come after its end.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        last: EvoLinkError | None = None
        tries = 0
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    tries += 1
                    answer, last, hint = await self._try(method, path)
                    if answer is not None:
                        return answer
                    left = math.inf if deadline is None else deadline - loop.time()
                    pause = self._retry.delay_within(left, tries, hint, random.random())
                    if pause is None:
                        raise last
                    await asyncio.sleep(pause)
        except TimeoutError:
            pass
        if last is not None:
            raise last
        raise ConnectionFailedError(f"no answer of {self._exchange.host} within {timeout:g} s")

    async def _try(self, method: str, path: str) -> tuple[Answer | None, Any, float | None]:
        """An answer, or the passing trouble and the service's hint. Raises what will not pass."""
        try:
            answer = await self.attempt(method, path)
        except ConnectionFailedError as error:
            return None, error, None
        if 200 <= answer.status < 300:
            return answer, None, None
        refusal = status_error(answer)
        if answer.status not in RETRIED_READ_STATUSES:
            raise refusal
        return None, refusal, hint_of(answer)
