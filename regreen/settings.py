"""Settings of every service and of the command line: file < environment < flag.

- A name that nobody reads is an error, in files, in the environment and in flags
  (`setting_names`); a wrong value is told with the place that it comes from.
- The file is TOML, one table per service; its path comes from `--config` or `REGREEN_CONFIG`.
- Environment variables are `REGREEN_<SERVICE>__<FIELD>`, for example `REGREEN_SANDBOX__LISTEN`.
- Binding wider than loopback or a unix socket needs TLS, or `insecure` said out loud.
- `--help` says of every setting what the docstring under it says, as the tables of the docs do.
- A secret is the path of a file (`file:/path`), or an environment variable; never a flag.
- An address that cannot be bound and a certificate that cannot be used are refused here, not later.
"""

import argparse
import ast
import inspect
import os
import re
import ssl
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from regreen import setting_names
from regreen.home import default_home
from regreen.rpc.certificates import Tls
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.rpc.ports import is_local
from regreen.rpc.quotas import read_quotas
from regreen.rpc.tokens import read_tokens

PLACES = frozenset(
    (
        *("listen", "metrics", "home", "insecure", "tls_cert", "tls_key", "tls_ca"),
        *("tokens", "quotas", "audit"),
    )
)
"""Settings of where a process is and whom it lets in: said by what deploys it, of no process for
another."""
_FILE = "file:"
"""How a secret setting begins that is the path of a file with the secret."""
BAD_SETTINGS = 2
"""Exit code of a service that refuses its settings."""
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]/]+):(\d{1,5})", re.ASCII)
_SOCKET_PATH_BYTES = 107


def check_address(field: str, address: str, *, unix: bool = False) -> None:
    """Refuse what cannot be listened on; a host name is not looked up.

    Raises:
        ValueError: it is no address; names `field` and says what to give.
    """
    forms = "host:port or unix:/path" if unix else "host:port"
    if address.startswith("unix:"):
        length = len(os.fsencode(address.removeprefix("unix:")))
        if not unix or not 0 < length <= _SOCKET_PATH_BYTES or "\0" in address:
            raise ValueError(
                f"{field}: {address!r} is no address; give {forms}"
                + (f" of at most {_SOCKET_PATH_BYTES} bytes" if unix else "")
            )
        return
    found = _HOST_PORT.fullmatch(address)
    if found is None:
        raise ValueError(
            f"{field}: {address!r} is no address; give {forms}, an IPv6 host in brackets"
        )
    if int(found[2]) > 65535:
        raise ValueError(f"{field}: {address!r} has no port of 0 to 65535; give {forms}")


def check_certificates(cert: Path | None, key: Path | None, authority: Path | None) -> None:
    """Refuse TLS files that are unreadable, no PEM, or not of each other.

    Raises:
        ValueError: names the settings and says what to give.
    """
    if bool(cert) != bool(key):
        raise ValueError("tls_cert and tls_key belong together; give both")
    if authority and not cert:
        raise ValueError("tls_ca: is of no use without tls_cert and tls_key; give all three")
    for field, path in (("tls_cert", cert), ("tls_key", key), ("tls_ca", authority)):
        if path is not None:
            check_pem(field, path)
    if cert is None or key is None:
        return
    try:
        # The password is never asked for: gRPC takes no encrypted key.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        raise ValueError(
            f"tls_cert, tls_key: {cert} and {key} are no pair ({error.reason or error}); "
            "give a PEM certificate chain and its private key without a password"
        ) from error
    if authority is None:
        return
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise ValueError(
            f"tls_ca: {authority} holds no certificate ({error.reason or error}); "
            "give a PEM file of certificates"
        ) from error


def check_pem(field: str, path: Path) -> None:
    """Refuse a file that cannot be read.

    Raises:
        ValueError: names `field` and the reason.
    """
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{field}: {path} cannot be read ({error.strerror}); give a PEM file that this user "
            "may read"
        ) from error


def meanings(cls: type) -> dict[str, str]:
    """What the docstring under each field of a settings class says, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is BaseSettings or not issubclass(base, BaseSettings):
            continue
        if base.__module__.startswith("pydantic"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


class _Parser(argparse.ArgumentParser):
    """Reads what the settings mean only when it is asked for."""

    settings: "type[ServiceSettings]"

    def format_help(self) -> str:
        """The help, with a line on every setting."""
        said = meanings(self.settings)
        for action in self._actions:
            field = self.settings.model_fields.get(action.dest)
            if field is None:
                continue
            default = field.get_default(call_default_factory=True)
            shown = "none" if default is None or str(default) == "" else default
            text = f"{said.get(action.dest, '')} Default: {shown}."
            action.help = text.strip().replace("%", "%%")
        return super().format_help()


class ServiceSettings(BaseSettings):
    """What every service can be told; each service adds its own fields."""

    model_config = SettingsConfigDict(extra="forbid", validate_default=True)
    section: ClassVar[str] = "service"
    # Settings that may hold a secret among other things, and so can come from a file too.
    with_secrets: ClassVar[tuple[str, ...]] = ()

    listen: str = "127.0.0.1:0"
    """gRPC address: `host:port` or `unix:/path`. Port 0 picks a free one."""
    metrics: str = "127.0.0.1:0"
    """HTTP address of `/metrics` and `/healthz`."""
    home: Path = Field(default_factory=default_home)
    """Directory for everything written at run time."""
    insecure: bool = False
    """Allow plain text beyond loopback. For networks that are private by other means."""
    tls_cert: Path | None = None
    """Certificate chain (PEM). Read anew when the file changes, as key and authority are."""
    tls_key: Path | None = None
    """Private key of the certificate (PEM)."""
    tls_ca: Path | None = None
    """Authorities that client certificates must come from (PEM); given, clients must show one."""
    tokens: Path | None = None
    """File of token hashes (`regreen tokens create`); given, every call but health needs a token
    whose scopes cover it. Read anew when it changes."""
    quotas: Path | None = None
    """File of what each tenant may have at most; needs `tokens`. Read anew when it changes."""
    audit: Path | None = None
    """File that two lines are appended to for each mutation: who began it, and what came of it.
    `/dev/stderr` puts them into the log."""
    max_rpcs: int = Field(default=256, ge=1)
    """Calls served at once; more are answered RESOURCE_EXHAUSTED, with a delay."""
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Largest request or response."""
    call_timeout_s: float = Field(default=3600.0, gt=0)
    """Bound on a call that comes without a deadline."""
    stream_timeout_s: float = Field(default=24 * 3600.0, gt=0)
    """Bound on a call that answers with a stream, whatever its deadline."""
    drain_s: float = Field(default=10.0, ge=0)
    """Time that running calls get to finish after SIGTERM."""
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    """Least severe level that is logged."""

    @property
    def tls(self) -> Tls | None:
        """This service's certificates, which it also shows to the services that it calls."""
        return Tls(self.tls_ca, self.tls_cert, self.tls_key) if self.tls_cert else None

    @field_validator("*", mode="before")
    @classmethod
    def _read_secret(cls, value: object, info: ValidationInfo) -> object:
        """A secret from the file that it names."""
        named = isinstance(value, str) and value.startswith(_FILE)
        if not named or str(info.field_name) not in (*cls.secrets(), *cls.with_secrets):
            return value
        path = str(value).removeprefix(_FILE)
        try:
            return Path(path).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give a file of text") from None

    @classmethod
    def secrets(cls) -> list[str]:
        """Names of the settings that are secret."""
        fields = cls.model_fields.items()
        return [name for name, field in fields if field.annotation is SecretStr]

    @field_validator("home", mode="before")
    @classmethod
    def _check_home(cls, value: object) -> object:
        if value == "":
            raise ValueError(
                "it is empty, which would mean the present directory; name one or leave it out"
            )
        return value

    @model_validator(mode="after")
    def _check_addresses(self) -> Self:
        check_address("listen", self.listen, unix=True)
        self.check_plain_http("metrics", self.metrics)
        if not (is_local(self.listen) or self.insecure or self.tls_cert):
            raise ValueError(
                f"listen: {self.listen} is reachable from other machines in plain text; "
                "set tls_cert and tls_key, or insecure=true if the network is private"
            )
        check_certificates(self.tls_cert, self.tls_key, self.tls_ca)
        if self.quotas is not None and self.tokens is None:
            raise ValueError("quotas: without tokens there are no tenants; set tokens")
        try:
            if self.tokens is not None:
                read_tokens(self.tokens)
            if self.quotas is not None:
                read_quotas(self.quotas)
        except FailedPrecondition as error:
            raise ValueError(error.message) from None
        if self.tokens is not None and not (is_local(self.listen) or self.tls_cert):
            raise ValueError(
                "tokens: they would cross the network in plain text; set tls_cert and tls_key"
            )
        return self

    def check_plain_http(self, field: str, address: str) -> None:
        """Refuse an address of plain HTTP that is bad, or wider than loopback without `insecure`.

        Raises:
            ValueError: names `field` and says what to set.
        """
        check_address(field, address)
        if not (is_local(address) or self.insecure):
            raise ValueError(
                f"{field}: {address} is reachable from other machines in plain text; "
                "set insecure=true if the network is private"
            )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        table = setting_names.read_table(cls.section, settings_cls.model_fields)
        setting_names.check_variables(cls.section, settings_cls.model_fields)
        from_file = InitSettingsSource(settings_cls, init_kwargs=table)
        prefix = setting_names.prefix_of(cls.section)
        from_environment = EnvSettingsSource(settings_cls, env_prefix=prefix)
        return init_settings, from_environment, from_file

    @classmethod
    def load(cls, argv: Sequence[str] | None = None) -> Self:
        """Settings from file, environment and command-line flags; exits with 2 on bad ones.

        With `--check` it exits with 0 on good ones.
        """
        parser = _Parser(prog=f"{cls.section}_svc", description=cls.__doc__, allow_abbrev=False)
        parser.settings = cls
        parser.add_argument("--config", help=f"TOML file; its table is [{cls.section}]")
        parser.add_argument("--check", action="store_true", help="read the settings and end")
        for name, field in cls.model_fields.items():
            flag = "--" + name.replace("_", "-")
            action: Any = argparse.BooleanOptionalAction if field.annotation is bool else None
            options = {"action": action} if action else {}
            parser.add_argument(flag, default=None, **options)
        given = vars(parser.parse_args(argv))
        check = given.pop("check")
        if config := given.pop("config"):
            os.environ["REGREEN_CONFIG"] = config
        flags = {name: value for name, value in given.items() if value is not None}
        try:
            cls._check_flags(flags)
            settings = cls(**flags)
            settings.check_host()
        except (ValidationError, InvalidArgument) as error:
            print(f"{cls.section}_svc: {cls._describe(error, flags)}", file=sys.stderr)  # noqa: T201
            raise SystemExit(BAD_SETTINGS) from None
        if check:
            raise SystemExit(0)
        return settings

    @classmethod
    def _check_flags(cls, flags: Mapping[str, Any]) -> None:
        """Refuse secrets as words: whoever may list processes reads those.

        Raises:
            InvalidArgument: names the flag.
        """
        for name in cls.secrets():
            given = str(flags.get(name, ""))
            if given and not given.startswith(_FILE):
                raise InvalidArgument(
                    name, "is secret, and words of a command are not", f"give {_FILE}/path"
                )

    @classmethod
    def _describe(cls, error: ValidationError | InvalidArgument, flags: Collection[str]) -> str:
        """One line for all wrong settings: the name of each, what is wrong, and who said so."""
        if isinstance(error, InvalidArgument):
            return error.message
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            problem = str(item["msg"]).removeprefix("Value error, ")
            line = f"{name}: {problem}" if name else problem
            name = name or problem.partition(":")[0]
            place = "" if name in flags else setting_names.place_of(cls.section, name)
            lines.append(f"{line} ({place})" if place else line)
        return "; ".join(lines)

    def check_host(self) -> None:
        """Refuse settings that this host cannot serve, as far as a look tells.

        Raises:
            InvalidArgument: names the setting and says what to give.
        """
        return
