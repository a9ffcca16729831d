"""`regreen state` as a user runs it, against a service of its own."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.exec import ExecClient
from tests.integration.sandbox import images as made
from tests.integration.sandbox.overlay import prepared

_ROOT = Path(__file__).parents[3]


@pytest.fixture
def cli(service, tmp_path):
    """Runs `regreen` on a home that names the service."""
    run = tmp_path / "stack/run"
    run.mkdir(parents=True)
    found = {"endpoints": {"sandbox": service[2].address}}
    (run / "stack.json").write_text(json.dumps(found))

    async def call(*words: str) -> subprocess.CompletedProcess:
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", "from regreen.cli.main import main; main()", *words],
            env={**os.environ, "PYTHONPATH": str(_ROOT), "REGREEN_HOME": str(tmp_path / "stack")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


async def test_images_directories_and_states_come_and_go(service, cli, tmp_path):
    states, sandboxes, _ = service
    two = made.layout()
    system = made.system()
    for name in ("work:1", "work:2"):
        two.add([system, made.files(name=name.encode())], name=name)
    archive = tmp_path / "image.tar"
    archive.write_bytes(made.gzipped(two.tar()))
    refused = await cli("state", "import", str(archive))
    assert refused.returncode == 2
    assert "name one: work:1, work:2" in refused.stderr
    done = await cli("state", "import", str(archive), "--reference", "work:2", "--json")
    assert done.returncode == 0, done.stderr
    assert "send" in done.stderr
    image = json.loads(done.stdout)["state"]
    box = await sandboxes.create_sandbox(image["id"])
    assert (await sandboxes.run(box.id, ["cat", "/name"])).stdout.head == b"work:2"

    root = tmp_path / "root"
    with tarfile.open(archive) as layout:
        layout.extractall(root, filter="tar")
    again = await cli("state", "import", str(root), "--reference", "work:2")
    assert again.stdout.strip() == image["id"]

    out = tmp_path / "out.tar"
    done = await cli("state", "export", image["id"], str(out), "--reference", "work:3", "--json")
    assert json.loads(done.stdout) == {
        "file": str(out),
        "kind": "image",
        "size_bytes": out.stat().st_size,
    }
    back = await cli("state", "import", str(out), "--json")
    assert json.loads(back.stdout)["state"]["labels"]["image.reference"].endswith("work:3")

    plain = await prepared(states, a="1")
    done = await cli("state", "export", plain.id, str(out), "--force")
    assert "state archive" in done.stdout, done.stderr
    await states.delete_state(plain.id)
    assert (await cli("state", "import", str(out))).stdout.strip() == plain.id
    listed = await cli("state", "list", "--json")
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert {row["id"]: row["base"] for row in rows}[plain.id] == "host"
    assert image["id"] in (await cli("state", "list")).stdout


async def test_a_directory_is_judged_before_it_is_sent_and_told_what_it_lost(cli, tmp_path):
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/name").write_text("x")
    os.mkfifo(root / "pipe")
    refused = await cli("state", "import", str(root), "--reference", "a:1")
    assert refused.returncode == 2
    assert "reference: names an image" in refused.stderr
    assert "send" not in refused.stderr
    done = await cli("state", "import", str(root), "--json")
    (note,) = json.loads(done.stdout)["notes"]
    assert note == "1 devices or pipes are left out, for example pipe"
    assert "send (0 s)  512 bytes" in done.stderr


async def test_an_export_replaces_nothing_unasked(service, cli, tmp_path):
    """A place that is no regular file is written to; as root a device would be gone else."""
    states, _, _ = service
    plain = await prepared(states, a="1")
    archive = b"".join([chunk async for chunk in states.export_state(plain.id)])
    pipe, there, link = (tmp_path / name for name in ("pipe", "there", "link"))
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    done = await cli("state", "export", plain.id, str(pipe))
    assert done.returncode == 0, done.stderr
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert os.read(reading, len(archive) + 1) == archive
    os.close(reading)

    there.write_text("mine")
    link.symlink_to("there")
    for target in (there, link):
        refused = await cli("state", "export", plain.id, str(target))
        assert (refused.returncode, there.read_text()) == (2, "mine")
        assert "is there already; name another, or give --force" in refused.stderr
    assert "is a directory" in (await cli("state", "export", plain.id, str(tmp_path))).stderr
    done = await cli("state", "export", plain.id, str(link), "--force")
    assert done.returncode == 0, done.stderr
    assert (link.is_symlink(), there.read_bytes()) == (True, archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "home", "link", "pipe", "s", "stack", "there",
    ]  # fmt: skip


async def test_a_device_is_no_source(cli):
    refused = await cli("state", "import", "/dev/zero")
    assert refused.returncode == 2, refused.stderr
    assert "/dev/zero is a device; give a file or a directory" in refused.stderr


async def test_what_cannot_be_read_or_found_is_named(service, cli, tmp_path):
    states, _, _ = service
    plain = await prepared(states, a="1")
    (tmp_path / "text").write_text("no archive")
    for words, code, said in (
        (["import", str(tmp_path / "absent")], 2, "absent is not there"),
        (["import", str(tmp_path / "text")], 2, "archive"),
        (["export", "st_" + "0" * 32, str(tmp_path / "x")], 1, "no such state"),
        (["show", "st_" + "0" * 32], 1, "no such state"),
        (["tree", "st_" + "0" * 32], 1, "no such state"),
        (["delete", "st_" + "0" * 32], 1, "no such state"),
        (["delete", "x"], 2, "id"),
        (["list", "--address", "127.0.0.1:1"], 3, "127.0.0.1:1"),
        (["list", "--address", "garbage"], 2, "--address: 'garbage' is no address; give host:port"),
        (["export", plain.id, str(tmp_path / "no/x")], 2, "cannot be written"),
        (["export", plain.id, str(tmp_path / "x"), "--reference", "a:1"], 2, "reference"),
    ):
        done = await cli("state", *words)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "s", "stack", "text"]


async def test_a_state_shows_all_that_is_known_of_it(service, cli):
    states, sandboxes, server = service
    root = await prepared(states, a="1")
    box = await sandboxes.create_sandbox(root.id, labels={"for": "a test"})
    line = []
    for turn in range(3):
        await sandboxes.write_file(box.id, f"/work/repo/{turn}", b"x" * 5000)
        line.append(await sandboxes.snapshot_sandbox(box.id, labels={"turn": str(turn)}))
    first, second, third = line
    held = await cli("state", "delete", root.id)
    assert (held.returncode, "sandboxes run on state" in held.stderr) == (1, True), held.stderr
    gone = await cli("state", "delete", second.id, "--json")
    assert json.loads(gone.stdout) == {"deleted": second.id}

    found = json.loads((await cli("state", "show", third.id, "--json")).stdout)
    above = [(one["id"], one["deleted"]) for one in found["ancestors"]]
    assert above == [(root.id, False), (first.id, False), (second.id, True)]
    assert (found["state"]["base"], found["sandboxes"]) == ("host", [])
    assert int(found["state"]["size_bytes"]) == third.size_bytes >= 5000
    assert found["valid_on"] == f"hosts like {third.host}"
    assert found["children"] == []
    shown = (await cli("state", "show", first.id, "--address", server.address)).stdout
    top = json.loads((await cli("state", "show", root.id, "--json")).stdout)
    assert [child["id"] for child in top["children"]] == [first.id]
    assert top["sandboxes"] == [box.id]
    for said in (first.id, f"2: {' '.join(first.layers)}", first.host, "turn=0", "made from"):
        assert said in shown
    assert "children" not in shown  # the one that it had is deleted

    tree = (await cli("state", "tree")).stdout.splitlines()
    assert [row.split()[0] for row in tree] == [root.id, first.id, second.id, third.id]
    assert [len(row) - len(row.lstrip()) for row in tree] == [0, 2, 4, 6]
    assert tree[2] == f"    {second.id}  deleted"
    below = (await cli("state", "tree", first.id, "--json")).stdout.splitlines()
    told = [json.loads(row) for row in below]
    assert [(row["depth"], row["id"], row["deleted"]) for row in told] == [
        (0, first.id, False),
        (1, second.id, True),
        (2, third.id, False),
    ]
    assert told[1] == {"depth": 1, "id": second.id, "parent_id": first.id, "deleted": True}
    assert (await cli("state", "tree", second.id)).stdout.splitlines() == [
        f"{second.id}  deleted",
        tree[3][4:],
    ]

    listed = await cli("sandbox", "list", "--label", "for=a test", "--json")
    assert json.loads(listed.stdout)["id"] == box.id
    assert (await cli("sandbox", "list", "--label", "for=another", "--json")).stdout == ""
    assert box.id in (await cli("sandbox", "show", box.id)).stdout
    assert (await cli("sandbox", "delete", box.id)).stdout == f"deleted {box.id}\n"
    assert (await cli("state", "delete", root.id)).returncode == 0
    await states.delete_state(first.id)
    assert [one.id for one in (await states.list_states()).states] == [third.id]
    tree = (await cli("state", "tree")).stdout.splitlines()
    gone = (root.id, first.id, second.id)
    assert tree[:3] == [f"{'  ' * depth}{id}  deleted" for depth, id in enumerate(gone)]
    assert tree[3].startswith(f"      {third.id}  2")


async def test_an_image_names_its_configuration_and_platform(service, cli, tmp_path):
    archive = tmp_path / "image.tar"
    archive.write_bytes(made.docker_save(made.system()))
    image = (await cli("state", "import", str(archive))).stdout.strip()
    found = json.loads((await cli("state", "show", image, "--json")).stdout)
    assert found["state"]["base"].startswith("image:sha256:")
    assert found["valid_on"].startswith("every host of linux/")
    assert found["ancestors"] == []


async def test_a_running_command_is_shown(service, cli):
    states, sandboxes, server = service
    box = await sandboxes.create_sandbox((await prepared(states, a="1")).id)
    async with connect(server.address) as channel:
        execs = ExecClient(channel)
        slow = await execs.start_exec(box.id, ["sleep", "600"])
        assert "sleep 600" in (await cli("sandbox", "show", box.id)).stdout
        await execs.signal_exec(box.id, slow.id, 15)
        assert [event async for event in execs.follow_exec(box.id, slow.id)][-1].ended.signal == 15
    found = json.loads((await cli("sandbox", "show", box.id, "--json")).stdout)
    assert found["executions"][0]["result"]["signal"] == 15
    assert "signal 15" in (await cli("sandbox", "show", box.id)).stdout


async def test_the_example(service, tmp_path):
    source, target = tmp_path / "source.tar", tmp_path / "target.tar"
    source.write_bytes(made.docker_save(made.system()))
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "examples/sandbox_image.py", service[2].address, source, target],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith("image:sha256:"), done.stderr
    assert f"exit 0 saved {target.stat().st_size} bytes" in done.stdout
    with tarfile.open(target) as archive:
        assert "manifest.json" in archive.getnames()
