"""How the openai engine follows what an endpoint takes and refuses."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from policy_svc.chat import ChatMl, Message
from policy_svc.engines.base import FinishReason, Request, Sampling
from policy_svc.engines.openai import OpenAiEngine, OpenAiOptions
from regreen.rpc.errors import InvalidArgument
from tests.fixtures.policy.chat_standin import ChatStandIn
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model

CHAT = ChatMl.from_folder(default_model())
PROMPT = tuple(CHAT.render([Message("user", "Say it.")]))
ADVICE = {"max_tokens": "Use 'max_completion_tokens' instead."}


@pytest_asyncio.fixture
async def endpoint() -> AsyncIterator[tuple[ChatStandIn, OpenAiEngine]]:
    stand_in = ChatStandIn()
    async with serving(stand_in.app()) as url:
        engine = OpenAiEngine(OpenAiOptions(f"{url}/v1/", "m"), CHAT.tokenizer, CHAT.end_id)
        yield stand_in, engine
        await engine.close()


async def ask(engine: OpenAiEngine, **sampling: object):
    request = Request("r", PROMPT, 1, Sampling(**sampling))
    return (await engine.generate(request)).completions[0]


async def test_the_usual_limit_is_sent_first(endpoint) -> None:
    stand_in, engine = endpoint
    assert (await ask(engine, max_new_tokens=2)).finish_reason is FinishReason.LENGTH
    (body,) = stand_in.bodies
    assert body["max_tokens"] == 2
    assert "max_completion_tokens" not in body


@pytest.mark.parametrize("advice", [ADVICE, {"max_tokens": ""}])
async def test_an_endpoint_that_wants_the_newer_limit_gets_it(endpoint, advice) -> None:
    stand_in, engine = endpoint
    stand_in.refused = advice
    for _ in range(2):
        assert (await ask(engine, max_new_tokens=2)).text.startswith("answer")
    limits = [sorted({"max_tokens", "max_completion_tokens"} & set(b)) for b in stand_in.bodies]
    assert limits == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


async def test_too_large_a_limit_is_an_error_and_not_asked_again(endpoint) -> None:
    stand_in, engine = endpoint
    stand_in.most_tokens = 10
    with pytest.raises(InvalidArgument, match="too large: 11"):
        await ask(engine, max_new_tokens=11)
    assert len(stand_in.bodies) == 1


async def test_text_is_cut_here_where_stops_are_refused(endpoint) -> None:
    stand_in, engine = endpoint
    stand_in.refused = {**ADVICE, "stop": ""}
    for _ in range(2):
        answer = await ask(engine, max_new_tokens=50, stop=(" and on", " to "), seed=7)
        assert (answer.text, answer.finish_reason) == ("answer 7", FinishReason.STOP)
    assert len(stand_in.bodies) == 4
    assert "stop" not in stand_in.bodies[-1]
