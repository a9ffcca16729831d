"""Memory of processes that are killed all the time: a leak is seen within their lives."""

import random
import subprocess
import sys

import pytest

from tests.load.episodes import KINDS, SERVICES, SPARED, WEIGHED, Plan
from tests.load.memory import Size, Steady, growth, own_bytes, steady


def lives(
    leak_bytes_per_s: float, seed: int = 0, *, within_s: tuple[float, float] = (30, 90)
) -> list[Size]:
    """Half an hour of one process after another, each killed after a while."""
    rng, found, left_s, born = random.Random(seed), list[Size](), 1800.0, 0
    while left_s > 0:
        life_s = rng.uniform(*within_s)
        base = 140e6 + rng.uniform(-3e6, 3e6)
        found += [
            (born, float(age), int(base + leak_bytes_per_s * age + rng.gauss(0, 3e5)))
            for age in range(int(life_s))
        ]
        left_s, born = left_s - life_s, born + 1
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_seen_though_no_process_lives_long(seed: int) -> None:
    found = growth(lives(1e6, seed))
    assert found.bytes_per_s == pytest.approx(1e6, rel=0.01)
    assert not found.flat


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_leak_is_seen_in_a_process_that_is_spared(seed: int) -> None:
    bytes_per_s = 200e6 / 3600
    assert growth(lives(bytes_per_s, seed)).flat
    assert not growth(lives(bytes_per_s, seed, within_s=(590, 610))).flat


def test_every_weighed_kind_is_spared_for_a_third_and_killed_in_the_others() -> None:
    spared = [kind for kinds in SPARED for kind in kinds]
    assert len(set(spared)) == len(spared)
    assert {*SERVICES, "driver", "spawner"} == {*spared} < {*KINDS}


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_starts_of_different_size_are_no_leak(seed: int) -> None:
    assert growth(lives(0.0, seed)).flat


def test_young_processes_and_a_few_samples_say_nothing() -> None:
    assert growth([(1, float(age), age * 10**6) for age in range(20)]).mean_bytes == 0
    assert growth([(1, 25.0, 10**9)] * 5).flat


def life(
    bytes_per_hour: float, seed: int, *, seconds: int = 1800, start: float = 0.0
) -> list[Size]:
    """One process that lives throughout: it fills up at first, then goes up and down, and leaks."""
    rng, found, extra = random.Random(seed), list[Size](), 0.0
    for age in range(seconds):
        extra = 0.98 * extra + rng.gauss(0, 1.5e5)  # what an allocator keeps, and gives back
        filled = start * (1 - 2.718 ** (-age / 120))
        size = 140e6 + filled + extra + bytes_per_hour * age / 3600
        found.append((1, float(age), int(size)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_what_is_spared_throughout_shows_a_leak_that_others_hide(seed: int) -> None:
    slow = life(20e6, seed)
    assert growth(slow).flat
    assert not steady(slow).flat
    assert steady(life(20e6, seed, seconds=360)).flat  # too slow for six minutes, which is said
    assert steady(slow).seen_bytes_per_s * 3600 == pytest.approx(12e6, rel=0.01)
    assert not steady(life(5e6, seed, seconds=7200)).flat


@pytest.mark.parametrize("seed", range(5))
def test_what_has_many_processes_may_rise_by_a_share_of_its_size(seed: int) -> None:
    assert steady(life(40e6, seed), 1 / 8).flat
    assert not steady(life(100e6, seed), 1 / 8).flat


@pytest.mark.parametrize("seed", range(5))
def test_what_fills_up_at_first_is_no_leak(seed: int) -> None:
    assert steady(life(0.0, seed, start=40e6)).flat


def test_what_did_not_live_throughout_says_nothing() -> None:
    halves = [*life(0.0, 1, seconds=900), *((2, age, n) for _, age, n in life(0.0, 2, seconds=900))]
    for sizes in ([], life(0.0, 1, seconds=15), halves):
        assert steady(sizes) == Steady()
        assert not steady(sizes).flat


def test_each_kind_is_spared_throughout_by_some_seed() -> None:
    assert {Plan(seed=seed).spared[0] for seed in range(len(WEIGHED))} == {*WEIGHED} < {*KINDS}
    assert Plan(spare="spawner").spared == ("spawner", "sandbox")
    assert Plan(spare="postgres").spared == ("postgres", "dataset")


def test_what_processes_have_for_themselves_is_weighed_with_their_children() -> None:
    code = (
        "import subprocess, sys; held = bytearray({} << 20); "
        "held[::4096] = b'x' * len(held[::4096]); "
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=0) if sys.argv[1:]"
        " else None; print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code.format(64), code.format(32)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == b"there\n"
        found = own_bytes(process.pid)
        process.communicate()
    assert 96 << 20 < found < 96 << 21
    assert not own_bytes(process.pid)
