"""A State of the bare base system with a few files in it: for callers that bring no project.

- Takes the spec's `overlay` as files under the repository and nothing else of it.
- Runs no command, needs no network, no interpreter and no release.
"""

import hashlib

from sandbox_svc.backends.base import Limits, Runtime
from sandbox_svc.builders.base import (
    EnvironmentSpec,
    Installed,
    Prepared,
    Progress,
    Stage,
    check_overlay,
    lay_over,
    nothing_installed,
)
from sandbox_svc.fetches import Fetches


class SystemBuilder:
    """Builds states that hold only files."""

    name = "system"

    async def prepare(
        self,
        spec: EnvironmentSpec,
        runtime: Runtime,
        limits: Limits,
        progress: Progress,
        fetches: Fetches | None = None,
        installed: Installed = nothing_installed,
    ) -> Prepared:
        """Write the overlay into a fresh box and freeze it.

        Raises:
            InvalidArgument: a path of the overlay leaves the repository, or is in another's way.
            InfraError: the runtime failed.
        """
        check_overlay(spec)
        installation = hashlib.sha256(spec.installation).hexdigest()
        layers = installed(installation)
        if not layers:
            layers = await self._laid(spec, runtime, limits, progress)
        return Prepared(layers, (), {}, {"builder": self.name}, installation)

    async def _laid(
        self, spec: EnvironmentSpec, runtime: Runtime, limits: Limits, progress: Progress
    ) -> tuple[str, ...]:
        box = await runtime.create((), limits=limits)
        try:
            for number, change in enumerate(spec.overlay):
                await lay_over(box, number, change)
                progress(Stage("install", number + 1, len(spec.overlay), change.path))
            return (await box.freeze(),)
        finally:
            await box.delete()
