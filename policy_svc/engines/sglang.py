"""An SGLang server, or several replicas, over plain HTTP; sglang itself is never imported.

- Token ids in and out (`/generate` with `input_ids`); text is never tokenized by the server.
- Sampling parameters are exactly those that SGLang knows: it answers unknown ones with 400.
- Weight pushes go to every replica, each versioned; the router has no such route. When one replica
  fails, those already pushed are put back, and the old version serves on.
- Version spans are the server's own where it reports them (0.5.23). Where it does not (0.5.16),
  a push waits for running requests and holds new ones, so that each has one version, stamped here;
  one that still saw two (a push by someone else) is refused as `Aborted`, never mis-stamped.
- With `base` a version's adapter is loaded in place of its weights, by a name of its content:
  running requests go on with theirs, which is unloaded when nobody samples from it.
- Servers whose tokenizer is not the model folder's are refused at the start, where they can be
  asked (`/tokenize`): ids that mean something else would be sampled, recorded and trained on.
- Logprobs are the server's: after the temperature, unless it runs with
  `SGLANG_RETURN_ORIGINAL_LOGPROB=1`; at temperature 1, which training asks for, both are equal.
- Seeds are sent, but a server honours them only with `--enable-deterministic-inference`.
- A request ends whole: when one of its samples fails, the server is told to end the others.
- A start waits `start_s` for servers that load their model: minutes, for a large one.
- Retries are bounded by `retry_s` and happen before a first answer only: never after a 4xx.

Source: sglang 0.5.16 and 0.5.23, `srt/entrypoints/http_server.py`, `srt/managers/io_struct.py`.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import (
    Completion,
    EngineInfo,
    FinishReason,
    Generation,
    PauseMode,
    Request,
    TokenSink,
    VersionSpan,
    spans,
)
from policy_svc.engines.sglang_adapters import Adapter, adapter_of
from policy_svc.engines.sglang_wire import object_of, release_of, sampling_params
from regreen.rpc.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from regreen.rpc.logging import get

_MODES = {PauseMode.IN_PLACE: "in_place", PauseMode.ABORT: "abort"}
_OPENERS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


_PROBE = "<|im_start|>user\nwerkzeug==2.0.13 def f(x): \u00e9 \u4e2d\u6587\t\U0001f600<|im_end|>\n"
"""Text on which tokenizers of different models differ."""
_TELL_S = 30.0


@dataclass(frozen=True, slots=True)
class SglangOptions:
    """Where the replicas are, for example `http://10.0.0.3:30000`."""

    urls: tuple[str, ...]
    context_length: int
    """Longest context of the model, where the server does not name a shorter one."""
    api_key: str = ""
    path_map: tuple[str, str] | None = None
    """Local path prefix and what the servers call it, where they mount storage elsewhere."""
    request_timeout_s: float = 600.0
    control_timeout_s: float = 300.0
    retry_s: float = 30.0
    base: Path | None = None
    """Model that the servers serve, started with `--enable-lora`; none: no adapters are loaded."""
    start_s: float = 1800.0
    """Wait for servers that load their model, all of them together."""


@dataclass(slots=True)
class _Replica:
    client: httpx.AsyncClient
    running: set[str] = field(default_factory=set)


class SglangEngine:
    """An `Engine` in front of SGLang replicas; requests go to the least busy one."""

    def __init__(
        self,
        options: SglangOptions,
        tokenizer: Tokenizer,
        end_id: int,
        *,
        version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._tokenizer, self._end_id = options, tokenizer, end_id
        self._version, self._clock = version, clock
        self._replicas: list[_Replica] = []
        self._model: dict[str, Any] = {}
        self._server: dict[str, Any] = {}
        self._weights = ""
        self._base_weights: str | None = None
        """What adapters stand on, if the servers hold that since they began."""
        self._adapter: Adapter | None = None
        """What is sampled from; none: the weights themselves."""
        self._loaded: dict[Adapter, int] = {}
        """Adapters on the replicas, and how many requests and loads need each."""
        self._unloading: set[asyncio.Task[None]] = set()
        self._native_spans = False
        self._order = itertools.count()
        self._base_version = version
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()

    @property
    def info(self) -> EngineInfo:
        """What the servers say they serve."""
        return EngineInfo(
            name="sglang",
            model=str(self._model.get("served_model_name") or self._model.get("model_path", "")),
            dtype=str(self._server.get("dtype") or "server"),
            vocabulary=self._tokenizer.size,
            context_length=int(self._server.get("context_length") or self._options.context_length),
            end_of_turn_id=self._end_id,
            regex=True,
        )

    @property
    def version(self) -> int:
        """Version of tokens sampled from now on."""
        return self._version

    async def start(self) -> None:
        """Connect, and wait until every replica is healthy, at most `start_s`.

        Raises:
            FailedPrecondition: a replica serves a model with another tokenizer.
            Unavailable: one is not healthy by then; names it and what it said last.
        """
        headers = (
            {"Authorization": f"Bearer {self._options.api_key}"} if self._options.api_key else {}
        )
        for url in self._options.urls:
            client = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=self._options.control_timeout_s
            )
            self._replicas.append(_Replica(client))
        deadline_s = self._clock() + self._options.start_s
        for replica in self._replicas:
            await self._healthy(replica, deadline_s)
            await self._check_tokenizer(replica)
        first = self._replicas[0]
        models = [await self._json(one, "GET", "/model_info") for one in self._replicas]
        self._model = models[0]
        self._server = await self._json(first, "GET", "/server_info")
        self._weights = str(self._model.get("model_path", ""))
        # What was pushed before has a number for its name, and is no longer the base.
        pushed = any(str(model.get("weight_version")).isdecimal() for model in models)
        self._base_weights = None if pushed else self._weights
        self._native_spans = release_of(self._server.get("version", "")) >= (0, 5, 23)

    async def close(self) -> None:
        """Close connections."""
        await asyncio.gather(*self._unloading)
        for replica in self._replicas:
            await replica.client.aclose()

    async def generate(self, request: Request, on_tokens: TokenSink | None = None) -> Generation:
        """Sample on one replica, so that the samples share their prompt's cache."""
        await self._open.wait()
        replica = min(self._replicas, key=lambda r: (len(r.running), next(self._order)))
        rids = [f"{request.request_id}/{index}" for index in range(request.n)]
        replica.running.update(rids)
        self._idle.clear()
        began, adapter = self._version, self._adapter
        self._hold(adapter)
        samples = [
            asyncio.create_task(self._sample(replica, request, index, adapter))
            for index in range(request.n)
        ]
        try:
            answers = await asyncio.gather(*samples)
        except BaseException:
            for sample in samples:
                sample.cancel()
            await asyncio.wait(samples)
            left = [rid for rid, sample in zip(rids, samples, strict=True) if sample.cancelled()]
            await asyncio.shield(self._abort_quietly(replica, left))
            raise
        finally:
            replica.running.difference_update(rids)
            if not any(one.running for one in self._replicas):
                self._idle.set()
            self._release(adapter)
        completions = tuple(self._completion(answer, began, adapter) for answer in answers)
        if on_tokens:
            for index, completion in enumerate(completions):
                on_tokens(index, completion.token_ids, completion.logprobs)
        cached = max(int(a["meta_info"].get("cached_tokens") or 0) for a in answers)
        return Generation(completions, cached)

    async def load(self, version: int, path: Path) -> float:
        """Push a version to every replica; all or none have it afterwards."""
        if adapter := self._adapter_of(path):
            self._hold(adapter)
            try:
                for replica in self._replicas:
                    await self._put_adapter(replica, adapter)
                self._version, self._adapter = version, adapter
            finally:
                self._release(adapter)
            return 0.0
        target = self._remote(path)
        began_s = self._clock()
        pushed: list[_Replica] = []
        try:
            # What an adapter adds fits the weights that it stands on alone.
            if self._adapter or not self._native_spans:
                self._open.clear()
                await self._idle.wait()
            for replica in self._replicas:
                await self._push(replica, target, version)
                pushed.append(replica)
        except (FailedPrecondition, Unavailable):
            for replica in pushed:
                await self._push(replica, self._weights, self._version)
            raise
        else:
            self._version, self._weights, self._adapter = version, target, None
            self._retire()
        finally:
            self._open.set()
        return self._clock() - began_s

    def moved(self, path: Path) -> None:
        """Push the weights from another place, should a replica need them again."""
        if not self._adapter:
            self._weights = self._remote(path)

    async def pause(self, mode: PauseMode) -> int:
        """Freeze or end running requests on every replica."""
        running = sum(len(replica.running) for replica in self._replicas)
        if mode in _MODES:
            await self._control_all("/pause_generation", {"mode": _MODES[mode]})
        return running

    async def resume(self) -> None:
        """Go on, on every replica."""
        await self._control_all("/continue_generation", {})

    async def abort(self, request_id: str | None) -> int:
        """End the samples of one request, or of all; the number of requests that ended."""
        ended: set[str] = set()
        for replica in self._replicas:
            for rid in list(replica.running):
                owner = rid.rsplit("/", 1)[0]
                if request_id in (None, owner):
                    await self._abort_one(replica, rid)
                    ended.add(owner)
        return len(ended)

    async def _sample(
        self, replica: _Replica, request: Request, index: int, adapter: Adapter | None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "rid": f"{request.request_id}/{index}",
            "input_ids": list(request.prompt_token_ids),
            "sampling_params": sampling_params(request.sampling, self._end_id, index),
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "stream": False,
        }
        bound_s = self._options.request_timeout_s
        if adapter is None:
            return await self._json(replica, "POST", "/generate", body, timeout_s=bound_s)
        body["lora_path"] = adapter.name
        try:
            return await self._json(replica, "POST", "/generate", body, timeout_s=bound_s)
        except InvalidArgument:  # a server that was begun anew knows of none
            await self._put_adapter(replica, adapter)
            return await self._json(replica, "POST", "/generate", body, timeout_s=bound_s)

    def _completion(
        self, answer: dict[str, Any], began: int, adapter: Adapter | None
    ) -> Completion:
        meta = answer["meta_info"]
        triples = meta["output_token_logprobs"]
        ids = tuple(int(triple[1]) for triple in triples)
        if ids != tuple(answer["output_ids"]):
            raise Unavailable("the server's output_ids and logprobs disagree", retry_after_s=1.0)
        finish = meta["finish_reason"]
        return Completion(
            ids,
            tuple(float(triple[0]) for triple in triples),
            spans([began] * len(ids)) if adapter else self._spans(meta, len(ids), began),
            _OPENERS[finish["type"]],
            self._tokenizer.decode(ids),
        )

    def _spans(self, meta: dict[str, Any], count: int, began: int) -> tuple[VersionSpan, ...]:
        reported = meta.get("weight_versions")
        if reported:
            found = tuple(
                VersionSpan(self._number(s["version"]), int(s["start"]), int(s["end"]))
                for s in reported
            )
            edges = [0, *(span.end for span in found)]
            if edges[-1] != count or [span.start for span in found] != edges[:-1]:
                raise Unavailable("the server's version spans leave gaps", retry_after_s=1.0)
            return found
        ended = self._number(meta.get("weight_version", began))
        if began != ended:
            raise Aborted("the policy version changed during the request; sample again")
        return spans([ended] * count)

    def _number(self, weight_version: object) -> int:
        """A server's version name as a number; before the first push it has a name of its own."""
        text = str(weight_version)
        return int(text) if text.isdecimal() else self._base_version

    async def _push(self, replica: _Replica, path: str, version: int) -> None:
        body = {
            "model_path": path,
            "weight_version": str(version),
            "abort_all_requests": False,
            "flush_cache": True,
            "keep_pause": False,
        }
        if not self._native_spans:
            del body["keep_pause"]
        try:
            answer = await self._json(replica, "POST", "/update_weights_from_disk", body)
        except InvalidArgument as error:
            raise FailedPrecondition(f"weights were not loaded: {error.message}") from error
        if not answer.get("success"):
            raise FailedPrecondition(f"weights were not loaded: {answer.get('message')}")

    def _adapter_of(self, path: Path) -> Adapter | None:
        base = self._options.base
        if base is None or self._weights != self._base_weights:  # none, or pushed over
            return None
        return adapter_of(path, base)

    def _hold(self, adapter: Adapter | None) -> None:
        """Have an adapter stay loaded until it is released."""
        if adapter:
            self._loaded[adapter] = self._loaded.get(adapter, 0) + 1

    def _release(self, adapter: Adapter | None) -> None:
        if adapter:
            self._loaded[adapter] -= 1
            self._retire()

    async def _put_adapter(self, replica: _Replica, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name, "lora_path": self._remote(adapter.path)}
        try:
            await self._json(replica, "POST", "/load_lora_adapter", body)
        except InvalidArgument as error:
            if "already" not in error.message:
                raise FailedPrecondition(f"the adapter was not loaded: {error.message}") from error

    def _retire(self) -> None:
        """Unload adapters that nobody samples from; callers do not wait for it."""
        for adapter in [one for one, users in self._loaded.items() if not users]:
            if adapter != self._adapter:
                del self._loaded[adapter]
                task = asyncio.create_task(self._unload(adapter))
                self._unloading.add(task)
                task.add_done_callback(self._unloading.discard)

    async def _unload(self, adapter: Adapter) -> None:
        calls = (
            self._json(r, "POST", "/unload_lora_adapter", {"lora_name": adapter.name})
            for r in self._replicas
        )
        await asyncio.gather(*calls, return_exceptions=True)

    async def _control_all(self, route: str, body: dict[str, Any]) -> None:
        await asyncio.gather(*(self._json(r, "POST", route, body) for r in self._replicas))

    async def _abort_one(self, replica: _Replica, rid: str) -> None:
        await self._json(replica, "POST", "/abort_request", {"rid": rid})

    async def _abort_quietly(self, replica: _Replica, rids: Sequence[str]) -> None:
        """End samples nobody waits for; a server that cannot be told has ended them, or will."""
        calls = (
            self._json(replica, "POST", "/abort_request", {"rid": rid}, retry_s=0.0) for rid in rids
        )
        await asyncio.gather(*calls, return_exceptions=True)

    async def _check_tokenizer(self, replica: _Replica) -> None:
        try:
            body = {"prompt": _PROBE, "add_special_tokens": False}
            told = (await self._json(replica, "POST", "/tokenize", body)).get("tokens")
        except InvalidArgument:
            return  # a release without this route cannot be asked
        if told is not None and told != self._tokenizer.encode(_PROBE, control=True):
            raise FailedPrecondition(
                f"{replica.client.base_url} tokenizes otherwise than the model folder; set model "
                "to a folder with the tokenizer of the model that it serves"
            )

    async def _healthy(self, replica: _Replica, deadline_s: float) -> None:
        """Wait until a replica is healthy, and say now and then why it is not."""
        tell_s = self._clock()
        while True:
            try:
                answer = await replica.client.get("/health", timeout=5.0)
                if answer.status_code == 200:
                    return
                problem = f"health says {answer.status_code}"
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            now_s, url = self._clock(), replica.client.base_url
            if now_s >= deadline_s:
                raise Unavailable(
                    f"sglang_urls: {url} is not healthy after {self._options.start_s:g} s "
                    f"({problem}); look at its log, or give it longer by sglang_wait_s",
                    retry_after_s=5.0,
                )
            if now_s >= tell_s:
                tell_s = now_s + _TELL_S
                left_s = round(deadline_s - now_s)
                get().info("waiting for SGLang", url=str(url), problem=problem, left_s=left_s)
            await asyncio.sleep(0.2)

    async def _json(
        self,
        replica: _Replica,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        retry_s: float | None = None,
    ) -> dict[str, Any]:
        """One exchange; 429, 503 and refused connections are tried again until `retry_s`.

        Raises:
            InvalidArgument: the server refused the body (4xx).
            Unavailable: it cannot be reached, or answered 5xx.
        """
        patience_s = self._options.retry_s if retry_s is None else retry_s
        deadline_s = self._clock() + patience_s
        wait_s = 0.05
        while True:
            try:
                answer = await replica.client.request(
                    method, route, json=body, timeout=timeout_s or self._options.control_timeout_s
                )
            except httpx.ConnectError as error:
                problem, again = f"cannot connect: {error}", True
            except httpx.HTTPError as error:
                problem, again = f"{type(error).__name__}: {error}", False
            else:
                if answer.is_success:
                    return object_of(answer)
                problem = f"{route} answered {answer.status_code}: {answer.text[:500]}"
                if 400 <= answer.status_code < 500 and answer.status_code != 429:
                    raise InvalidArgument("request", problem, "send what the engine takes")
                again = answer.status_code in (429, 503)
            if not again or self._clock() + wait_s > deadline_s:
                raise Unavailable(f"{replica.client.base_url}: {problem}", retry_after_s=1.0)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 2.0)

    def _remote(self, path: Path) -> str:
        text = str(path)
        if self._options.path_map and text.startswith(self._options.path_map[0]):
            local, remote = self._options.path_map
            return remote + text[len(local) :]
        return text
