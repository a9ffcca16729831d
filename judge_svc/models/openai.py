"""A model behind an OpenAI-compatible HTTP endpoint (`POST {base_url}/chat/completions`).

- Greedy, with a fixed seed, so that the same evidence gets the same answer where the server can.
- Server errors, 429 and broken connections are retried while the deadline allows; 4xx are not.
- The API key travels in the header alone: never in a name, a log or an error.
"""

import asyncio
import json
import time
from collections.abc import Callable

import httpx

from regreen.rpc.errors import Unavailable

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_ANSWER_BYTES = 1 << 20


class OpenAIModel:
    """A chat model by HTTP."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        max_tokens: int = 1024,
        json_mode: bool = True,
        backoff_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(headers=headers)
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model, self._max_tokens = model, max_tokens
        self._json_mode, self._backoff_s, self._clock = json_mode, backoff_s, clock

    async def name(self) -> str:
        """The configured model name."""
        return f"openai:{self._model}"

    async def complete(self, system: str, user: str, *, timeout_s: float) -> str:
        """See `Model.complete`."""
        body: dict[str, object] = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
            ],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self._max_tokens,
        }
        if self._json_mode:
            body["response_format"] = {"type": "json_object"}
        deadline = self._clock() + timeout_s
        backoff_s = self._backoff_s
        while True:
            left_s = deadline - self._clock()
            if left_s <= 0:
                raise Unavailable(f"the judge model did not answer within {timeout_s:g} s")
            answer, problem = await self._once(body, left_s)
            if answer is not None:
                return answer
            if self._clock() + backoff_s >= deadline:
                raise Unavailable(f"the judge model does not answer: {problem}")
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, 5.0)

    async def _once(self, body: dict[str, object], timeout_s: float) -> tuple[str | None, str]:
        """The answer, or None and what was wrong; raises what a retry cannot mend."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.post(self._url, json=body, timeout=timeout_s)
        except (httpx.HTTPError, TimeoutError) as error:
            return None, type(error).__name__
        if response.status_code in _RETRIED:
            return None, f"HTTP {response.status_code}"
        if response.status_code != 200:
            raise Unavailable(
                f"the judge model refuses the request: HTTP {response.status_code}; "
                "check openai_url, openai_model and the key"
            )
        return _content(response.content), ""

    async def close(self) -> None:
        """Close the connection pool."""
        await self._client.aclose()


def _content(data: bytes) -> str:
    """The text of the first choice.

    Raises:
        Unavailable: the endpoint does not speak the protocol.
    """
    try:
        text = json.loads(data[:MAX_ANSWER_BYTES])["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Unavailable("the judge model's endpoint sent no chat completion") from error
    return text if isinstance(text, str) else ""
