"""`python -m judge_svc`: the judge service.

- Needs nothing but a directory for its cache; a language model is optional.
"""

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from judge_svc.cache import VerdictCache
from judge_svc.models.base import Model
from judge_svc.models.openai import OpenAIModel
from judge_svc.models.rules import NoModel
from judge_svc.rules import Bounds
from judge_svc.servicer import JudgeServicer
from judge_svc.settings import JudgeSettings
from judge_svc.verdict import Judge, Limits, ModelUse
from regreen.judge import v1 as pb
from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from regreen.rpc.idempotency import Leaving
from regreen.rpc.server import Server

SERVICE = "regreen.judge.v1.JudgeService"


def open_model(settings: JudgeSettings) -> Model:
    """The language model that the settings name."""
    if settings.model == "openai":
        return OpenAIModel(
            settings.openai_url,
            settings.openai_model,
            api_key=settings.openai_key.get_secret_value(),
            max_tokens=settings.model_tokens,
            json_mode=settings.openai_json_mode,
        )
    if settings.model == "policy":
        # Imported here: it alone needs the client package.
        from judge_svc.models.policy import PolicyModel

        return PolicyModel(
            settings.policy_address,
            max_tokens=settings.model_tokens,
            tls=settings.policy_tls,
            token_file=settings.policy_token_file,
        )
    return NoModel()


@contextlib.asynccontextmanager
async def running(settings: JudgeSettings) -> AsyncIterator[Server]:
    """A started server; stopped and closed on the way out."""
    model = open_model(settings)
    cache = VerdictCache(
        settings.home / "judge" / "verdicts.sqlite", max_entries=settings.cache_entries
    )
    # One thread: SQLite's connection and the warning filter around the parser are not shared.
    executor = ThreadPoolExecutor(1, thread_name_prefix="judge")
    bounds = Bounds(
        coverage_drop_pp=settings.coverage_drop_pp,
        coverage_base_percent=settings.coverage_base_percent,
        removed_statements=settings.removed_statements,
        rebuilds=settings.rebuilds,
    )
    limits = Limits(
        evidence_bytes=settings.evidence_bytes,
        prompt_chars=settings.prompt_chars,
        model_timeout_s=settings.model_timeout_s,
    )
    judge = Judge(
        model, cache, executor, lambda: secrets.token_hex(16), bounds=bounds, limits=limits
    )
    methods = (f"{SERVICE}/{name}" for name in ("Judge", "JudgeGroup", "Calibrate"))
    server = Server(settings, [SERVICE], leaving=dict.fromkeys(methods, Leaving.ENDS))
    servicer = JudgeServicer(judge, ModelUse(settings.model_use))
    pb.add_JudgeServiceServicer_to_server(servicer, server.grpc)
    try:
        async with server:
            yield server
    finally:
        await model.close()
        executor.shutdown()
        cache.close()


async def main(settings: JudgeSettings) -> None:
    """Serve until asked to end."""
    async with running(settings) as server:
        await server.wait()


if __name__ == "__main__":
    loaded = JudgeSettings.load()
    logging.configure("judge", loaded.log_level)
    try:
        asyncio.run(main(loaded))
    except RegreenError as error:
        logging.get().error("the service cannot start", problem=error.message)
        sys.exit(1)
