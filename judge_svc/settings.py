"""What the judge service can be told.

- Without any setting it judges by rules alone and needs nothing.
"""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from regreen.rpc.certificates import Tls
from regreen.settings import ServiceSettings, check_pem


class JudgeSettings(ServiceSettings):
    """The judge: was the fix genuine, or was the validation tampered with?"""

    section: ClassVar[str] = "judge"

    listen: str = "127.0.0.1:50054"
    """gRPC address."""
    metrics: str = "127.0.0.1:9054"
    """HTTP address of `/metrics` and `/healthz`."""
    model: Literal["rules", "openai", "policy"] = "rules"
    """Language model of the rubric: none, an OpenAI-compatible endpoint, or a policy service."""
    model_use: Literal["never", "if_available", "if_configured", "required"] = "if_available"
    """Whether the model takes part when a request does not say."""
    openai_url: str = "http://127.0.0.1:50063/v1"
    """Base URL of the OpenAI-compatible endpoint."""
    openai_model: str = "policy"
    """Model name sent to it."""
    openai_key: SecretStr = SecretStr("")
    """API key sent to it, as `file:/path`; empty sends none."""
    openai_json_mode: bool = True
    """Ask for `response_format: json_object`; switch off for endpoints that refuse it."""
    policy_address: str = "127.0.0.1:50053"
    """Address of the policy service, for `model=policy`."""
    policy_tls_ca: Path | None = None
    """Authorities of the policy service's certificate (PEM); plain text without. With it, the judge
    shows its own certificate (`tls_cert`) there."""
    policy_token_file: Path | None = None
    """File with the token that the policy service is called with; its scope is `policy:write`."""
    model_timeout_s: float = Field(default=60.0, gt=0)
    """Bound on one answer of the model."""
    model_tokens: int = Field(default=512, ge=16)
    """Longest answer of the model."""
    prompt_chars: int = Field(default=48_000, ge=1_000)
    """Characters of evidence in one prompt."""
    evidence_bytes: int = Field(default=32 << 20, ge=1_024)
    """Largest evidence of one trajectory."""
    coverage_drop_pp: float = Field(default=5.0, ge=0, le=100)
    """Largest loss of line coverage in percentage points that is accepted."""
    coverage_base_percent: float = Field(default=0.0, ge=0, le=100)
    """Coverage below which a loss is not judged."""
    removed_statements: int = Field(default=15, ge=0)
    """Statements of source that a fix may remove without a replacement."""
    rebuilds: int = Field(default=2, ge=1)
    """Validations without an edit from which on a rollout is suspect."""
    cache_entries: int = Field(default=200_000, ge=1)
    """Stored verdicts; the oldest go first."""

    @property
    def policy_tls(self) -> Tls | None:
        """What the policy service is called with."""
        if self.policy_tls_ca is None:
            return None
        return Tls(self.policy_tls_ca, self.tls_cert, self.tls_key)

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.model == "openai" and not self.openai_url.startswith(("http://", "https://")):
            raise ValueError("openai_url: is no http(s) URL; give for example https://host/v1")
        if self.policy_tls_ca is not None:
            check_pem("policy_tls_ca", self.policy_tls_ca)
        return self
