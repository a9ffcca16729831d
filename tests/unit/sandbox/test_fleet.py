"""Parts of a front: ranking, cutting archives, names and pods, names in the blob store."""

import io
import json
import re
import tarfile
import typing

import pytest

from regreen.blobs import Digest, open_blobs
from regreen.rpc.errors import DataLoss, InvalidArgument
from regreen.sandbox import v1 as pb
from sandbox_svc.fleet.archive import Archive, Cutter
from sandbox_svc.fleet.manifests import Plan, slug
from sandbox_svc.fleet.ring import ranked
from sandbox_svc.settings import SandboxSettings


def archive_of(*layers: dict[str, bytes], record: bytes = b"{}") -> bytes:
    """What ExportState gives of a state with these layers."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        entries = [("state.json", record)]
        for number, files in enumerate(layers):
            entries.append((f"layers/{number}", None))
            entries += [(f"layers/{number}/{name}", content) for name, content in files.items()]
        for name, content in [*entries, ("end", b"")]:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            member.pax_headers = {"REGREEN.opaque": "y"} if "opaque" in name else {}
            archive.addfile(member, io.BytesIO(content or b""))
    return target.getvalue()


async def pieces(data: bytes, size: int):
    for start in range(0, len(data), size):
        yield data[start : start + size]


def test_a_key_moves_only_when_its_worker_goes():
    names = [f"worker-{number}" for number in range(5)]
    first = {key: ranked(key, names)[0] for key in map(str, range(500))}
    assert {first[key] for key in first} == set(names)
    assert all(first[key] == ranked(key, reversed(names))[0] for key in first)
    left = [name for name in names if name != "worker-2"]
    moved = [key for key in first if ranked(key, left)[0] != first[key]]
    assert set(moved) == {key for key, name in first.items() if name == "worker-2"}
    assert all(ranked(key, left)[0] == ranked(key, names)[1] for key in moved)


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 4096, 1 << 20])
def test_cutting_changes_no_byte_and_depends_on_no_chunk(size):
    long = "directory-with-a-long-name/" * 6
    data = archive_of({"a": b"x" * 5000, f"{long}file": b"y"}, {"opaque": b"", "layers": b"z"}, {})
    cutter, parts = Cutter(), [b""]
    for start in range(0, len(data), size):
        for begins, piece in cutter.feed(data[start : start + size]):
            if begins:
                parts.append(b"")
            parts[-1] += piece
    assert b"".join(parts) == data
    assert [part[:9].rstrip(b"\0") for part in parts] == [
        *(b"state.jso", b"layers/0/", b"layers/1/", b"layers/2/", b"end"),
    ]


async def test_a_child_shares_its_parents_layers_and_damage_is_noticed(tmp_path):
    blobs = open_blobs(tmp_path / "blobs", fsync=False)
    archive = Archive(blobs, tmp_path / "scratch")
    parent = archive_of({"a": b"a" * 100_000}, record=b'{"of": "parent"}')
    child = archive_of({"a": b"a" * 100_000}, {"b": b"b"}, record=b'{"of": "child"}')
    of_p, of_c = (pb.State(id=name).SerializeToString() for name in ("st_p", "st_c"))
    await archive.store("st_p", of_p, "st_p", pieces(parent, 1000))
    await archive.store("st_c", of_c, "st_p", pieces(child, 999))
    found_p, found_c = await archive.find("st_p"), await archive.find("st_c")
    assert (found_p.state, found_c.state, found_c.key) == (of_p, of_c, "st_p")
    assert found_p.parts[1] == found_c.parts[1]
    assert found_p.parts[1].size_bytes > 100_000
    assert b"".join([chunk async for chunk in archive.read(found_c)]) == child
    assert not list((tmp_path / "scratch").iterdir())
    layer = found_c.parts[1].sha256
    path = tmp_path / "blobs" / layer[:2] / layer
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataLoss):
        [chunk async for chunk in archive.read(found_c)]
    path.unlink()
    with pytest.raises(DataLoss, match="is not stored"):
        [chunk async for chunk in archive.read(found_c)]
    await archive.forget("st_c")
    assert await archive.find("st_c") is None
    assert await archive.find("st_p") is not None
    manifest = await blobs.put(b'{"format": 9}')
    await blobs.name("st_x", manifest)
    with pytest.raises(DataLoss, match="archive of state st_x"):
        await archive.find("st_x")


async def test_content_that_looks_like_headers_makes_no_flood_of_blobs(tmp_path):
    header = tarfile.TarInfo("layers/0")
    header.type = tarfile.DIRTYPE
    data = archive_of({"a": b"a"}) + header.tobuf(tarfile.USTAR_FORMAT) * 3000
    archive = Archive(open_blobs(tmp_path / "blobs", fsync=False), tmp_path / "scratch")
    state = pb.State(id="st_h").SerializeToString()
    await archive.store("st_h", state, "st_h", pieces(data, 1 << 16))
    found = await archive.find("st_h")
    assert len(found.parts) <= 1001
    assert b"".join([chunk async for chunk in archive.read(found)]) == data


async def test_who_names_first_wins_unless_told_to_replace(tmp_path):
    blobs = open_blobs(tmp_path / "blobs", fsync=False)
    one, two = await blobs.put(b"one"), await blobs.put(b"two")
    assert await blobs.named("st_1") is None
    assert await blobs.name("st_1", one) == one
    assert await blobs.name("st_1", two) == one
    assert await blobs.name("st_1", two, replace=True) == two
    assert await blobs.named("st_1") == two
    (tmp_path / "blobs" / "names" / "st_1").write_bytes(b"\xff nonsense")
    assert await blobs.named("st_1") is None
    assert await blobs.name("st_1", one) == one
    await blobs.unname("st_1")
    await blobs.unname("st_1")
    for name in ("", "../x", "a/b", "A", "x" * 200, "n\0"):
        with pytest.raises(InvalidArgument):
            await blobs.name(name, Digest("0" * 64, 1))


@pytest.mark.parametrize(
    "name",
    ["regreen", "Regreen", "a/../b", "ü" * 100, "-", "9lives", "x" * 200, "$(rm -rf)\n", "\0", " "],
)
def test_names_are_labels_whatever_the_front_is_called(name):
    label = slug(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", label)
    assert slug(name + "x") != label
    assert slug("regreen") == "regreen"


def test_a_worker_pod_is_walled_in():
    settings = SandboxSettings(
        kube_runtime_class="gvisor", kube_seccomp="regreen.json", pids=99, egress=False
    )
    plan = Plan(settings)
    pod = plan.pod("w-1", {"uid": "u"})
    spec, container = pod["spec"], pod["spec"]["containers"][0]
    assert spec["hostUsers"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["runtimeClassName"] == "gvisor"
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {
        "type": "Localhost",
        "localhostProfile": "regreen.json",
    }
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
    assert "hostPath" not in json.dumps(pod)
    assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])
    assert {"--pids=99", "--no-egress"} <= set(container["args"])
    assert pod["metadata"]["ownerReferences"] == [{"uid": "u"}]
    default = Plan(SandboxSettings())
    assert default.pod_spec()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert default.digest != plan.digest == Plan(settings).digest


_OF_THE_FRONT = {
    *("listen", "metrics", "home", "insecure", "tls_cert", "tls_key", "tls_ca", "tokens", "quotas"),
    *("audit", "backend", "behind_front", "blobs", "egress_upstream", "max_rpcs"),
}


def _another(name: str, value):
    """A value that is allowed and not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    texts = {
        "log_level": "debug",
        "egress_private": "10.0.0.0/8",
        "egress_hosts": "*.example.org",
        "prepare_hosts": "files.example.org:8443",
    }
    return texts[name]


def test_a_worker_gets_every_setting_but_the_fronts_own(monkeypatch):
    monkeypatch.delenv("REGREEN_CONFIG", raising=False)
    fields = SandboxSettings.model_fields
    theirs = {
        name: _another(name, field.default)
        for name, field in fields.items()
        if name not in _OF_THE_FRONT and not name.startswith(("kube_", "docker_", "fleet_"))
    }
    assert {"egress", "drain_s", "warm_check_share", "state_bytes", "max_executions"} <= set(theirs)
    front = SandboxSettings(**theirs, blobs="s3://bucket/a", kube_name="front", tls_ca=None)
    (container,) = Plan(front).pod_spec()["containers"]
    args = [arg.replace("$(POD_IP)", "127.0.0.1") for arg in container["args"]]
    worker = SandboxSettings.load(args)
    assert {name: getattr(worker, name) for name in theirs} == theirs
    assert worker.max_rpcs > front.max_rpcs
    assert worker.behind_front, "it takes the front's word for whose a call is"
    assert (worker.backend, worker.blobs, worker.kube_name) == (
        *("embedded", "s3://bucket/a"),
        fields["kube_name"].default,
    )


def test_a_worker_bounds_its_states_by_its_disk_and_waits_for_its_calls():
    plan = Plan(SandboxSettings(kube_disk_bytes=10 << 30, drain_s=90.5))
    spec = plan.pod_spec()
    assert f"--state-bytes={5 << 30}" in spec["containers"][0]["args"]
    assert spec["terminationGracePeriodSeconds"] > 91
    told = Plan(SandboxSettings(state_bytes=7)).pod_spec()["containers"][0]["args"]
    assert [arg for arg in told if arg.startswith("--state-bytes")] == ["--state-bytes=7"]


def test_nothing_in_a_setting_is_expanded_and_a_secret_is_only_named():
    plan = Plan(SandboxSettings(blobs="s3://b/$(HOME)", kube_secret="aws"))
    (container,) = plan.pod_spec()["containers"]
    assert "--blobs=s3://b/$$(HOME)" in container["args"]
    assert container["envFrom"] == [{"secretRef": {"name": "aws"}}]


def test_credentials_of_a_bucket_that_names_a_folder_are_files_there_and_no_variables():
    plan = Plan(SandboxSettings(blobs="s3://b/p?secrets=/etc/keys", kube_secret="aws"))
    spec = plan.pod_spec()
    (container,) = spec["containers"]
    assert "envFrom" not in container
    assert {"name": "blobs", "mountPath": "/etc/keys", "readOnly": True} in container[
        "volumeMounts"
    ]
    volume = {"name": "blobs", "secret": {"secretName": "aws", "defaultMode": 0o440}}
    assert volume in spec["volumes"]
    plain = Plan(SandboxSettings(blobs="s3://b/p?secrets=/etc/keys")).pod_spec()
    assert not [v for v in plain["volumes"] if v["name"] == "blobs"]


def test_every_field_of_a_pod_is_one_that_the_client_library_knows():
    core = pytest.importorskip("lightkube.models.core_v1")
    settings = SandboxSettings(
        kube_runtime_class="gvisor", kube_seccomp="a", kube_apparmor="b", kube_secret="c"
    )
    _known(core.Pod, Plan(settings).pod("w-1", {"uid": "u"}), "Pod")


def _known(kind, value, path: str) -> None:
    """Compare names with the typed model, which is made from the API's own description."""
    kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
    if isinstance(value, list):
        for item in value:
            _known(kind, item, f"{path}[]")
    elif isinstance(value, dict) and hasattr(kind, "to_dict"):
        hints = typing.get_type_hints(kind)
        assert set(value) <= set(hints), path
        for name, item in value.items():
            _known(hints[name], item, f"{path}.{name}")
