"""Files of a container: the scripts that are run in it, and what their answers mean.

- A path is `$1`, absolute and without `..`; it is resolved inside the container, where the script
  runs as the sandbox's user.
- The scripts whose name ends in `ITSELF` go before the others, for a path that holds no link.
"""

from regreen.rpc.errors import FailedPrecondition, InfraError, InvalidArgument, NoSuchFile
from sandbox_svc.backends.base import NotAFile, Odd

READ_ITSELF = """
d=$(dirname -- "$1")
[ "$(readlink -m -- "$d")" = "$d" ] || exit 44
[ ! -L "$1" ] || { readlink -n -- "$1"; exit 47; }
[ ! -d "$1" ] || exit 48
[ ! -e "$1" ] || [ -f "$1" ] || exit 49
"""
READ = """
p=$1
[ -e "$p" ] || exit 44
r=$(readlink -f -- "$p")
case "$r" in /proc/*|/sys/*|/dev/*) exit 45;; esac
[ -f "$r" ] || exit 45
[ -r "$r" ] || exit 46
stat -L -c '%s %a' -- "$r"
tail -c +"$2" -- "$r" | head -c "$3"
"""
WRITE_ITSELF = """
d=$(dirname -- "$1")
[ "$(readlink -m -- "$d")" = "$d" ] || exit 44
[ ! -L "$1" ] || rm -f -- "$1" || exit 46
"""
WRITE = """
p=$1
r=$(readlink -m -- "$p")
case "$r" in /proc/*|/sys/*|/dev/*) exit 45;; esac
[ ! -e "$r" ] || [ -f "$r" ] || exit 45
mkdir -p -- "$(dirname -- "$r")" || exit 46
cat > "$r" || exit 46
chmod "$2" -- "$r"
"""
LISTING = (
    "find {} -xdev '(' ! -type d -printf '%y %s %m %T@ %C@ %p\\0' ')' -o "
    "'(' '(' ! -readable -o ! -executable ')' -printf '%y 0 %m %T@ %C@ %p/\\0' ')' -o "
    "'(' -empty -printf '%y 0 0 0 0 %p/.\\0' ')' 2>/dev/null; true"
)
TOLD = (0, 44, 45, 46, 47, 48, 49)
"""Exit codes of the scripts here that have a meaning."""


def raise_for(code: int, path: str, printed: bytes = b"") -> None:
    """The error that an exit code of a script stands for, if any."""
    match code:
        case 0:
            return
        case 44:
            raise NoSuchFile(f"no such file in the sandbox: {path}", metadata={"path": path})
        case 45:
            raise InvalidArgument("path", f"not a regular file: {path}", "name a regular file")
        case 46:
            raise FailedPrecondition(
                f"not permitted inside the sandbox: {path}", metadata={"path": path}
            )
        case 47:
            raise NotAFile(path, Odd.LINK, printed.decode("utf-8", "surrogateescape"))
        case 48:
            raise NotAFile(path, Odd.DIRECTORY)
        case 49:
            raise NotAFile(path, Odd.OTHER)
        case _:
            raise InfraError(f"the container did not answer for {path} (code {code})")


def parse_listing(data: bytes) -> dict[str, bytes]:
    """Path to everything else that was listed about it."""
    found = {}
    for record in data.split(b"\0")[:-1]:
        *facts, path = record.split(b" ", 5)
        found[path.decode("utf-8", "surrogateescape")] = b" ".join(facts)
    return found
