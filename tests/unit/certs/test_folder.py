"""The folder of certificates: rights, renewal, authorities in turn, and crashes at every step."""

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import Result
from cryptography import x509
from typer.testing import CliRunner

from regreen.certs.folder import CertFolder
from regreen.certs.local import AUTHORITY_LIFE, LEAF_LIFE, prepare, renew_due
from regreen.cli.main import make_app
from regreen.rpc.certificates import Tls, Watched
from regreen.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

DAY = timedelta(days=1)
NOW = datetime.now(UTC)


@pytest.fixture
def folder(tmp_path) -> CertFolder:
    made = CertFolder(tmp_path / "certs")
    made.init(100 * DAY, NOW)
    return made


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_their_owners_alone(folder):
    before = os.umask(0)
    try:
        folder.issue("dataset", ["dataset", "127.0.0.1"], 2 * DAY, NOW)
    finally:
        os.umask(before)
    assert mode(folder.path / "dataset" / "tls.key") == 0o600
    assert mode(folder.path / "authority" / "tls.key") == 0o600
    assert mode(folder.path / "authority") == 0o700
    assert mode(folder.path / "dataset" / "ca.crt") == 0o644


def test_certificates_say_whose_they_are_and_how_long(folder):
    served = folder.issue("dataset", ["dataset", "10.0.0.7", "::1"], 2 * DAY, NOW)
    caller = folder.issue("client", [], 200 * DAY, NOW)
    assert served.hosts == ["dataset", "10.0.0.7", "::1"]
    assert caller.hosts == []
    uses = x509.oid.ExtendedKeyUsageOID
    for entry, expected in (
        (served, [uses.SERVER_AUTH, uses.CLIENT_AUTH]),
        (caller, [uses.CLIENT_AUTH]),
    ):
        found = entry.cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(found) == expected
    assert abs(served.end - NOW - 2 * DAY) < timedelta(seconds=2)
    assert caller.end == folder.authorities()[0].not_valid_after_utc, "no longer than its authority"
    assert [entry.name for entry in folder.entries()] == ["client", "dataset"]


def test_what_is_due_is_renewed_with_its_hosts_and_another_key(folder):
    folder.issue("dataset", ["dataset", "db.example"], 3 * DAY, NOW)
    key = (folder.path / "dataset" / "tls.key").read_bytes()
    assert folder.renew([], 3 * DAY, NOW + DAY) == []
    (renewed,) = folder.renew([], 3 * DAY, NOW + 2.5 * DAY)
    assert renewed.hosts == ["dataset", "db.example"]
    assert (folder.path / "dataset" / "tls.key").read_bytes() != key
    assert folder.renew(["dataset"], 3 * DAY, NOW)[0].name == "dataset"
    Watched(Tls.of(folder.path / "dataset"))


def test_authorities_take_turns(folder):
    folder.issue("dataset", ["dataset"], 2 * DAY, NOW)
    with pytest.raises(FailedPrecondition, match="only one authority"):
        folder.retire()
    folder.renew_authority(100 * DAY, NOW)
    trusted = x509.load_pem_x509_certificates((folder.path / "dataset" / "ca.crt").read_bytes())
    assert trusted == folder.authorities()
    assert len(trusted) == 2
    with pytest.raises(FailedPrecondition, match=r"still of the former authority: dataset; `regr"):
        folder.retire()
    with pytest.raises(FailedPrecondition, match="two authorities are trusted already"):
        folder.renew_authority(100 * DAY, NOW)
    assert [entry.name for entry in folder.renew([], 2 * DAY, NOW)] == ["dataset"]
    folder.retire()
    trusted = x509.load_pem_x509_certificates((folder.path / "dataset" / "ca.crt").read_bytes())
    assert trusted == folder.authorities()
    assert len(trusted) == 1


def test_wrong_calls_name_what_to_do(folder, tmp_path):
    with pytest.raises(AlreadyExists, match="renew --ca"):
        folder.init(DAY, NOW)
    for name in ("", "authority", "../up", ".hidden", "a/b", "x" * 64):
        with pytest.raises(InvalidArgument, match=r"name: .*give letters"):
            folder.issue(name, [], DAY, NOW)
    with pytest.raises(InvalidArgument, match="host: 'dätaset' is no name"):
        folder.issue("dataset", ["dätaset"], DAY, NOW)
    folder.issue("client", [], DAY, NOW)
    with pytest.raises(NotFound, match="no certificate 'policy'; there are client"):
        folder.renew(["policy"], DAY, NOW)
    with pytest.raises(InvalidArgument, match="authority: it has ended"):
        folder.issue("client", [], DAY, NOW + 101 * DAY)
    for work in (CertFolder(tmp_path).entries, CertFolder(tmp_path).retire):
        with pytest.raises(NotFound, match="`regreen certs init` makes one"):
            work()


_CRASH = """
import os, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from regreen.certs.folder import CertFolder
from regreen.cli.main import make_app
from regreen.rpc.certificates import Tls, Watched

folder, day, now = CertFolder(Path(sys.argv[1])), timedelta(days=1), datetime.now(UTC)
folder.init(9 * day, now)
folder.issue("dataset", ["dataset"], day, now)
steps = {
    "issue": lambda: folder.issue("policy", ["policy"], day, now),
    "renew": lambda: folder.renew(["dataset"], day, now),
    "authority": lambda: folder.renew_authority(9 * day, now),
    "again": lambda: folder.renew([], day, now),
    "retire": folder.retire,
}
EVENTS = ("open", "os.mkdir", "os.chmod", "os.symlink", "os.rename", "os.remove", "os.rmdir")
crashes = 0

def crash_at(number):
    left = number
    def hook(event, args):
        nonlocal left
        if event in EVENTS:
            left -= 1
            if not left:
                os._exit(9)
    sys.addaudithook(hook)

for name, step in steps.items():
    number = 0
    while True:
        number += 1
        pid = os.fork()
        if not pid:
            crash_at(number)
            try:
                step()
            except Exception:  # the step was done by one that crashed after it
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for entry in folder.entries():
            Watched(Tls.of(folder.path / entry.name))
        assert len(folder.authorities()) in (1, 2)
        if code != 9:
            break
        crashes += 1
left = sorted(path.name for path in folder.path.iterdir() if not path.is_symlink())
print(crashes, *left)
"""


def test_a_crash_at_any_step_leaves_everything_whole_or_absent(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _CRASH, str(tmp_path / "certs")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    crashes, *left = done.stdout.split()
    assert int(crashes) > 60
    names = [name for name in left if name != ".lock"]
    assert len(names) == 3, f"one folder each of authority, dataset and policy: {names}"


def test_a_stacks_certificates_make_and_renew_themselves(tmp_path, monkeypatch):
    path = tmp_path / "certs"
    prepare(path, ["dataset", "judge"])
    assert [entry.name for entry in CertFolder(path).entries()] == ["client", "dataset", "judge"]
    assert renew_due(path) == []
    prepare(path, ["dataset", "judge", "policy"])
    assert len(CertFolder(path).entries()) == 4

    old = CertFolder(tmp_path / "old")
    began = NOW - AUTHORITY_LIFE + 1.5 * LEAF_LIFE
    old.init(AUTHORITY_LIFE, began)
    old.issue("client", [], LEAF_LIFE, NOW)
    assert renew_due(old.path) == ["authority"]
    assert len(old.authorities()) == 2
    assert renew_due(old.path) == ["client"]
    assert renew_due(old.path) == ["authority"]
    assert len(old.authorities()) == 1
    assert renew_due(old.path) == []


def cli(*words: str) -> Result:
    return CliRunner().invoke(make_app(["certs"]), ["certs", *words])


def test_the_commands_show_what_they_made(tmp_path):
    place = ["--dir", str(tmp_path / "c"), "--json"]
    assert cli("init", *place).exit_code == 0
    made = cli("issue", "policy", "--host", "policy.example", *place)
    row = json.loads(made.stdout)
    assert (row["kind"], row["state"]) == ("service", "holds")
    assert row["hosts"] == ["policy", "localhost", "127.0.0.1", "::1", "policy.example"]
    assert cli("issue", "me", "--client", "--days", "0.1", *place).exit_code == 0
    shown = cli("show", *place)
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("authority", "authority"),
        ("me", "client"),
        ("policy", "service"),
    ]
    assert cli("renew", "--ca", *place).exit_code == 0
    refused = cli("retire", *place)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "still of the former authority: me, policy" in refused.stderr
    assert len(cli("renew", *place).stdout.splitlines()) == 2
    assert cli("retire", *place).exit_code == 0
    assert cli("issue", "x", "--client", "--host", "h", *place).exit_code == 2
    CertFolder(tmp_path / "c").issue("me", [], DAY, NOW - 3 * DAY)
    ended = cli("show", *place)
    assert ended.exit_code == 1
    assert '"state": "ended"' in ended.stdout


def test_a_renewal_says_that_nothing_is_due(tmp_path):
    place = ["--dir", str(tmp_path / "c")]
    cli("init", *place)
    assert "there are no certificates yet" in cli("renew", *place).stdout
    cli("issue", "me", "--client", "--days", "9", *place)
    cli("issue", "policy", *place)
    assert cli("renew", *place).stdout == "nothing is due; me ends first, in 9.0 days\n"
    assert cli("renew", *place, "--json").stdout == ""
