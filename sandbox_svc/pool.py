"""How many sandboxes there may be, and for how long.

- What can never be is refused as a wrong field; only what may fit later is told to come again.
"""

from dataclasses import dataclass

from regreen.rpc.errors import InvalidArgument, ResourceExhausted

_MAX_FORKS = 256


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds of the sandboxes of clients."""

    max_sandboxes: int = 64
    max_comparisons: int = 8
    max_large_diffs: int = 2
    """Of the comparisons, so many look at many paths."""
    default_ttl_s: float = 900.0
    max_ttl_s: float = 24 * 3600.0
    retry_after_s: float = 2.0

    def check_ttl(self, ttl_s: float) -> None:
        """Refuse a life that may not be asked for.

        Raises:
            InvalidArgument: names the longest.
        """
        if not 0 <= ttl_s <= self.max_ttl_s:
            raise InvalidArgument("ttl", f"is {ttl_s:.10g} s", f"give 0 to {self.max_ttl_s:.10g} s")

    def check_count(self, count: int) -> None:
        """Refuse as many forks of a sandbox as there can never be.

        Raises:
            InvalidArgument: names the most.
        """
        if not 1 <= count <= _MAX_FORKS:
            most = max(1, min(_MAX_FORKS, self.max_sandboxes - 1))
            why = f"; the service holds max_sandboxes={self.max_sandboxes} at once"
            raise InvalidArgument("count", f"is {count}", f"give 1 to {most}{why}")
        if count >= self.max_sandboxes:
            raise InvalidArgument(
                "count",
                f"is {count}, and the service holds {self.max_sandboxes} sandboxes at once, the "
                "forked one among them",
                f"give at most {self.max_sandboxes - 1}, or raise the service's max_sandboxes",
            )

    def check_room(self, live: int, starting: int, count: int) -> None:
        """Refuse sandboxes that there is no room for now.

        Raises:
            ResourceExhausted: says when to come again.
        """
        if live + starting + count > self.max_sandboxes:
            raise ResourceExhausted(
                f"{live} of {self.max_sandboxes} sandboxes are in use and {starting} are starting; "
                f"there is no room for {count} more",
                metadata={"limit": str(self.max_sandboxes)},
                retry_after_s=self.retry_after_s,
            )
