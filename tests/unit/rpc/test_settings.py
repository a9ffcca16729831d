"""Settings: file < environment < flag, and what is refused."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from judge_svc.settings import JudgeSettings
from policy_svc.settings import PolicySettings
from regreen.settings import ServiceSettings, is_local


class Demo(ServiceSettings):
    """Settings of the test."""

    section: ClassVar[str] = "demo"
    depth: int = 1
    """A number."""


def test_flag_beats_environment_beats_file(tmp_path, monkeypatch):
    path = tmp_path / "regreen.toml"
    path.write_text("[demo]\ndepth = 2\nmax_rpcs = 7\n[other]\nx = 1\n")
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


def test_unknown_keys_are_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "regreen.toml"
    path.write_text("[demo]\ndeep = 2\n")
    monkeypatch.setenv("REGREEN_CONFIG", str(path))
    with pytest.raises(SystemExit) as exit:
        Demo.load([])
    assert exit.value.code == 2
    assert "deep" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["REGREEN_DEMO__DEEP", "regreen_demo__deep"])
def test_unknown_variables_are_refused(monkeypatch, capsys, name):
    monkeypatch.setenv("REGREEN_OTHER__DEEP", "1")
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
