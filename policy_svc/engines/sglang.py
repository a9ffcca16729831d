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
- While asleep the servers have neither weights nor cache; what is asked then is refused.
- Retries are bounded by `retry_s` and happen before a first answer only: never after a 4xx.

Source: sglang 0.5.16 and 0.5.23, `srt/entrypoints/http_server.py`, `srt/managers/io_struct.py`.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import (
    Check,
    Completion,
    EngineInfo,
    FinishReason,
    Generation,
    Offer,
    PauseMode,
    Request,
    TokenSink,
    VersionSpan,
    spans,
)
from policy_svc.engines.sglang_adapters import Adapter, adapter_of
from policy_svc.engines.sglang_receive import join, leave, ranks_of, take
from policy_svc.engines.sglang_replica import Exchanges, Replica, push_all
from policy_svc.engines.sglang_sleep import (
    Held,
    StillAsleep,
    gives_back,
    sleep_all,
    sleep_too,
    wake_all,
)
from policy_svc.engines.sglang_wire import own_label, release_of, sampling_params, sleeps
from regreen.rpc.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable

_MODES = {PauseMode.IN_PLACE: "in_place", PauseMode.ABORT: "abort"}
_OPENERS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


_PROBE = "<|im_start|>user\nwerkzeug==2.0.13 def f(x): \u00e9 \u4e2d\u6587\t\U0001f600<|im_end|>\n"
"""Text on which tokenizers of different models differ."""


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
        self._replicas: list[Replica] = []
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
        self._label = ""
        """Name of the version of `_weights`, which is not an adapter's."""
        self._asleep = self._sleeps = False
        self._receivers = 0
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
            structures=True,
            sleeps=self._sleeps,
            receivers=self._receivers,
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
        options = self._options
        exchanges = Exchanges(options.control_timeout_s, options.retry_s, self._clock)
        headers = (
            {"Authorization": f"Bearer {self._options.api_key}"} if self._options.api_key else {}
        )
        for url in self._options.urls:
            client = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=self._options.control_timeout_s
            )
            self._replicas.append(Replica(client, exchanges))
        deadline_s = self._clock() + self._options.start_s
        for replica in self._replicas:
            await replica.healthy(deadline_s, self._options.start_s)
            await self._check_tokenizer(replica)
        models = [await one.json("GET", "/model_info") for one in self._replicas]
        servers = [await one.json("GET", "/server_info") for one in self._replicas]
        self._model, self._server = models[0], servers[0]
        self._weights = str(self._model.get("model_path", ""))
        labels = [str(model.get("weight_version", "")) for model in models]
        self._label, self._asleep = own_label(labels[0]), any(map(sleeps, labels))
        # What was pushed before has a number for its name, and is no longer the base.
        pushed = any(own_label(label).isdecimal() for label in labels)
        self._base_weights = None if pushed else self._weights
        self._sleeps = all(map(gives_back, servers))
        self._native_spans = release_of(self._server.get("version", "")) >= (0, 5, 23)
        for replica, server in zip(self._replicas, servers, strict=True):
            replica.native_spans, replica.ranks = self._native_spans, ranks_of(server)
        ranks = [replica.ranks for replica in self._replicas]
        self._receivers = sum(ranks) if all(ranks) else 0

    async def close(self) -> None:
        """Close connections."""
        await asyncio.gather(*self._unloading)
        for replica in self._replicas:
            await replica.client.aclose()

    async def generate(self, request: Request, on_tokens: TokenSink | None = None) -> Generation:
        """Sample on one replica, so that the samples share their prompt's cache."""
        await self._open.wait()
        if self._asleep:
            raise Unavailable("the servers sleep: their memory is lent", retry_after_s=5.0)
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

    async def load(self, version: int, path: Path, checked: Check | None = None) -> float:
        """Push a version to every replica; all or none have it afterwards."""
        if self._asleep:
            raise FailedPrecondition("the servers sleep; wake them with that version")
        if checked:
            await checked
        if adapter := self._adapter_of(path):
            self._hold(adapter)
            try:
                for replica in self._replicas:
                    await replica.put_adapter(*self._named(adapter))
                self._version, self._adapter = version, adapter
            finally:
                self._release(adapter)
            return 0.0
        target = self._remote(path)
        began_s = self._clock()
        pushed: list[Replica] = []
        try:
            # What an adapter adds fits the weights that it stands on alone.
            if self._adapter or not self._native_spans:
                self._open.clear()
                await self._idle.wait()
            for replica in self._replicas:
                await replica.push(target, str(version))
                pushed.append(replica)
        except (FailedPrecondition, Unavailable):
            for replica in pushed:
                await replica.push(self._weights, str(self._version))
                self._label = str(self._version)
            raise
        else:
            self._version, self._weights, self._adapter = version, target, None
            self._label = str(version)
            self._retire()
        finally:
            self._open.set()
        return self._clock() - began_s

    async def receive(self, version: int, path: Path, offer: Offer) -> float:
        """Take a version from a sender on every replica; all or none have it afterwards."""
        if self._asleep or offer.receivers != self._receivers:
            raise FailedPrecondition(f"{self._receivers} ranks can receive now, if awake")
        began_s, joined = self._clock(), False
        self._open.clear()
        try:
            await self._idle.wait()  # tensors change one by one
            await join(self._replicas, offer)
            joined = True
            await take(self._replicas, offer, str(version))
        except Unavailable:
            if joined:  # some may have other weights, or parts of them
                await push_all(self._replicas, self._weights, self._label)
            raise
        else:
            self._version, self._weights, self._adapter = version, self._remote(path), None
            self._label = str(version)
            self._retire()
        finally:
            await leave(self._replicas, offer)
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

    @property
    def asleep(self) -> bool:
        """Whether servers sleep."""
        return self._asleep

    async def sleep(self) -> None:
        """Release weights and cache on every replica, or on none."""
        if self._asleep:
            await sleep_too(self._replicas)
            return
        self._open.clear()
        try:
            await self._idle.wait()
            await self._unload_all()
            await sleep_all(self._replicas, self._held())
            self._asleep = True
        except StillAsleep:
            self._asleep = True
            raise
        finally:
            self._open.set()  # what comes is refused from now on, or runs

    async def wake(self, version: int, path: Path | None) -> None:
        """Have every replica serve that version, or none."""
        weights, label, adapter = self._weights, self._label, self._adapter
        if path:
            adapter = self._adapter_of(path)
            if adapter is None:
                weights, label = self._remote(path), str(version)
        named = self._named(adapter) if adapter else None
        await wake_all(self._replicas, Held(weights, label, named))
        self._version, self._adapter = version, adapter
        self._weights, self._label, self._asleep = weights, label, False
        self._loaded = {adapter: 0} if adapter else {}

    async def _sample(
        self, replica: Replica, request: Request, index: int, adapter: Adapter | None
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
            return await replica.json("POST", "/generate", body, timeout_s=bound_s)
        body["lora_path"] = adapter.name
        try:
            return await replica.json("POST", "/generate", body, timeout_s=bound_s)
        except InvalidArgument:  # a server that was begun anew knows of none
            await replica.put_adapter(*self._named(adapter))
            return await replica.json("POST", "/generate", body, timeout_s=bound_s)

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

    def _named(self, adapter: Adapter) -> tuple[str, str]:
        """Name and place of an adapter, as servers know them."""
        return adapter.name, self._remote(adapter.path)

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
            r.json("POST", "/unload_lora_adapter", {"lora_name": adapter.name})
            for r in self._replicas
        )
        await asyncio.gather(*calls, return_exceptions=True)

    def _held(self) -> Held:
        named = self._named(self._adapter) if self._adapter else None
        return Held(self._weights, self._label, named)

    async def _unload_all(self) -> None:
        """Unload every adapter: servers that wake load what is sampled from anew."""
        await asyncio.gather(*self._unloading, *(self._unload(one) for one in self._loaded))
        self._loaded.clear()

    async def _control_all(self, route: str, body: dict[str, Any]) -> None:
        await asyncio.gather(*(r.json("POST", route, body) for r in self._replicas))

    async def _abort_one(self, replica: Replica, rid: str) -> None:
        await replica.json("POST", "/abort_request", {"rid": rid})

    async def _abort_quietly(self, replica: Replica, rids: Sequence[str]) -> None:
        """End samples nobody waits for; a server that cannot be told has ended them, or will."""
        calls = (replica.json("POST", "/abort_request", {"rid": rid}, retry_s=0.0) for rid in rids)
        await asyncio.gather(*calls, return_exceptions=True)

    async def _check_tokenizer(self, replica: Replica) -> None:
        try:
            body = {"prompt": _PROBE, "add_special_tokens": False}
            told = (await replica.json("POST", "/tokenize", body)).get("tokens")
        except InvalidArgument:
            return  # a release without this route cannot be asked
        if told is not None and told != self._tokenizer.encode(_PROBE, control=True):
            raise FailedPrecondition(
                f"{replica.url} tokenizes otherwise than the model folder; set model "
                "to a folder with the tokenizer of the model that it serves"
            )

    def _remote(self, path: Path) -> str:
        text = str(path)
        if self._options.path_map and text.startswith(self._options.path_map[0]):
            local, remote = self._options.path_map
            return remote + text[len(local) :]
        return text
