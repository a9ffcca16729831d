"""What is told of an id that nothing here has, or that cannot go, and what to do then."""

from regreen.rpc.errors import FailedPrecondition, NotFound


def no_state(state_id: str) -> NotFound:
    """There is no such state."""
    return NotFound(
        f"no such state: {state_id}; prepare or import it again (regreen state list shows those "
        "that are here; one may have been deleted, or dropped for the budget of states)",
        metadata={"id": state_id},
    )


def no_sandbox(sandbox_id: str) -> NotFound:
    """There is no such sandbox."""
    return NotFound(
        f"no such sandbox: {sandbox_id}; create it again (regreen sandbox list shows those that "
        "live; one ends at its deadline unless KeepAlive moves that, and with the service)",
        metadata={"id": sandbox_id},
    )


def state_in_use(state_id: str) -> FailedPrecondition:
    """A state stays while sandboxes run on it."""
    return FailedPrecondition(
        f"sandboxes run on state {state_id}; delete them first", metadata={"id": state_id}
    )
