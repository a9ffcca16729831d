"""A preparation that a front has a worker do, which a deletion may overtake."""

from regreen.rpc.errors import FailedPrecondition
from regreen.rpc.tenants import own


class Preparation:
    """A preparation under way."""

    def __init__(self, state_id: str) -> None:
        self._state_id = state_id
        self.tenant = own()
        self.overtaken = False
        """Whether the state was deleted since it began."""
        self.remade = False
        """Whether somebody else made the state after that."""

    def check(self) -> None:
        """Refuse what it made, if that is deleted already.

        Raises:
            FailedPrecondition: the state was deleted meanwhile.
        """
        if self.overtaken:
            raise FailedPrecondition(
                f"state {self._state_id} was deleted while it was prepared; prepare it again",
                metadata={"id": self._state_id},
            )
