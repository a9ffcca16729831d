"""Fresh forks of a State that the service uses itself and removes again."""

import contextlib
from collections.abc import AsyncIterator, Sequence

from sandbox_svc.backends.base import Box, Limits, Runtime
from sandbox_svc.states import StateStore


@contextlib.asynccontextmanager
async def fork_of(
    states: StateStore,
    runtime: Runtime,
    state_id: str,
    limits: Limits,
    above: Sequence[str] = (),
) -> AsyncIterator[Box]:
    """A fork of a State, or of layers above it; the State's stay until it is gone.

    Raises:
        NotFound: the State was deleted.
        InfraError: the runtime failed.
    """
    state = states.known(state_id)  # its layers may have been swapped meanwhile
    states.hold(state.layers)
    try:
        box = await runtime.create(
            (*state.layers, *above), limits=limits, mounts=state.mounts, base=state.base
        )
        try:
            yield box
        finally:
            await box.delete()
    finally:
        states.release(state.layers)


@contextlib.asynccontextmanager
async def own_layers(states: StateStore, runtime: Runtime) -> AsyncIterator[list[str]]:
    """Collects layers that a fork has frozen for itself, and removes them; the fork goes before."""
    layers: list[str] = []
    try:
        yield layers
    finally:
        states.release(layers)
        for layer in layers:
            await runtime.drop_layer(layer)


async def put_aside(states: StateStore, box: Box, layers: list[str]) -> None:
    """Freeze what a fork holds into a layer of its own."""
    with states.growing():
        layer = await box.freeze()
        states.hold([layer])
        layers.append(layer)
