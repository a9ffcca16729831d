"""By what the processes of one command in a container are found, and how all of them are ended.

- A command runs as a user of its own name whose number is that of every command; the name brings
  one group that no other command has. The kernel hands groups on to every descendant, and nobody
  without capabilities can put one off: neither an empty environment nor a new session hides.
- Names are given to one command at a time; one comes back only when no process has its group.
- The programs here run as the container's root with no capability but to signal. They use nothing
  but what is built into a shell: a full process table cannot stop them once they have begun.
- A process whose first thread has ended looks dead; it is alive as long as it has others.
- First the command's processes are stopped, so that none is born behind the back of the search,
  then killed. Where processes come and go faster than they can be looked at, everything in the
  container is stopped in one step by the kernel, searched, and let go on.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

COUNT = 256
"""Commands that one container may have at a time."""
_FIRST_GID = 60_600
"""Above those of people, below those of systemd, within a remapped range of 65536."""
_NAME = "regreen-"

PREPARE = f"""
i=0
grep -q '^{_NAME}0:' /etc/passwd && i={COUNT}
while [ $i -lt {COUNT} ]; do
  echo "{_NAME}$i:x:1000:1000::/work/home:/bin/sh" >> /etc/passwd
  echo "{_NAME}$i:x:$(({_FIRST_GID} + i)):{_NAME}$i" >> /etc/group
  i=$((i + 1))
done
"""
"""Makes the names in an image."""

_LOOK = """
look() {
  state= parent= marks= gone=
  while read -r key value; do
    case $key in
      State:) state=${value%% *} ;;
      PPid:) parent=$value ;;
      Groups:) marks=" $value "; case $state in [ZXx]) ;; *) break ;; esac ;;
      Threads:) case $value in [01]) ;; *) state=S ;; esac; break ;;
    esac
  done 2>/dev/null < "$1/status"
  [ "$state" ] || gone=1
}
"""
END = (
    _LOOK
    + """
sweep() {
  left= fled=
  for p in /proc/[0-9]*; do
    look "$p"
    [ "$gone" ] && fled=1
    case $marks in *" $mark "*) ;; *) continue ;; esac
    case $1$state in
      *[ZXx]) continue ;;
      STOP[TtD]) [ "$state" = D ] && kill -s STOP "${p#/proc/}" 2>/dev/null; continue ;;
    esac
    kill -s "$1" "${p#/proc/}" 2>/dev/null
    left=1
  done
}
repeat() {
  n=0 clean=0
  while [ $n -lt "$2" ]; do
    sweep "$1"
    n=$((n + 1))
    if [ "$left$fled" ]; then clean=0; else clean=$((clean + 1)); fi
    [ $clean -lt "$3" ] || return 0
  done
  return 1
}
mark=$1
repeat STOP 12 1
repeat KILL 12 2 && exit 0
trap 'kill -s CONT -- -1 2>/dev/null' EXIT
kill -s STOP -- -1 2>/dev/null
repeat KILL 60 2
"""
)
"""Ends every process that has the group `$1`; 0 when none is left."""

SIGNAL = (
    _LOOK
    + """
for p in /proc/[0-9]*; do
  look "$p"
  case $marks in *" $1 "*) ;; *) continue ;; esac
  [ "$parent" = 0 ] || continue
  case $state in [ZXx]) exit 3 ;; esac
  kill -s "$2" -- "-${p#/proc/}" 2>/dev/null || exit 3
  exit 0
done
exit 3
"""
)
"""Sends signal `$2` to the process group of a command's main process: the one of its processes
that was started from outside; 3 when it is gone."""

GROUPS = (
    _LOOK
    + """
for p in /proc/[0-9]*; do
  look "$p"
  case $state in ''|[ZXx]) ;; *) echo "$marks" ;; esac
done
"""
)
"""Prints the groups of every process that is alive."""


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """The name that one command runs under, in one container."""

    number: int

    @property
    def user(self) -> str:
        """What the engine is told to run it as."""
        return f"{_NAME}{self.number}"

    @property
    def gid(self) -> str:
        """The group that every process of the command has."""
        return str(_FIRST_GID + self.number)


class Marks:
    """The names of one container."""

    def __init__(self) -> None:
        self._free = deque(Mark(number) for number in range(COUNT))
        self._running: set[Mark] = set()
        self._spent: set[Mark] = set()

    def take(self) -> Mark | None:
        """A name that no process has; None if `renew` has to find some first."""
        if not self._free:
            return None
        mark = self._free.popleft()
        self._running.add(mark)
        return mark

    def give_back(self, mark: Mark, *, empty: bool) -> None:
        """The command has ended; `empty`: for certain with all its processes."""
        if mark not in self._running:  # of a container that was left
            return
        self._running.discard(mark)
        if empty:
            self._free.append(mark)
        else:
            self._spent.add(mark)

    def renew(self, groups: Iterable[str]) -> None:
        """Free the names whose groups are not among those of the living processes."""
        alive = frozenset(groups)
        for mark in [mark for mark in self._spent if mark.gid not in alive]:
            self._spent.discard(mark)
            self._free.append(mark)
