"""Probes: each condition changes what a test that looks at it sees, and nothing else."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.conditions import Conditions
from sandbox_svc.validate import Outcome, Validation, ValidationOptions, Validator
from sandbox_svc.warm import WarmPool
from tests.integration.sandbox_build.suite import FIX, Workshop, open_workshop

pytestmark = pytest.mark.asyncio(loop_scope="module")
LOOKS = """
import datetime, email.utils, getpass, os, pickle, platform, pwd, socket, subprocess, sys, time
import pytest

STARTED = datetime.datetime.now()
YEARS = 3 * 365 * 86400
REAL = os.stat(__file__).st_mtime
SEEN = []


def test_first():
    SEEN.append(1)


def test_second():
    assert SEEN == [1]


def test_third():
    SEEN.append(3)


def test_hash():
    assert hash("regreen") == HASH


def test_host():
    names = {socket.gethostname(), os.uname().nodename, platform.node()}
    assert names == {"regreen"}


def test_host_resolves():
    assert socket.gethostbyname(socket.gethostname()).startswith("127.")


def test_user():
    assert getpass.getuser() == pwd.getpwuid(os.getuid()).pw_name == "regreen"


def test_home_is_ones_own():
    home = os.path.expanduser("~")
    assert home == pwd.getpwuid(os.getuid()).pw_dir
    open(os.path.join(home, "mine"), "w").close()


def test_path():
    assert __file__.startswith("/work/repo/")


def test_imports_come_from_beside():
    import greet
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert greet.__file__.startswith(root + os.sep)
    ask = [sys.executable, "-c", "import greet; print(greet.__file__)"]
    told = subprocess.run(ask, cwd="/tmp", stdout=subprocess.PIPE, check=True).stdout
    assert told.decode().strip() == greet.__file__, "where the environment says that it is"


def clocks():
    now = datetime.datetime.now
    yield time.time()
    yield time.time_ns() / 1e9
    yield time.clock_gettime(time.CLOCK_REALTIME)
    yield time.mktime(time.localtime())
    yield time.mktime(time.strptime(time.ctime()))
    yield time.mktime(time.strptime(time.asctime()))
    yield float(time.strftime("%s"))
    yield now().timestamp()
    yield now(datetime.timezone.utc).timestamp()
    yield now(datetime.timezone(datetime.timedelta(hours=5))).timestamp()
    yield datetime.datetime.today().timestamp()
    yield datetime.datetime.combine(datetime.date.today(), now().time()).timestamp()
    yield email.utils.localtime().timestamp()
    yield Stamp.now().timestamp()


class Stamp(datetime.datetime):
    pass


def test_clock():
    assert all(abs(seen - REAL) < YEARS / 2 for seen in clocks())


def test_clocks_agree():
    seen = list(clocks())
    assert max(seen) - min(seen) < 3
    before, started = time.monotonic(), time.time()
    time.sleep(0.01)
    assert 0.01 <= time.monotonic() - before < 5
    assert 0.009 <= time.time() - started < 5


def test_types_are_what_they_were():
    now = datetime.datetime.now()
    assert type(now) is datetime.datetime and type(Stamp.now()) is Stamp
    assert pickle.loads(pickle.dumps(now)) == now
    assert now >= STARTED
    with pytest.raises(TypeError):
        datetime.datetime.now("never")
    assert datetime.datetime.now.__name__ == "now" and time.time.__name__ == "time"
    assert time.gmtime(0).tm_year == 1970 and time.strftime("%Y", time.gmtime(0)) == "1970"


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow")
def test_utcnow():
    assert abs((datetime.datetime.utcnow() - datetime.datetime(1970, 1, 1)).total_seconds()
               - time.time()) < 3
"""
NAMES = {
    "order_seed": "test_second",
    "hash_seed": "test_hash",
    "clock_s": "test_clock",
    "host": "test_host",
    "user": "test_user",
    "repository": "test_path",
}
"""The only test that each condition turns red."""
VALUES: dict[str, object] = {
    "order_seed": 2,
    "hash_seed": 1,
    "clock_s": 3 * 365 * 86_400 + 12 * 3600,
    "host": "otherhost",
    "user": "somebody",
    "repository": "/work/elsewhere/checkout",
}


@dataclass(frozen=True, slots=True)
class World:
    shop: Workshop
    state_id: str
    validator: Validator

    async def judge(self, **conditions: object) -> Validation:
        options = ValidationOptions(conditions=Conditions(**conditions))  # type: ignore[arg-type]
        return await self.validator.validate(self.state_id, [FIX], options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    hashes = "import os, subprocess, sys\nHASH = int(subprocess.run([sys.executable, '-c', "
    hashes += "'print(hash(\"regreen\"))'], env={'PYTHONHASHSEED': '0'}, stdout=subprocess.PIPE)"
    text = f"{hashes}.stdout)\n{LOOKS}"
    async with open_workshop() as shop:
        state = await shop.prepared("looks", {"tests/test_looks.py": text})
        validator = Validator(shop.states, shop.runtime, warm=WarmPool(
            shop.states, shop.runtime, shop.home / "warm"
        ))  # fmt: skip
        yield World(shop, state.id, validator)
        await validator.close()


def red(verdict: Validation) -> set[str]:
    return {t.id.rpartition("::")[2] for t in verdict.tests if t.outcome != "passed"}


async def test_under_the_pinned_conditions_all_pass_and_it_is_no_probe(world: World) -> None:
    verdict = await world.judge()
    assert (verdict.outcome, red(verdict), verdict.probe) == (Outcome.PASSED, set(), False)


@pytest.mark.parametrize("name", list(NAMES))
async def test_a_condition_is_seen_by_who_looks_at_it_alone(world: World, name: str) -> None:
    verdict = await world.judge(**{name: VALUES[name]})
    assert red(verdict) == {NAMES[name]}, verdict.log
    assert verdict.probe
    assert not verdict.unmet
    assert not verdict.cached
    assert (await world.judge(**{name: VALUES[name]})).cached, "equal probes are one"


async def test_all_at_once_are_what_each_is(world: World) -> None:
    verdict = await world.judge(**VALUES)
    assert red(verdict) == set(NAMES.values()), verdict.log


async def test_the_clock_moves_backwards_too(world: World) -> None:
    assert red(await world.judge(clock_s=-3 * 365 * 86_400)) == {"test_clock"}


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("order_seed", -1, "order_seed"),
        ("hash_seed", 1 << 32, "hash_seed"),
        ("clock_s", 1 << 40, "clock_offset"),
        ("host", "a b", "host_name"),
        ("user", "../x", "user_name"),
        ("repository", "/work/repo", "repository"),
        ("repository", "/work/env/x", "repository"),
        ("repository", "/tmp/x", "repository"),
        ("repository", "/work/../etc", "repository"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    world: World, name: str, value: object, field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await world.judge(**{name: value})
    assert refused.value.field == f"conditions.{field}"


async def test_a_part_of_the_tests_is_not_probed(world: World) -> None:
    options = ValidationOptions(conditions=Conditions(order_seed=1), stop_early=True)
    with pytest.raises(InvalidArgument):
        await world.validator.validate(world.state_id, [FIX], options)
