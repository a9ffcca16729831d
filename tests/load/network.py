"""Two machines' networks on one host: network namespaces that a veth pair joins.

- `enter` puts a program into a namespace of its own, which is the first machine's; as root, or in a
  user namespace where the host permits one. The second is made beside it, and ends with it.
- Nothing outside the two is touched, and nothing outside can be reached from them. Without `enter`
  the first is the network of this process, which gets one end of the cable meanwhile.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

HERE, THERE = "10.77.0.1", "10.77.0.2"
_MARK = "REGREEN_IN_A_NETWORK_OF_ITS_OWN"
_TOOLS = ("ip", "unshare", "nsenter")


def enter(command: Sequence[str]) -> str:
    """Run a program in a network of its own, in place of this one; why not, if it cannot be."""
    if os.environ.get(_MARK):
        return ""
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed (packages iproute2 and util-linux)"
    reason = ""
    for how in (["--net"], ["--user", "--map-root-user", "--net"]):
        probe = ["unshare", *how, "unshare", "--net", "true"]
        tried = subprocess.run(probe, capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            os.execvpe("unshare", ["unshare", *how, *command], os.environ | {_MARK: "1"})
        reason = tried.stderr.strip()
    return f"no network namespace can be made: {reason}"


class Network:
    """The namespace of this process, the second machine's, and the cable between them."""

    def __enter__(self) -> "Network":
        self._here = f"rg{secrets.token_hex(4)}"
        # It ends with its standard input, and so with this process, however that ends.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        try:
            self._connect(self._holder.pid)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _connect(self, pid: int) -> None:
        _run("ip", "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "name", "there", "netns", str(pid))
        _run("ip", "link", "add", self._here, *pair)
        _run("ip", "address", "add", f"{HERE}/24", "dev", self._here)
        _run("ip", "link", "set", self._here, "up")
        _run(*self.there("ip", "link", "set", "lo", "up"))
        _run(*self.there("ip", "address", "add", f"{THERE}/24", "dev", "there"))
        _run(*self.there("ip", "link", "set", "there", "up"))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # At once, not when the kernel comes to it: the next may have the same address.
        subprocess.run(["ip", "link", "delete", self._here], check=False, capture_output=True)
        self._holder.kill()
        self._holder.wait()

    def there(self, *command: str) -> tuple[str, ...]:
        """A command as it runs on the second machine."""
        return ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net", *command)

    def names(self) -> tuple[str, str]:
        """The two namespaces, as the kernel calls them."""
        processes = ("self", str(self._holder.pid))
        here, there = (os.readlink(Path("/proc") / name / "ns/net") for name in processes)
        return here, there

    def cut(self) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        _run("ip", "link", "set", self._here, "down")

    def join(self) -> None:
        """Put it back."""
        _run("ip", "link", "set", self._here, "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)
