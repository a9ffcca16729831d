"""A SWE-ReX deployment: agents written for SWE-ReX run in a Regreen sandbox, unchanged.

- Needs `swe-rex` (the extra `adapters`), and nothing of it inside the sandbox.
- Works from any event loop, a new one for every call included: the calls run on their own.
- `start` forks a State, `stop` deletes the fork; whoever dies in between loses it to its TTL.
"""

import logging
from typing import Any, Literal, Self

try:
    from swerex.deployment.abstract import AbstractDeployment
    from swerex.deployment.hooks.abstract import CombinedDeploymentHook, DeploymentHook
    from swerex.exceptions import DeploymentNotStartedError, DeploymentStartupError
    from swerex.runtime.abstract import IsAliveResponse
    from swerex.utils.log import get_logger
except ImportError as error:
    raise ImportError("swe-rex is not installed: pip install '.[adapters]'") from error

from regreen.adapters.held import HeldSandbox, SandboxConfig
from regreen.adapters.loop import hand_over
from regreen.adapters.swe_rex_runtime import RegreenRuntime
from regreen.rpc.errors import RegreenError

__all__ = ["RegreenDeployment", "RegreenDeploymentConfig"]


class RegreenDeploymentConfig(SandboxConfig):
    """Configuration of a `RegreenDeployment`; `get_deployment` makes it."""

    type: Literal["regreen"] = "regreen"
    """Discriminator for (de)serialization. Do not change."""

    def get_deployment(self) -> "RegreenDeployment":
        """A deployment of this configuration, not started."""
        return RegreenDeployment.from_config(self)


class RegreenDeployment(AbstractDeployment):  # type: ignore[misc]
    """A Regreen sandbox as a SWE-ReX deployment."""

    def __init__(self, *, logger: logging.Logger | None = None, **kwargs: Any) -> None:
        self._config = RegreenDeploymentConfig(**kwargs)
        self._runtime: RegreenRuntime | None = None
        self.logger = logger or get_logger("rex-deploy")
        self._hooks = CombinedDeploymentHook()

    @classmethod
    def from_config(cls, config: RegreenDeploymentConfig) -> Self:
        """A deployment of `config`, not started."""
        return cls(**config.model_dump())

    def add_hook(self, hook: DeploymentHook) -> None:
        """Have `hook` told of the steps of `start`."""
        self._hooks.add_hook(hook)

    @property
    def runtime(self) -> RegreenRuntime:
        """The runtime if running.

        Raises:
            DeploymentNotStartedError: the deployment was not started.
        """
        if self._runtime is None:
            raise DeploymentNotStartedError
        return self._runtime

    @property
    def sandbox_id(self) -> str:
        """Id of the sandbox, with which any client can fork, snapshot or diff it."""
        return self.runtime.sandbox_id

    async def is_alive(self, *, timeout: float | None = None) -> IsAliveResponse:
        """Whether the sandbox is there.

        Raises:
            DeploymentNotStartedError: the deployment was not started.
        """
        return await self.runtime.is_alive(timeout=timeout)

    async def start(self, *args: Any, **kwargs: Any) -> None:
        """Fork the State; again while running it does nothing.

        Raises:
            DeploymentStartupError: the configuration is wrong or the service refused.
        """
        if self._runtime is not None:
            return
        self._hooks.on_custom_step("Forking the state")
        try:
            box = await hand_over(HeldSandbox.open(self._config))
        except RegreenError as error:
            raise DeploymentStartupError(str(error)) from error
        self._hooks.on_custom_step("Sandbox is running")
        self._runtime = RegreenRuntime(box, logger=self.logger)

    async def stop(self, *args: Any, **kwargs: Any) -> None:
        """Delete the sandbox; safe to call again."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await runtime.close()
