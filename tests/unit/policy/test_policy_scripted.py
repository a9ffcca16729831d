"""The scripted engine at a pace: what happens amid a sample that nobody streams."""

import asyncio
from pathlib import Path

import pytest

from policy_svc.chat import ChatMl, Message
from policy_svc.engines.base import FinishReason, Generation, PauseMode, Request, Sampling
from policy_svc.engines.scripted import Script, ScriptedEngine
from tests.fixtures.policy.model import default_model, write_other_weights

_WORDS = " ".join(f"word{number}" for number in range(60))


@pytest.fixture(scope="module")
def chat() -> ChatMl:
    return ChatMl.from_folder(default_model())


def engine_of(chat: ChatMl, delay_s: float, text: str = _WORDS) -> ScriptedEngine:
    script = Script.model_validate({"responses": [{"text": text, "delay_s": delay_s}]})
    return ScriptedEngine(script, chat.tokenizer, chat.end_id, 8192)


def sampling(engine: ScriptedEngine, chat: ChatMl, **changes: object) -> asyncio.Task[Generation]:
    prompt = tuple(chat.render([Message("user", "Write.")]))
    wanted = Sampling(**{"max_new_tokens": 100, **changes})  # type: ignore[arg-type]
    return asyncio.create_task(engine.generate(Request("one", prompt, 2, wanted)))


async def test_a_switch_amid_a_sample_splits_it_by_version(chat: ChatMl, tmp_path: Path) -> None:
    engine, weights = engine_of(chat, 0.05), write_other_weights(tmp_path)
    call = sampling(engine, chat)
    await asyncio.sleep(0.3)
    await engine.load(3, weights)
    for completion in (await call).completions:
        first, second = completion.versions
        assert (first.version, first.start, second.version) == (0, 0, 3)
        assert 0 < first.end == second.start < second.end == len(completion.token_ids) == 100


async def test_what_came_before_an_abort_is_kept(chat: ChatMl) -> None:
    engine = engine_of(chat, 0.05)
    call = sampling(engine, chat)
    await asyncio.sleep(0.4)
    assert await engine.abort("one") == 1
    for completion in (await call).completions:
        assert completion.finish_reason is FinishReason.ABORT
        assert 0 <= len(completion.token_ids) < 100


async def test_a_pause_amid_a_sample_holds_what_is_left(chat: ChatMl) -> None:
    engine = engine_of(chat, 0.005)
    call = sampling(engine, chat)
    await asyncio.sleep(0.05)
    await engine.pause(PauseMode.IN_PLACE)
    done, _ = await asyncio.wait({call}, timeout=1.0)
    assert not done
    await engine.resume()
    assert {len(c.token_ids) for c in (await call).completions} == {100}


async def test_what_is_first_ends_a_sample(chat: ChatMl) -> None:
    engine = engine_of(chat, 0.0)
    whole = (await sampling(engine, chat)).completions[0]
    stopped = (await sampling(engine, chat, stop=("word3", "word7"))).completions[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text.endswith("word3")
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    token = whole.token_ids[2]
    earlier = (await sampling(engine, chat, stop=("word3",), stop_token_ids=(token,))).completions
    assert len(earlier[0].token_ids) <= 3
    assert earlier[0].finish_reason is FinishReason.STOP


async def test_a_short_text_ends_with_the_end_of_turn(chat: ChatMl) -> None:
    engine = engine_of(chat, 0.0, "so it is")
    completion = (await sampling(engine, chat, stop=("nothing",))).completions[0]
    assert completion.finish_reason is FinishReason.STOP
    assert completion.token_ids[-1] == chat.end_id
    cut = (await sampling(engine, chat, max_new_tokens=2)).completions[0]
    assert (cut.finish_reason, len(cut.token_ids)) == (FinishReason.LENGTH, 2)
