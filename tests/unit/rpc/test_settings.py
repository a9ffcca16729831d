"""Settings: file < environment < flag, and what is refused."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from dataset_svc.settings import DatasetSettings
from judge_svc.settings import JudgeSettings
from policy_svc.settings import PolicySettings
from regreen.rpc.ports import is_local
from regreen.settings import ServiceSettings, meanings
from sandbox_svc.settings import SandboxSettings

ROOT = Path(__file__).resolve().parents[3]


class Demo(ServiceSettings):
    """Settings of the test."""

    section: ClassVar[str] = "demo"
    depth: int = 1
    """A number."""


def test_flag_beats_environment_beats_file(tmp_path, monkeypatch):
    path = tmp_path / "regreen.toml"
    path.write_text("[demo]\ndepth = 2\nmax_rpcs = 7\n[policy]\nx = 1\n")
    monkeypatch.setenv("REGREEN_CONFIG", str(path))
    assert Demo.load([]).depth == 2
    monkeypatch.setenv("REGREEN_DEMO__DEPTH", "3")
    assert Demo.load([]).depth == 3
    loaded = Demo.load(["--depth", "4"])
    assert (loaded.depth, loaded.max_rpcs) == (4, 7)


def test_unprefixed_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("REGREEN_HOME", "/data")
    assert str(Demo.load([]).home) == "/data"


def _refusal(capsys, *words: str) -> str:
    """What settings are refused with."""
    with pytest.raises(SystemExit) as exit:
        Demo.load(words)
    assert exit.value.code == 2
    return capsys.readouterr().err


HELP = "see `python -m demo_svc --help`"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[demo]\ndepht = 2", "depht: in [demo] of {} is no setting of the demo service; did you "
         "mean depth?"),
        ("[demo]\nzzz = 2", "zzz: in [demo] of {} is no setting of the demo service; " + HELP),
        ("[dmeo]\ndepth = 2", "[dmeo]: in {} is the table of no service; did you mean demo?"),
        ("[sandbx]\nx = 2", "[sandbx]: in {} is the table of no service; did you mean sandbox?"),
        ("[zzz]\nx = 2", "[zzz]: in {} is the table of no service; tables are dataset, demo, "
         "judge, learner, policy, sandbox"),
        ("depth = 2", "depth: in {} stands in no table; put it below [demo], or the table of its "
         "service"),
        ("demo = 2", "config: [demo] in {} is no table"),
        ("[demo]\ndepth = 'x'", "depth: Input should be a valid integer, unable to parse string as "
         "an integer ([demo] of {})"),
        ("[demo]\nlisten = 'x'", "listen: 'x' is no address; give host:port or unix:/path, an IPv6 "
         "host in brackets ([demo] of {})"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_with_the_file_and_what_is_near(
    tmp_path, monkeypatch, capsys, text, said
):
    path = tmp_path / "regreen.toml"
    path.write_text(text)
    told = f"demo_svc: {said.format(path)}\n"
    monkeypatch.setenv("REGREEN_CONFIG", "what --config replaces")
    assert _refusal(capsys, "--check", "--config", str(path)) == told
    monkeypatch.setenv("REGREEN_CONFIG", str(path))
    assert _refusal(capsys) == told


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("REGREEN_DMEO__DEPTH", "there is no service dmeo; did you mean DEMO?"),
        ("REGREEN_SANDBX__LISTEN", "there is no service sandbx; did you mean SANDBOX?"),
        ("REGREEN_ZZZ__DEPTH", "there is no service zzz; give REGREEN_SERVICE__NAME"),
        ("REGREEN_DEMO__DEPHT", "is no setting of the demo service; did you mean "
         "REGREEN_DEMO__DEPTH?"),
        ("REGREEN_DEMO_DEPTH", "is read by nobody; did you mean REGREEN_DEMO__DEPTH?"),
    ],
)  # fmt: skip
def test_misspelt_variables_are_refused_with_what_is_near(monkeypatch, capsys, name, said):
    monkeypatch.setenv("REGREEN_DEMO_PORT", "tcp://10.0.0.1:50052")  # as Kubernetes sets them
    monkeypatch.setenv(name, "2")
    assert _refusal(capsys, "--check") == f"demo_svc: {name}: {said}\n"


def test_a_bad_value_of_a_variable_names_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("REGREEN_DEMO__DEPTH", "x")
    assert _refusal(capsys, "--check").endswith(" (REGREEN_DEMO__DEPTH)\n")
    assert "REGREEN" not in _refusal(capsys, "--check", "--depth", "y")


def test_a_cluster_of_which_nothing_is_known_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    known, junk, other = (tmp_path / name for name in ("known", "junk", "other"))
    junk.write_text("{:")
    other.write_text("3")
    known.write_text(
        "{current-context: a, clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}],"
        " contexts: [{name: a, context: {cluster: c}}]}"
    )
    for words, code in (
        ([], 2),
        (["--kube-config", str(tmp_path / "gone")], 2),
        (["--kube-config", str(junk)], 2),
        (["--kube-config", str(other)], 2),
        (["--kube-config", str(known)], 0),
    ):
        with pytest.raises(SystemExit) as exit:
            SandboxSettings.load(["--check", "--backend", "kubernetes", *words])
        said = capsys.readouterr().err
        assert exit.value.code == code, (words, said)
        refused = said.startswith("sandbox_svc: kube_config: no usable cluster configuration (")
        assert refused == bool(code), said
        assert bool(code) == said.endswith("; run in a pod, set KUBECONFIG or give --kube-config\n")


@pytest.mark.parametrize("name", ["REGREEN_DEMO__DEEP", "regreen_demo__deep"])
def test_unknown_variables_are_refused(monkeypatch, capsys, name):
    monkeypatch.setenv("REGREEN_POLICY__DEEP", "1")
    monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit) as exit:
        Demo.load([])
    assert exit.value.code == 2
    assert f"{name}: is no setting of the demo service" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "10.0.0.1:1", "[::]:1", "example:1"])
def test_plain_text_beyond_loopback_is_refused(address):
    with pytest.raises(ValidationError, match="plain text"):
        Demo(listen=address)
    assert Demo(listen=address, insecure=True).listen == address


def test_metrics_beyond_loopback_need_to_be_wanted(tmp_path):
    address = "0.0.0.0:9051"
    with pytest.raises(ValidationError, match=r"metrics: .*plain text; set insecure=true"):
        Demo(metrics=address, tls_cert=tmp_path, tls_key=tmp_path)
    assert Demo(metrics=address, insecure=True).metrics == address
    with pytest.raises(ValidationError, match=r"metrics: .*give host:port \["):
        Demo(metrics="unix:/tmp/metrics.sock")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:1", "[::1]:1", "unix:/tmp/x.sock"])
def test_loopback_and_sockets_are_local(address):
    assert is_local(address)
    assert Demo(listen=address).listen == address


def test_an_address_needs_a_port():
    with pytest.raises(ValidationError, match="give host:port"):
        Demo(listen="localhost")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:65536", "[::1]:70000"])
def test_a_port_beyond_65535_is_refused(address):
    for field in ("listen", "metrics"):
        with pytest.raises(ValidationError, match=rf"{field}: .*no port of 0 to 65535; give host"):
            Demo(**{field: address})
    with pytest.raises(ValidationError, match=r"http: .*no port of 0 to 65535; give host:port"):
        PolicySettings(http=address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:abc",
        "127.0.0.1:-1",
        "127.0.0.1:",
        ":50051",
        "::1:9000",
        "a b:1",
        "h:²",
        "http://h:1",
    ],
)
def test_what_is_no_address_is_refused(address):
    for field in ("listen", "metrics"):
        with pytest.raises(ValidationError, match=f"{field}: .* is no address; give host:port"):
            Demo(**{field: address}, insecure=True)
    with pytest.raises(ValidationError, match=r"http: .* is no address; give host:port"):
        PolicySettings(http=address, insecure=True, http_key="k")


@pytest.mark.parametrize("address", ["unix:", "unix:/" + "x" * 107, "unix:/a\0b"])
def test_a_socket_path_that_cannot_be_bound_is_refused(address):
    with pytest.raises(ValidationError, match=r"listen: .*of at most 107 bytes"):
        Demo(listen=address)


def test_the_http_endpoint_beyond_loopback_needs_insecure_and_a_key():
    address = "0.0.0.0:50063"
    with pytest.raises(ValidationError, match=r"http: .*plain text; set insecure=true"):
        PolicySettings(http=address, http_key="k")
    with pytest.raises(ValidationError, match=r"http: .*set http_key"):
        PolicySettings(http=address, insecure=True)
    assert PolicySettings(http=address, insecure=True, http_key="k").http == address
    assert PolicySettings(http="", metrics="127.0.0.1:0").http == ""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[tuple[Path, Path]]:
    """Two certificates, each with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    made = []
    for name in ("one", "other"):
        folder = tmp_path_factory.mktemp(name)
        cert, key = folder / "cert.pem", folder / "key.pem"
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        words += ["-nodes", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert)]
        subprocess.run(words, check=True, capture_output=True)
        made.append((cert, key))
    return made


def test_certificates_are_checked_before_serving(pairs, tmp_path):
    (cert, key), (_, stranger) = pairs
    assert Demo(tls_cert=cert, tls_key=key, tls_ca=cert, listen="0.0.0.0:1").tls_cert == cert
    missing, junk = tmp_path / "no", tmp_path / "junk.pem"
    junk.write_text("junk")
    for given, said in (
        ({"tls_cert": missing, "tls_key": key}, "tls_cert: .*/no cannot be read .*give a PEM"),
        ({"tls_cert": cert, "tls_key": missing}, "tls_key: .*/no cannot be read .*give a PEM"),
        ({"tls_cert": tmp_path, "tls_key": key}, "tls_cert: .* cannot be read .*give a PEM"),
        ({"tls_cert": cert, "tls_key": stranger}, "tls_cert, tls_key: .* are no pair"),
        ({"tls_cert": junk, "tls_key": key}, "tls_cert, tls_key: .* are no pair"),
        ({"tls_cert": cert, "tls_key": key, "tls_ca": junk}, "tls_ca: .* holds no certificate"),
        ({"tls_cert": cert, "tls_key": key, "tls_ca": missing}, "tls_ca: .* cannot be read"),
        ({"tls_ca": cert}, "tls_ca: is of no use without tls_cert and tls_key"),
        ({"tls_cert": cert}, "give both"),
    ):
        with pytest.raises(ValidationError, match=said):
            Demo(**given)
    with pytest.raises(ValidationError, match=r"policy_tls_ca: .*/no cannot be read"):
        JudgeSettings(policy_tls_ca=missing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_of_another_user_is_refused(pairs, tmp_path):
    cert, key = pairs[0]
    own = tmp_path / "key.pem"
    own.write_bytes(key.read_bytes())
    own.chmod(0)
    with pytest.raises(ValidationError, match=r"tls_key: .*cannot be read"):
        Demo(tls_cert=cert, tls_key=own)


def test_settings_can_be_checked_without_serving(capsys):
    for words, code, said in (
        (["--check"], 0, ""),
        (["--check", "--max-rpcs", "0"], 2, "demo_svc: max_rpcs: Input should be"),
        (["--check", "--listen", "x"], 2, "demo_svc: listen: 'x' is no address"),
        (["--check", "--metrics", "h:70000"], 2, "demo_svc: metrics: 'h:70000' has no port"),
        (["--check", "--tls-cert", "/no", "--tls-key", "/no"], 2, "demo_svc: tls_cert: /no cannot"),
    ):
        with pytest.raises(SystemExit) as exit:
            Demo.load(words)
        assert exit.value.code == code
        assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("service", ["sandbox", "dataset", "policy", "judge", "learner"])
def test_help_says_what_every_setting_means(service, capsys):
    module = importlib.import_module(f"{service}_svc.settings")
    settings = getattr(module, f"{service.capitalize()}Settings")
    with pytest.raises(SystemExit) as ended:
        settings.load(["--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    said = meanings(settings)
    assert "Undefined" not in told
    for name, field in settings.model_fields.items():
        assert said[name], name
        flag, text = f"--{name.replace('_', '-')}", re.sub(r"\s", "", said[name])
        assert flag in told
        assert text in re.sub(r"\s", "", told), name
        default = field.get_default(call_default_factory=True)
        shown = "none" if default is None or str(default) == "" else str(default)
        assert re.sub(r"\s", "", f"{said[name]} Default: {shown}.") in re.sub(r"\s", "", told)


def test_help_and_the_docs_say_the_same():
    page = (ROOT / "docs/services/sandbox.md").read_text()
    for name, text in meanings(SandboxSettings).items():
        assert f"| `{name}` |" in page
        assert text.replace("|", "\\|") in page, name


def test_secrets_come_from_files_and_never_from_words(tmp_path, monkeypatch, capsys):
    secret = tmp_path / "key"
    secret.write_text("s3cret\n")
    named = f"file:{secret}"
    assert JudgeSettings.load(["--openai-key", named]).openai_key.get_secret_value() == "s3cret"
    monkeypatch.setenv("REGREEN_POLICY__HTTP_KEY", named)
    assert PolicySettings().http_key.get_secret_value() == "s3cret"
    secret.write_text("postgresql://me:s3cret@host/name\n")
    assert DatasetSettings.load(["--database-url", named]).database_url.endswith("@host/name")
    assert DatasetSettings.load(["--database-url", "postgresql:///n"]).database_url
    for settings, words in (
        (JudgeSettings, ["--openai-key", "s3cret"]),
        (JudgeSettings, ["--openai-key", f"file:{tmp_path}/no"]),
    ):
        with pytest.raises(SystemExit) as ended:
            settings.load(words)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "file" in said
        assert "s3cret" not in said
