"""How many episodes a fleet can run at a time: a closed queueing network, simulated by events.

- Pure: figures in, figures out; the seed is an argument, and the same seed gives the same run.
- A station is a program, the engine, or the sandboxes' own processes. What an episode asks of one
  is processor time (of the engine: time), drawn exponentially around its mean.
- A visit needs a server of its station, and then a core; a long one gives its core up now and then,
  as under an operating system, so that a call does not wait for a whole build.
- Demands are fitted to the sweep over turns of a load run (`fit`); its sweep over episodes at a
  time is left to be predicted (`compare`).
"""

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PROGRAMS = ("driver", "dataset", "postgres", "sandbox", "policy", "judge", "builds")
"""Stations that take processor time; `builds` is what the sandbox service starts."""
ENGINE = "engine"
_TURN = ("driver", "policy", ENGINE, "driver", "sandbox", "builds", "dataset", "postgres", "judge")
_EDGE = ("driver", "dataset", "postgres", "sandbox", "builds", "policy", "judge")
_MANY = ("postgres", "builds")
"""Stations of many processes: their servers are as many as there are cores."""
_QUANTUM_S = 0.02
_FULL = 0.9
"""Share of its time from which on a station is full."""
_AIM = 0.7
"""Share of its time that a station is to be busy where its number is chosen."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What an episode asks for, in seconds of a free core; waits are no work of anybody."""

    turns: int
    turn_s: Mapping[str, float]
    """Of each turn, by station."""
    episode_s: Mapping[str, float]
    """Of the rest of an episode, by station."""
    engine_s: float
    """Time of one output."""
    turn_wait_s: float = 0.0
    episode_wait_s: float = 0.0

    def of(self, station: str) -> float:
        """Seconds that a whole episode asks of a station."""
        if station == ENGINE:
            return self.turns * self.engine_s
        return self.turns * self.turn_s.get(station, 0.0) + self.episode_s.get(station, 0.0)

    @property
    def cores_s(self) -> float:
        """Processor seconds of a whole episode."""
        return sum(self.of(name) for name in PROGRAMS)

    @property
    def alone_s(self) -> float:
        """How long an episode takes where it waits for nobody."""
        waits = self.turns * self.turn_wait_s + self.episode_wait_s
        return self.cores_s + self.of(ENGINE) + waits


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the episodes run on."""

    cores: int
    """Of all processes together."""
    replicas: Mapping[str, int] = field(default_factory=dict)
    """Processes of a station, each of which fills at most one core; 1 where none is named."""
    samples: int = 0
    """Outputs that the engine makes at a time without being slower; 0 has no bound."""
    others: float = 0.0
    """Cores that somebody else keeps busy."""

    def servers(self, station: str) -> int:
        """How many visits a station serves at a time; 0 has no bound."""
        if station == ENGINE:
            return self.samples
        return self.cores if station in _MANY else self.replicas.get(station, 1)

    @property
    def pace(self) -> float:
        """How much of a core a process gets."""
        return max(0.1, (self.cores - self.others) / self.cores)


@dataclass(frozen=True, slots=True)
class Found:
    """What a simulated fleet did."""

    at_once: int
    episodes_per_s: float
    episode_s: Mapping[str, float]
    """Time of an episode: mean, p50, p95."""
    busy: Mapping[str, float]
    """Share of their time that a station's servers worked; `cores` is the machine. One whose job
    waits for a core is not free, and does not work."""

    @property
    def bottleneck(self) -> str:
        """The fullest station, cores first; empty where none is full."""
        if self.busy["cores"] >= _FULL:
            return "cores"
        name = max(self.busy, key=lambda one: self.busy[one])
        return name if self.busy[name] >= _FULL else ""


class _Pool:
    """Servers, who waits for one in order of coming, and how long they were held."""

    __slots__ = ("_free", "held_s", "waiting")

    def __init__(self, servers: int) -> None:
        self._free = servers or 1 << 60
        self.waiting: deque[int] = deque()
        self.held_s = 0.0

    def take(self, job: int) -> bool:
        """Take a server, or wait for one."""
        if self._free:
            self._free -= 1
            return True
        self.waiting.append(job)
        return False

    def give(self) -> int:
        """Give a server back; who gets it, -1 for nobody."""
        if self.waiting:
            return self.waiting.popleft()
        self._free += 1
        return -1


class _Run:
    """One simulation. A job is a slot of the driver: when its episode ends the next one begins."""

    def __init__(self, demand: Demand, fleet: Fleet, slots: int, begin: int, seed: int) -> None:
        """`begin` is how many episodes are begun in all."""
        self._rng, self._pace = random.Random(seed), fleet.pace
        self._steps = _steps(demand)
        self._pools = {n: _Pool(fleet.servers(n)) for n in (*PROGRAMS, ENGINE)}
        self._cores = _Pool(fleet.cores)
        self._slots, self._left = slots, begin
        self._step, self._due_s, self._begun_s = [0] * slots, [0.0] * slots, [0.0] * slots
        self._events: list[tuple[float, int, int]] = []
        self._number = 0
        self._now_s = self._from_s = 0.0
        self.ended: list[tuple[float, float]] = []
        """When each episode ended, and how long it took."""

    def go(self, spread_s: float, until: int, warm: int = 0) -> None:
        """Begin within `spread_s`, and go on until so many episodes have ended.

        How busy servers are counts from when `warm` of them have.
        """
        first = min(self._slots, self._left)
        self._left -= first
        for job in range(first):
            start_s = self._rng.random() * spread_s
            self._step[job] = -1
            self._at(start_s, job)
        while len(self.ended) < until:
            self._now_s, _, job = heapq.heappop(self._events)
            self._woken(job)
            if warm and len(self.ended) >= warm:
                warm, self._from_s = 0, self._now_s
                for pool in (self._cores, *self._pools.values()):
                    pool.held_s = 0.0

    def busy(self, fleet: Fleet) -> dict[str, float]:
        """Share of their time that servers worked."""
        took_s = self._now_s - self._from_s
        found = {"cores": self._cores.held_s / fleet.cores / took_s}
        for name, pool in self._pools.items():
            if servers := fleet.servers(name):
                found[name] = pool.held_s / servers / took_s
        return found

    def _at(self, when_s: float, job: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (when_s, self._number, job))

    def _woken(self, job: int) -> None:
        """A wait, an output, or a turn on a core is over."""
        step = self._step[job]
        name = self._steps[step][0] if step >= 0 else ""
        if name in PROGRAMS:
            if (other := self._cores.give()) >= 0:
                self._on_core(other)
            if self._due_s[job] > 0:  # it keeps its server and waits for a core again
                if self._cores.take(job):
                    self._on_core(job)
                return
        if pool := self._pools.get(name):
            pool.held_s += self._steps[step][1] if name == ENGINE else 0.0
            if (other := pool.give()) >= 0:
                self._served(other)
        self._next(job)

    def _next(self, job: int) -> None:
        self._step[job] += 1
        if self._step[job] == len(self._steps):
            self.ended.append((self._now_s, self._now_s - self._begun_s[job]))
            if not self._left:
                return
            self._left -= 1
            self._step[job] = 0
        if self._step[job] == 0:
            self._begun_s[job] = self._now_s
        name, mean_s = self._steps[self._step[job]]
        if name not in self._pools:
            self._at(self._now_s + mean_s, job)
        elif self._pools[name].take(job):
            self._served(job)

    def _served(self, job: int) -> None:
        """It has a server of its station."""
        name, mean_s = self._steps[self._step[job]]
        if name == ENGINE:
            self._at(self._now_s + mean_s, job)
            return
        self._due_s[job] = self._rng.expovariate(1.0) * mean_s / self._pace
        if self._cores.take(job):
            self._on_core(job)

    def _on_core(self, job: int) -> None:
        spent_s = min(_QUANTUM_S, self._due_s[job])
        self._due_s[job] -= spent_s
        self._cores.held_s += spent_s
        self._pools[self._steps[self._step[job]][0]].held_s += spent_s
        self._at(self._now_s + spent_s, job)


def _steps(demand: Demand) -> list[tuple[str, float]]:
    """The visits of an episode in order, those that ask for nothing left out."""
    half = [(name, demand.episode_s.get(name, 0.0) / 2) for name in _EDGE]
    turn = [
        (
            name,
            demand.engine_s if name == ENGINE else demand.turn_s.get(name, 0.0) / _TURN.count(name),
        )
        for name in _TURN
    ]
    wait, around = ("", demand.turn_wait_s), ("", demand.episode_wait_s / 2)
    every = [*half, around, *([*turn, wait] * demand.turns), *half, around]
    return [step for step in every if step[1] > 0]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that at least this share does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def simulate(demand: Demand, fleet: Fleet, at_once: int, episodes: int = 0, seed: int = 0) -> Found:
    """So many episodes at a time on a fleet.

    With `episodes` so many are run, the first ones begin together, and all count: a measurement.
    Without, the fleet has run for long: as many as run at a time have ended before any counts.
    """
    begin, until = (episodes, episodes) if episodes else (1 << 60, 2 * at_once)
    run = _Run(demand, fleet, at_once, begin, seed)
    run.go(0.0 if episodes else demand.alone_s, until, 0 if episodes else at_once)
    counted = run.ended if episodes else run.ended[at_once:]
    begin_s = 0.0 if episodes else run.ended[at_once - 1][0]
    times = sorted(took for _, took in counted)
    shown = {"mean": statistics.fmean(times)}
    shown |= {f"p{p}": quantile(times, p / 100) for p in (50, 95)}
    took_s = counted[-1][0] - begin_s
    return Found(at_once, len(counted) / took_s, shown, run.busy(fleet))


def first_full(demand: Demand, fleet: Fleet) -> tuple[str, float]:
    """What is full first as episodes at a time grow, and at about how many (asymptotic bound)."""
    asked = {"cores": (demand.cores_s, float(fleet.cores))}
    for name in PROGRAMS:
        asked[name] = demand.of(name), float(fleet.servers(name))
    if fleet.samples:
        asked[ENGINE] = demand.of(ENGINE), fleet.samples / fleet.pace
    rates = {n: fleet.pace * servers / s for n, (s, servers) in asked.items() if s > 0}
    name = min(rates, key=lambda one: (rates[one], one != "cores"))
    return name, rates[name] * demand.alone_s


def needed(demand: Demand, at_once: int) -> dict[str, int]:
    """Cores, outputs at a time and processes that so many episodes at a time ask for."""
    rate = at_once / demand.alone_s / _AIM
    found = {"cores": rate * demand.cores_s, "samples": rate * demand.of(ENGINE)}
    found |= {name: rate * demand.of(name) for name in PROGRAMS if name not in _MANY}
    return {name: max(1, math.ceil(value)) for name, value in found.items()}


def fleet_for(demand: Demand, at_once: int) -> Fleet:
    """The smallest fleet in which nothing is full at so many episodes at a time."""
    found = needed(demand, at_once)
    cores, samples = found.pop("cores"), found.pop("samples")
    return Fleet(cores, found, samples)
