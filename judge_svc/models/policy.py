"""A model behind a policy endpoint (`regreen.policy.v1.PolicyService`).

- The name carries the policy version: a newer version is another judge, with its own verdicts.
- Greedy; the prompt is cut in the middle when it does not fit the context.
- A small policy mostly answers malformed text; the rubric then goes on without it and says so.
"""

import asyncio
from pathlib import Path

from regreen.client.policy import PolicyClient
from regreen.policy import v1 as pb
from regreen.rpc import tenants
from regreen.rpc.certificates import Tls
from regreen.rpc.channels import BearerFile, open_channel
from regreen.rpc.errors import RegreenError, Unavailable


class PolicyModel:
    """A chat model by gRPC."""

    def __init__(
        self,
        target: str,
        *,
        max_tokens: int = 512,
        tls: Tls | None = None,
        token_file: Path | None = None,
        patience_s: float = 2.0,
    ) -> None:
        self._channel = open_channel(
            target, tls, token=BearerFile(token_file) if token_file else None
        )
        self._client = PolicyClient(self._channel, patience_s=patience_s)
        self._max_tokens = max_tokens

    async def name(self) -> str:
        """Model and version that serve now."""
        try:
            policy = await self._client.get_policy()
        except RegreenError as error:
            raise Unavailable(f"the policy service does not answer: {error}") from error
        return f"policy:{policy.model}@{policy.policy.version}"

    async def complete(self, system: str, user: str, *, timeout_s: float) -> str:
        """See `Model.complete`."""
        try:
            # What is judged for a tenant is sampled for it.
            async with asyncio.timeout(timeout_s):
                with tenants.charging(tenants.charged()):
                    return await self._complete(system, user, timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"the policy did not answer within {timeout_s:g} s") from error
        except Unavailable:
            raise
        except RegreenError as error:
            raise Unavailable(f"the policy does not answer: {error}") from error

    async def _complete(self, system: str, user: str, timeout_s: float) -> str:
        policy = await self._client.get_policy()
        room = policy.context_length - self._max_tokens
        text = user
        for _ in range(8):
            messages = [
                pb.ChatMessage(role="system", content=system),
                pb.ChatMessage(role="user", content=text),
            ]
            rendered = await self._client.render_chat(messages)
            if len(rendered.token_ids) <= room:
                break
            text = cut_middle(text, int(len(text) * 0.9 * room / len(rendered.token_ids)))
        else:
            raise Unavailable("the rubric does not fit the policy's context")
        sampling = pb.Sampling(temperature=0.0, max_new_tokens=self._max_tokens)
        response = await self._client.generate(
            rendered.token_ids, sampling=sampling, timeout_s=timeout_s
        )
        return response.completions[0].text if response.completions else ""

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def cut_middle(text: str, keep_chars: int) -> str:
    """The head and tail of `text`, together at most `keep_chars`."""
    half = max(keep_chars, 0) // 2
    if len(text) <= 2 * half:
        return text
    return text[:half] + "\n...\n" + text[len(text) - half :] if half else ""
