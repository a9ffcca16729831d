"""One suite over every engine: the same promises, whatever samples.

`REGREEN_TEST_SGLANG=URL` adds a real SGLang server that serves the default model, started with
`--enable-deterministic-inference` (`examples/gpu`).
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from policy_svc.chat import ChatMl, Message
from policy_svc.engines.base import (
    Completion,
    Engine,
    FinishReason,
    PauseMode,
    Request,
    Sampling,
)
from policy_svc.engines.openai import OpenAiEngine, OpenAiOptions
from policy_svc.engines.process import LocalOptions, ProcessEngine, local_engines
from policy_svc.engines.scripted import Script, ScriptedEngine
from policy_svc.engines.sglang import SglangEngine, SglangOptions
from policy_svc.engines.weights import identity_of
from regreen.rpc.errors import DataLoss, FailedPrecondition, InvalidArgument
from tests.fixtures.policy.chat_standin import ChatStandIn
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model, write_other_weights
from tests.fixtures.policy.sglang_standin import SglangStandIn

pytestmark = pytest.mark.asyncio(loop_scope="module")
SERVER = os.environ.get("REGREEN_TEST_SGLANG", "")
ENGINES = ["scripted", "sglang", "openai", *local_engines(), *(["sglang-server"] if SERVER else [])]
STREAMING = {"scripted", "openvino", "torch"}


@pytest.fixture(scope="module")
def chat() -> ChatMl:
    return ChatMl.from_folder(default_model())


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def prompt(chat: ChatMl) -> tuple[int, ...]:
    return tuple(chat.render([Message("user", "Write a long story about a green build.")]))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def engine(request: pytest.FixtureRequest, chat: ChatMl) -> AsyncIterator[Engine]:
    name, model = request.param, default_model()
    if name == "scripted":
        long = " ".join(f"word{i}" for i in range(400))
        script = Script.model_validate({"responses": [{"text": long, "delay_s": 0.0005}]})
        found: Engine = ScriptedEngine(script, chat.tokenizer, chat.end_id, 8192)
        yield found
        return
    if name == "sglang":
        async with serving(SglangStandIn(model, chat.tokenizer).app()) as url:
            found = SglangEngine(SglangOptions((url,), 8192), chat.tokenizer, chat.end_id)
            await found.start()
            yield found
            await found.close()
        return
    if name == "sglang-server":
        found = SglangEngine(SglangOptions((SERVER,), 8192), chat.tokenizer, chat.end_id)
        await found.start()
        yield found
        await found.load(0, model)
        await found.close()
        return
    if name == "openai":
        async with serving(ChatStandIn().app()) as url:
            options = OpenAiOptions(f"{url}/v1/", "stand-in")
            found = OpenAiEngine(options, chat.tokenizer, chat.end_id)
            yield found
            await found.close()
        return
    kept = model.parents[1] / "policy" / "tokenizers"
    options = LocalOptions(name, model, model, threads=1, tokenizers=kept)
    found = ProcessEngine(options, chat.end_id)
    await found.start()
    yield found
    await found.close()


async def sample(
    engine: Engine, prompt: tuple[int, ...], *, n: int = 1, rid: str = "r", **sampling: object
) -> tuple[Completion, ...]:
    wanted = Sampling(**{"max_new_tokens": 5, **sampling})  # type: ignore[arg-type]
    return (await engine.generate(Request(rid, prompt, n, wanted))).completions


async def test_completions_are_whole(engine: Engine, prompt: tuple[int, ...], chat: ChatMl) -> None:
    completions = await sample(engine, prompt, n=2)
    assert len(completions) == 2
    for completion in completions:
        count = len(completion.token_ids)
        assert 1 <= count <= 6
        assert len(completion.logprobs) == count
        assert all(logprob <= 0 for logprob in completion.logprobs)
        assert all(0 <= token < engine.info.vocabulary for token in completion.token_ids)
        assert [s.start for s in completion.versions] == [0]
        assert [s.end for s in completion.versions] == [count]
        assert completion.text == chat.tokenizer.decode(completion.token_ids)
        assert completion.token_exact == engine.info.token_exact


async def test_seeds_reproduce(engine: Engine, prompt: tuple[int, ...]) -> None:
    first = await sample(engine, prompt, n=2, seed=7)
    again = await sample(engine, prompt, n=2, seed=7)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]


async def test_other_seeds_differ(engine: Engine, prompt: tuple[int, ...]) -> None:
    if engine.info.name == "scripted":
        return
    first = await sample(engine, prompt, n=2, seed=1, max_new_tokens=8)
    other = await sample(engine, prompt, n=2, seed=2, max_new_tokens=8)
    assert {c.token_ids for c in first} != {c.token_ids for c in other}
    assert len({c.token_ids for c in first}) == 2


async def test_length_is_kept(engine: Engine, prompt: tuple[int, ...]) -> None:
    (completion,) = await sample(engine, prompt, max_new_tokens=2)
    assert completion.finish_reason is FinishReason.LENGTH


async def test_stop_token_is_the_last_id(engine: Engine, prompt: tuple[int, ...]) -> None:
    if not engine.info.token_exact:
        return
    (free,) = await sample(engine, prompt, seed=3)
    stop = free.token_ids[2]
    (stopped,) = await sample(engine, prompt, seed=3, stop_token_ids=(stop,))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


async def test_stop_text_stays(engine: Engine, prompt: tuple[int, ...], chat: ChatMl) -> None:
    if not engine.info.token_exact:
        return
    (free,) = await sample(engine, prompt, seed=4, max_new_tokens=12)
    wanted = chat.tokenizer.decode(free.token_ids[2:4]).strip()
    (stopped,) = await sample(engine, prompt, seed=4, max_new_tokens=12, stop=(wanted,))
    assert stopped.finish_reason is FinishReason.STOP
    assert wanted in stopped.text
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


async def test_abort_keeps_what_was_sampled(engine: Engine, prompt: tuple[int, ...]) -> None:
    if engine.info.name not in STREAMING:
        return
    begun = asyncio.Event()
    request = Request("long", prompt, 1, Sampling(max_new_tokens=400, seed=5))
    call = asyncio.create_task(engine.generate(request, lambda *_: begun.set()))
    await begun.wait()
    assert await engine.abort("long") == 1
    (completion,) = (await call).completions
    assert completion.finish_reason is FinishReason.ABORT
    assert 1 <= len(completion.token_ids) < 400
    assert await engine.abort("long") == 0


async def test_cancelling_frees_the_engine(engine: Engine, prompt: tuple[int, ...]) -> None:
    if engine.info.name not in STREAMING:
        return
    begun = asyncio.Event()
    request = Request("gone", prompt, 2, Sampling(max_new_tokens=400))
    call = asyncio.create_task(engine.generate(request, lambda *_: begun.set()))
    if engine.info.name != "openvino":
        await begun.wait()
    else:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await engine.abort(None) == 0
    assert len(await sample(engine, prompt, rid="next")) == 1


async def test_pause_in_place_holds_and_goes_on(engine: Engine, prompt: tuple[int, ...]) -> None:
    if engine.info.name == "openai":
        return
    await engine.pause(PauseMode.IN_PLACE)
    call = asyncio.create_task(sample(engine, prompt, rid="held", max_new_tokens=3))
    done, _ = await asyncio.wait({call}, timeout=0.2)
    assert not done
    await engine.resume()
    (completion,) = await call
    assert len(completion.token_ids) == 3


NAMES = r'\{"name": "[a-z]{3,8}", "age": [1-9][0-9]?\}|none|ja+\.'


async def test_every_sample_matches_an_expression(engine: Engine, prompt: tuple[int, ...]) -> None:
    if engine.info.name not in ("torch", "openvino"):
        return
    bound = Sampling(max_new_tokens=40, seed=4, regex=NAMES, temperature=1.0)
    if not engine.info.structures:
        assert engine.info.name == "torch"
        with pytest.raises(InvalidArgument, match=r"sampling\.regex"):
            await engine.generate(Request("bound", prompt, 1, bound))
        return
    free = asyncio.create_task(sample(engine, prompt, rid="free", n=2, max_new_tokens=20))
    found = (await engine.generate(Request("bound", prompt, 4, bound))).completions
    assert all(re.fullmatch(NAMES, completion.text) for completion in found)
    assert len({completion.text for completion in found}) > 1, "each sample has draws of its own"
    assert {completion.finish_reason for completion in found} == {FinishReason.STOP}
    assert all(len(one.logprobs) == len(one.token_ids) for one in found)
    again = (await engine.generate(Request("again", prompt, 4, bound))).completions
    assert [one.token_ids for one in again] == [one.token_ids for one in found]
    assert [len(one.token_ids) for one in await free] == [20, 20]


SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["green", "broken"]}, "tests": {"type": "integer"}},
    "required": ["verdict", "tests"],
    "additionalProperties": False,
}


async def test_every_sample_is_an_instance_of_a_schema(
    engine: Engine, prompt: tuple[int, ...]
) -> None:
    if engine.info.name != "openvino":
        return
    bound = Sampling(max_new_tokens=80, seed=2, json_schema=json.dumps(SCHEMA))
    found = (await engine.generate(Request("schema", prompt, 3, bound))).completions
    assert {one.finish_reason for one in found} == {FinishReason.STOP}
    for one in found:
        value = json.loads(one.text)
        assert value["verdict"] in ("green", "broken")
        assert set(value) == {"verdict", "tests"}
        assert isinstance(value["tests"], int)
    for schema in ({"type": "nothing"}, {"$ref": "#/nowhere"}):
        with pytest.raises(InvalidArgument, match=r"^sampling\.json_schema: cannot be followed"):
            await sample(engine, prompt, rid="bad", json_schema=json.dumps(schema))


async def test_an_expression_that_cannot_be_followed_harms_no_other(
    engine: Engine, prompt: tuple[int, ...]
) -> None:
    if not engine.info.structures or engine.info.name != "openvino":
        return
    began = asyncio.Event()
    wanted = Request("long", prompt, 1, Sampling(max_new_tokens=60, seed=1))
    running = asyncio.create_task(engine.generate(wanted, lambda *_: began.set()))
    await began.wait()
    for turn, regex in enumerate((r"(?=a)b", r"(?i)abc", r"(?=a)b")):
        with pytest.raises(InvalidArgument, match=r"regex: cannot be followed: \w+"):
            await sample(engine, prompt, rid=f"bad-{turn}", regex=regex)
    for turn, regex in enumerate(("([a-zA-Z]+ ?){1,150}", "(.?){300}")):
        with pytest.raises(InvalidArgument, match="takes more than 1 s of processor time"):
            await sample(engine, prompt, rid=f"slow-{turn}", regex=regex)
    with pytest.raises(InvalidArgument, match="3000 places"):
        await sample(engine, prompt, rid="large", regex="(ab{1,29}){100}")
    tried = Request("tried", prompt, 2, Sampling(max_new_tokens=5, regex="(.?){301}"))
    waiting = asyncio.create_task(engine.generate(tried))
    await asyncio.sleep(0.2)
    assert await engine.abort("tried") == 1
    assert {c.finish_reason for c in (await waiting).completions} == {FinishReason.ABORT}
    (after,) = await sample(engine, prompt, rid="good", regex="yes|no", max_new_tokens=20)
    assert after.text in ("yes", "no")
    (completion,) = (await running).completions
    assert len(completion.token_ids) == 60 or completion.finish_reason == FinishReason.STOP


async def test_a_bad_checkpoint_changes_nothing(
    engine: Engine, prompt: tuple[int, ...], tmp_path: Path
) -> None:
    version = engine.version
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    if engine.info.name == "sglang":
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FailedPrecondition):
        await engine.load(version + 5, tmp_path)
    assert engine.version == version
    (completion,) = await sample(engine, prompt, rid="after")
    assert {span.version for span in completion.versions} == {version}


async def test_a_new_version_stamps_its_tokens(
    engine: Engine, prompt: tuple[int, ...], other_weights: Path
) -> None:
    if not engine.info.swaps_weights:
        return
    (before,) = await sample(engine, prompt, temperature=0.0)
    await engine.load(3, other_weights)
    (after,) = await sample(engine, prompt, temperature=0.0)
    assert [span.version for span in before.versions] == [0]
    assert [span.version for span in after.versions] == [3]
    if engine.info.name in ("torch", "openvino"):
        assert abs(before.logprobs[0] - after.logprobs[0]) > 0.01


async def test_weights_that_were_not_asked_for_never_serve(
    engine: Engine, prompt: tuple[int, ...], other_weights: Path
) -> None:
    if not engine.info.swaps_weights:
        return
    began, found = engine.version, asyncio.Event()

    async def check() -> tuple[int, ...]:
        await found.wait()
        raise DataLoss("other bytes")

    async def wrong() -> tuple[int, ...]:
        return (1, 2, 3, 4)

    checked = asyncio.create_task(check())
    load = asyncio.create_task(engine.load(began + 1, other_weights, checked))
    (meanwhile,) = await sample(engine, prompt, rid="meanwhile", temperature=0.0)
    found.set()
    with pytest.raises(DataLoss):
        await load
    assert engine.version == began
    (after,) = await sample(engine, prompt, rid="after", temperature=0.0)
    assert {span.version for span in after.versions} == {began}
    assert after.token_ids == meanwhile.token_ids
    if isinstance(engine, ProcessEngine):
        with pytest.raises(FailedPrecondition, match="not what was hashed"):
            await engine.load(began + 1, other_weights, asyncio.create_task(wrong()))
        assert engine.version == began

    async def right() -> tuple[int, ...]:
        return identity_of(other_weights)

    await engine.load(began + 1, other_weights, asyncio.create_task(right()))
    assert engine.version == began + 1


async def test_a_switch_amid_a_request_keeps_spans_right(
    engine: Engine, prompt: tuple[int, ...]
) -> None:
    if engine.info.name not in STREAMING:
        return
    began = engine.version
    begun = asyncio.Event()
    request = Request("across", prompt, 1, Sampling(max_new_tokens=400, seed=11))
    call = asyncio.create_task(engine.generate(request, lambda *_: begun.set()))
    await begun.wait()
    await engine.load(began + 1, default_model())
    (later,) = await sample(engine, prompt, rid="later")
    assert {span.version for span in later.versions} == {began + 1}
    await engine.abort("across")
    (completion,) = (await call).completions
    found = completion.versions
    assert found[0].version == began
    assert [s.start for s in found] == [0, *(s.end for s in found)][: len(found)]
    assert found[-1].end == len(completion.token_ids)
    if engine.info.name == "openvino":
        assert len(found) == 1, "a pipeline finishes what it began"
    else:
        assert [span.version for span in found] == [began, began + 1]


async def test_scripts_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text(json.dumps({"responses": [{"text": "a", "texts": ["b"]}]}))
    with pytest.raises(FailedPrecondition, match="either text or texts"):
        Script.read(path)
