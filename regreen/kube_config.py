"""What is known of a Kubernetes cluster: the configuration that `kubectl` would use.

- The client library is wanted where a cluster is meant, and nowhere else.
- A configuration of whatever form is taken or refused; none ends anything with a traceback.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regreen.rpc.errors import MissingDependency

_OTHER_FORM = (AttributeError, LookupError, TypeError, ValueError)
"""What the client library raises where a configuration has another form than it expects."""


@contextlib.contextmanager
def using(remedy: str) -> Iterator[None]:
    """Refuse a configuration of which the client library cannot make anything.

    Raises:
        MissingDependency: no library (`package` of its metadata names it), or no usable
            configuration; it ends with the remedy.
    """
    try:
        import lightkube  # noqa: F401  (whoever uses a configuration needs it)
        import yaml
        from lightkube.core.exceptions import ConfigError
    except ImportError as error:
        raise MissingDependency(
            f"the Kubernetes client is missing ({error.name}); install regreen[kubernetes]",
            metadata={"package": str(error.name)},
        ) from error
    try:
        yield
    except (ConfigError, OSError, yaml.YAMLError, *_OTHER_FORM) as error:
        raise MissingDependency(f"no usable cluster configuration ({error}); {remedy}") from error


def read(path: Path | None, remedy: str) -> Any:
    """One cluster's configuration, from a file or where the client library looks.

    Raises:
        MissingDependency: as `using` says.
    """
    with using(remedy):
        from lightkube import KubeConfig

        found = (KubeConfig.from_file(path) if path else KubeConfig.from_env()).get()
        if found is None:
            raise ValueError("it names no context")
        return found
