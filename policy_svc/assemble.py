"""Builds a policy from settings: model folder, engine, versions, limits.

- The version that served last is served again, when its weights are still there.
- Packages of an engine are imported only when that engine is chosen.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from policy_svc.chat import ChatMl
from policy_svc.engines.base import Engine
from policy_svc.engines.openai import OpenAiEngine, OpenAiOptions
from policy_svc.engines.process import LocalOptions, ProcessEngine, local_engines
from policy_svc.engines.scripted import Script, ScriptedEngine
from policy_svc.engines.sglang import SglangEngine, SglangOptions
from policy_svc.limits import Limits
from policy_svc.offered import OfferedWeights
from policy_svc.policy import Policy
from policy_svc.settings import PolicySettings
from policy_svc.usage import Usage
from policy_svc.versions import (
    PolicyVersion,
    Serving,
    Versions,
    WeightSource,
    is_whole,
    read_record,
)
from regreen.blobs import open_blobs
from regreen.model_store import ensure_default_model
from regreen.rpc.errors import FailedPrecondition, MissingDependency, NotFound
from regreen.rpc.logging import get
from regreen.rpc.quotas import Quotas


async def open_policy(settings: PolicySettings) -> Policy:
    """Build and start; close `policy.engine` when done.

    Raises:
        RegreenError: the model or engine is missing; says what to install or set.
    """
    model = settings.model
    if model is None:
        report = get().info
        found = await asyncio.to_thread(ensure_default_model, settings.home, report)
        model = found.path
    if not (model / "tokenizer.json").is_file():
        raise NotFound(f"model: {model} is no model folder (it has no tokenizer.json)")
    chat = ChatMl.from_folder(model)
    record = settings.home / "policy" / "serving.json"
    last = await asyncio.to_thread(_last, settings, record)
    serving = last or Serving(_base(settings, model), model, time.time())
    engine = _engine(settings, model.resolve(), chat, serving)
    await engine.start()
    if engine.version != serving.policy.version and not engine.asleep:
        serving = await _put_back(engine, serving, model)
    folder = settings.home / "policy" / "weights"
    offered = None
    if settings.blobs:
        # Not asked whether it may be written, as services that do ask: this one only reads.
        offered = OfferedWeights(open_blobs(settings.blobs), folder / "offered")
    source = WeightSource(model.resolve(), folder, offered)
    limits = Limits(
        settings.max_running, settings.max_waiting, settings.max_samples, settings.max_new_tokens
    )
    usage = Usage(settings.home / "policy" / "usage.json", Quotas(settings.quotas))
    if engine.asleep:  # a learner may have their memory; who had them sleep wakes them
        get().warning("the servers sleep, until Wake", version=serving.policy.version)
    return Policy(engine, chat, Versions(engine, source, record, serving), limits, usage)


def _base(settings: PolicySettings, model: Path) -> PolicyVersion:
    """What serves before anything is loaded; local engines say where its weights are."""
    local = settings.engine in ("auto", "openvino", "torch")
    return PolicyVersion(uri=str(model.resolve()) if local else "")


def _last(settings: PolicySettings, record: Path) -> Serving | None:
    if not settings.restore or settings.engine == "openai":
        return None
    last = read_record(record)
    if last is not None and not is_whole(last):
        get().warning("the last version is damaged and not served", uri=last.policy.uri)
        return None
    return last


async def _put_back(engine: Engine, serving: Serving, model: Path) -> Serving:
    """Load the last version into an engine that starts with its own weights."""
    try:
        await engine.load(serving.policy.version, serving.path)
    except FailedPrecondition as error:
        get().warning("the last version was not restored", error=error.message)
        return Serving(PolicyVersion(version=engine.version), model, time.time())
    return serving


def _engine(settings: PolicySettings, model: Path, chat: ChatMl, serving: Serving) -> Engine:
    name: str = settings.engine
    config = json.loads((model / "config.json").read_bytes())
    if name == "auto":
        name = _best_local(config)
    if name == "scripted":
        assert settings.script is not None
        script = Script.read(settings.script)
        return ScriptedEngine(script, chat.tokenizer, chat.end_id, _context(config, model))
    if name == "openai":
        return OpenAiEngine(
            OpenAiOptions(
                settings.openai_url,
                settings.openai_model,
                settings.openai_key.get_secret_value(),
                settings.openai_context,
                logprobs=settings.openai_logprobs,
            ),
            chat.tokenizer,
            chat.end_id,
        )
    if name == "sglang":
        options = _sglang_options(settings, _context(config, model))
        return SglangEngine(options, chat.tokenizer, chat.end_id)
    local = LocalOptions(
        engine=name,
        model=model,
        weights=serving.path.resolve(),
        version=serving.policy.version,
        threads=settings.threads,
        kv_cache_gib=settings.kv_cache_gib,
        dtype=settings.dtype,
        tokenizers=settings.home / "policy" / "tokenizers",
    )
    return ProcessEngine(local, chat.end_id)


def _context(config: dict[str, Any], model: Path) -> int:
    """Longest context of a model; of one that also sees images, that of its text part."""
    found = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    if not isinstance(found, int):
        raise FailedPrecondition(f"{model}/config.json has no max_position_embeddings")
    return found


def _sglang_options(settings: PolicySettings, context_length: int) -> SglangOptions:
    local, _, remote = settings.sglang_path_map.partition("=")
    return SglangOptions(
        urls=tuple(url.strip() for url in settings.sglang_urls.split(",") if url.strip()),
        context_length=context_length,
        api_key=settings.sglang_key.get_secret_value(),
        path_map=(local, remote) if local else None,
        base=settings.model if settings.sglang_adapters else None,
        start_s=settings.sglang_wait_s,
    )


def _best_local(config: dict[str, object]) -> str:
    if config.get("model_type") == "llama":
        for name in local_engines():
            return name
    raise MissingDependency(
        "no local engine can serve this model; install openvino-genai or torch, "
        "or set engine to sglang or openai"
    )
