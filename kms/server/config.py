"""Configuration: flags over environment over defaults, resolved into one frozen object. Imports no trio."""

from __future__ import annotations

import grp
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from kms import limits
from kms.errors import ConfigError
from kms.host.descriptors import STANDARD_INPUT
from kms.host.paths import data_directory
from kms.service.audit_settings import AuditSettings, DataAudit

ENVIRONMENT: Final = {
    "tcp_port": "MINIKMS_TCP_PORT",
    "unix_socket": "MINIKMS_UNIX_SOCKET",
    "unix_socket_group": "MINIKMS_UNIX_SOCKET_GROUP",
    "keystore": "MINIKMS_KEYSTORE",
    "token_file": "MINIKMS_API_TOKEN_FILE",
    "admin_token_file": "MINIKMS_ADMIN_TOKEN_FILE",
    "passphrase_file": "MINIKMS_PASSPHRASE_FILE",
    "principals": "MINIKMS_PRINCIPALS",
    "audit_log": "MINIKMS_AUDIT_LOG",
    "audit_data": "MINIKMS_AUDIT_DATA",
    "max_frame_bytes": "MINIKMS_MAX_FRAME_BYTES",
    "idle_timeout_ms": "MINIKMS_IDLE_TIMEOUT_MS",
    "max_connections": "MINIKMS_MAX_CONNECTIONS",
    "log_format": "MINIKMS_LOG_FORMAT",
    "metrics_port": "MINIKMS_METRICS_PORT",
}
"""Which environment variable stands in for which flag."""

LOG_FORMATS: Final = ("human", "json")
"""The first is the default."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the server runs with, but for its secrets. A listener that is off is None."""

    tcp_port: int | None
    unix_socket: Path | None
    unix_socket_gid: int | None
    """The group that may connect to the Unix socket; None: only the server's own user may."""
    keystore: Path
    principals: Path
    principals_named: bool
    """Whether that file has to exist; the one at the default place need not."""
    no_principals: bool
    """Whether to start without that file though an audit log shows that there may have been one."""
    audit: AuditSettings
    max_frame_bytes: int
    idle_timeout: float
    """Seconds."""
    max_connections: int
    metrics_port: int | None
    metrics_groups: bool
    """Whether the metrics name key groups."""


class Places:
    """Where the server's files are: flags over environment over the data directory, each found out when it is asked for."""

    def __init__(self, flags: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        """`flags` are None where they were not given."""
        self._source = _Source(flags, environ)
        self._environ = environ

    @property
    def keystore(self) -> Path:
        return self._named("keystore") or self._data("keystore.json")

    @property
    def unix_socket(self) -> Path:
        return self._named("unix_socket") or self._data("kms.sock")

    @property
    def new_token_files(self) -> tuple[Path, Path]:
        """Where the API token and the admin token go that are made now."""
        return (
            self._named("token_file") or self._data("api.token"),
            self._named("admin_token_file") or self._data("admin.token"),
        )

    @property
    def token_file(self) -> Path | None:
        """None where none is named, and none at its usual place."""
        return self._secret("token_file") or self._usual("api.token")

    @property
    def admin_token_file(self) -> Path | None:
        """As `token_file`."""
        return self._secret("admin_token_file") or self._usual("admin.token")

    @property
    def passphrase_file(self) -> Path | None:
        """None where none is named, and systemd has handed over none."""
        named = self._secret("passphrase_file")
        credentials = self._environ.get("CREDENTIALS_DIRECTORY")
        return named or (_if_exists(Path(credentials) / "passphrase") if credentials else None)

    @property
    def principals(self) -> Path:
        return self._named("principals") or self._data("principals.toml")

    @property
    def audit_log(self) -> Path:
        return self._named("audit_log") or self._data("audit.log")

    @property
    def audit_log_if_known(self) -> Path | None:
        """None where it is not named, and there is no data directory for it to be in."""
        try:
            return self.audit_log
        except ConfigError:
            return None

    def _named(self, name: str) -> Path | None:
        return self._source.path(name)

    def _secret(self, name: str) -> Path | None:
        """A file with a secret; `-` is standard input."""
        value = self._source.text(name)
        return STANDARD_INPUT if value == "-" else self._named(name)

    def _data(self, name: str) -> Path:
        return data_directory(self._environ) / name

    def _usual(self, name: str) -> Path | None:
        """The file of this name in the data directory, if there is that, and it in it."""
        try:
            path = self._data(name)
        except ConfigError:
            return None
        return _if_exists(path)


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ServerConfig:
    """The configuration from `flags` (None where not given) and `environ`; raises `ConfigError`."""
    source, places = _Source(flags, environ), Places(flags, environ)
    no_tcp, no_unix = bool(flags.get("no_tcp")), bool(flags.get("no_unix"))
    if no_tcp and no_unix:
        raise ConfigError("--no-tcp and --no-unix together leave no way in; leave one out")
    no_audit = bool(flags.get("no_audit"))
    if no_audit and flags.get("audit_log"):
        raise ConfigError("--no-audit and --audit-log exclude each other; give one")
    no_principals = bool(flags.get("no_principals"))
    if no_principals and os.path.lexists(places.principals):
        raise ConfigError(f"--no-principals: there is a file {places.principals}; leave one of them out")
    metrics_port, metrics_groups = (
        source.optional_number("metrics_port", 0, limits.MAX_PORT),
        bool(flags.get("metrics_groups")),
    )
    _check_metrics(metrics_port, groups=metrics_groups)
    return ServerConfig(
        tcp_port=None if no_tcp else source.number("tcp_port", limits.DEFAULT_TCP_PORT, 0, limits.MAX_PORT),
        unix_socket=None if no_unix else places.unix_socket,
        unix_socket_gid=None if no_unix else source.group("unix_socket_group"),
        keystore=places.keystore,
        principals=places.principals,
        principals_named=source.path("principals") is not None and not no_principals,
        no_principals=no_principals,
        audit=AuditSettings(
            path=places.audit_log,
            data=DataAudit(source.choice("audit_data", tuple(DataAudit))),
            is_off=no_audit,
            is_always_kept=source.path("audit_log") is not None,
            accept_rollback=bool(flags.get("accept_rollback")),
        ),
        max_frame_bytes=source.number(
            "max_frame_bytes", limits.MAX_FRAME_BYTES, limits.MIN_FRAME_BYTES, limits.MAX_FRAME_BYTES_CEILING
        ),
        idle_timeout=source.number("idle_timeout_ms", int(limits.IDLE_TIMEOUT * 1000), 1, 24 * 3600 * 1000) / 1000,
        max_connections=source.number("max_connections", limits.MAX_CONNECTIONS, 1, limits.MAX_CONNECTIONS_CEILING),
        metrics_port=metrics_port,
        metrics_groups=metrics_groups,
    )


def log_format(flags: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """Which of `LOG_FORMATS` is asked for; raises `ConfigError`. Apart from the rest, whose errors are said in it."""
    return _Source(flags, environ).choice("log_format", LOG_FORMATS)


_METRICS_NEED: Final = ("prometheus_client", "h11")


def _check_metrics(port: int | None, *, groups: bool) -> None:
    if port is None:
        if groups:
            raise ConfigError("--metrics-groups: there are no metrics without --metrics-port; give both")
        return
    if not all(map(find_spec, _METRICS_NEED)):
        raise ConfigError(
            "--metrics-port: what it needs is not installed; install it with: pip install 'mini-kms[metrics]'"
        )


class _Source:
    """Looks a setting up in the flags, then in the environment."""

    def __init__(self, flags: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._flags = flags
        self._environ = environ

    def _find(self, name: str) -> tuple[Any, str]:
        value = self._flags.get(name)
        if value is not None:
            return value, "--" + name.replace("_", "-")
        variable = ENVIRONMENT[name]
        # An empty variable is one that was switched off: `MINIKMS_TCP_PORT= kms-server`.
        return self._environ.get(variable) or None, variable

    def number(self, name: str, default: int, low: int, high: int) -> int:
        number = self.optional_number(name, low, high)
        return default if number is None else number

    def optional_number(self, name: str, low: int, high: int) -> int | None:
        value, origin = self._find(name)
        if value is None:
            return None
        try:
            number = int(value)
        except ValueError:
            raise ConfigError(f"{origin}: give a whole number from {low} to {high}") from None
        if not low <= number <= high:
            raise ConfigError(f"{origin}: {number} is outside {low}..{high}")
        return number

    def choice(self, name: str, choices: Sequence[str]) -> str:
        value, origin = self._find(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise ConfigError(f"{origin}: give {' or '.join(choices)}")
        return str(value)

    def text(self, name: str) -> str | None:
        value, _ = self._find(name)
        return None if value is None else str(value)

    def path(self, name: str) -> Path | None:
        value = self.text(name)
        return None if value is None else Path(value)

    def group(self, name: str) -> int | None:
        value, origin = self._find(name)
        if value is None:
            return None
        try:
            return grp.getgrnam(value).gr_gid
        except (KeyError, ValueError):
            raise ConfigError(f"{origin}: there is no group of this name; make it with: groupadd --system NAME") from None


def _if_exists(path: Path) -> Path | None:
    try:
        path.stat()  # not `exists`, which lets an OSError out or takes it for False, as the version of Python has it
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot look for {path}: {error.strerror}; set XDG_DATA_HOME to a directory of yours") from error
    return path
