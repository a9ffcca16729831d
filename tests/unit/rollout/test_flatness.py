"""Memory of processes that are killed all the time: a leak is seen within their lives."""

import random

import pytest

from tests.load.episodes import KINDS, SERVICES, SPARED, Size, growth


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
