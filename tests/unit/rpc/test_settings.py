"""Settings: file < environment < flag, and what is refused."""

from typing import ClassVar

import pytest
from pydantic import ValidationError

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


def test_settings_can_be_checked_without_serving(capsys):
    for words, code, said in (
        (["--check"], 0, ""),
        (["--check", "--max-rpcs", "0"], 2, "demo_svc: max_rpcs: Input should be"),
        (["--check", "--listen", "x"], 2, "demo_svc: listen: 'x' is no address"),
    ):
        with pytest.raises(SystemExit) as exit:
            Demo.load(words)
        assert exit.value.code == code
        assert capsys.readouterr().err.startswith(said)
