"""Where the server is and which token it is shown, when only the environment says so; and tokens that are in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kms.client.known_server import loopback
from kms.errors import ConfigError, InputError
from kms.host.descriptors import STANDARD_INPUT, descriptor_named
from kms.host.paths import data_directory
from kms.host.secret_input import read_token
from kms.host.secret_input import token as accepted_token
from kms.host.variables import is_on
from kms.limits import DEFAULT_TCP_HOST, DEFAULT_TCP_PORT, MAX_PORT

_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Plane:
    """One of the two tokens and where it is found."""

    name: str
    variable: str
    file_variable: str
    file_name: str
    option: str


API: Final = Plane("API token", "MINIKMS_API_TOKEN", "MINIKMS_API_TOKEN_FILE", "api.token", "--token-file")
ADMIN: Final = Plane("admin token", "MINIKMS_ADMIN_TOKEN", "MINIKMS_ADMIN_TOKEN_FILE", "admin.token", "--admin-token-file")


class Address(NamedTuple):
    """Where the server is: a Unix socket, or else host and port."""

    unix: Path | None
    host: str = DEFAULT_TCP_HOST
    port: int = DEFAULT_TCP_PORT


def find_server(tcp: str | None, unix: str | None, environ: Mapping[str, str]) -> Address:
    """Where the server is, from the flags or the environment; raises `ConfigError`."""
    if tcp is not None and unix is not None:
        raise ConfigError("--tcp and --unix exclude each other; give one")
    if unix is not None:
        return Address(Path(unix))
    if tcp is not None:
        return _parse_tcp(tcp)
    named, port = environ.get("MINIKMS_UNIX_SOCKET"), environ.get("MINIKMS_TCP_PORT")
    if named:
        return Address(Path(named))
    try:
        usual = data_directory(environ) / "kms.sock"
    except ConfigError:
        if not port:
            raise
        return Address(None, port=_port(port, "MINIKMS_TCP_PORT"))
    # Not `Path.exists`: a home that may not be entered has no socket for this user.
    if port and not os.path.exists(usual):  # noqa: PTH110
        return Address(None, port=_port(port, "MINIKMS_TCP_PORT"))
    # Whether it is there or not. By TCP only where somebody said so: while no server listens, its port is anybody's.
    return Address(usual)


def _parse_tcp(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ConfigError(f"--tcp: give HOST:PORT, such as {DEFAULT_TCP_HOST}:{DEFAULT_TCP_PORT}")
    try:
        host = loopback(host.removeprefix("[").removesuffix("]"))
    except ConfigError as error:
        raise ConfigError(f"--tcp: {error}") from None
    return Address(None, host, _port(port, "--tcp"))


def _port(text: str, origin: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_PORT):
        raise ConfigError(f"{origin}: a port is a number from 1 to {MAX_PORT}")
    return int(text)


NO_TOKEN: Final = "MINIKMS_NO_TOKEN"  # noqa: S105 - the name of a variable
"""Says that whoever has no token is known by the user id, even where there is one."""
ALLOW_GROUP: Final = "MINIKMS_ALLOW_GROUP_READABLE_SECRETS"


def token_file(plane: Plane, environ: Mapping[str, str]) -> Path | None:
    """The file that holds the token of `plane`: the environment's, else the data directory's if it exists."""
    named = environ.get(plane.file_variable)
    if named:
        return STANDARD_INPUT if named == "-" else Path(named)
    try:
        usual = data_directory(environ) / plane.file_name
    except ConfigError:
        return None  # without a data directory there is no usual place
    return usual if os.path.lexists(usual) else None


def token(plane: Plane, address: Address, environ: Mapping[str, str]) -> str | TokenFile:
    """The token of `plane`: the environment's, else that in a file; empty where the server knows a user by its id.

    Raises `ConfigError` when there is none, and over TCP nobody is known otherwise.
    """
    if address.unix is not None and is_on(environ, NO_TOKEN):
        return ""
    if value := environ.get(plane.variable):
        # Into a buffer by way of its bytes, as one is taken from a file: what may be one is the same.
        given = bytearray(os.fsencode(value))
        try:
            with accepted_token(given, len(given), plane.variable) as secret, secret.view() as view:
                return str(view, "utf-8")
        except InputError as error:
            raise ConfigError(str(error)) from None
    file = token_file(plane, environ)
    if file is not None:
        return TokenFile(file, environ)
    if address.unix is not None:
        return ""
    raise ConfigError(f"there is no {plane.name}; set {plane.variable}, or name a file with {plane.file_variable}")


class Found(NamedTuple):
    """All that a client needs to be told, which the environment says."""

    address: Address
    token: str | TokenFile
    server_user: str | None


def found(plane: Plane, environ: Mapping[str, str] | None) -> Found:
    """What `environ`, or that of this process, says; raises `ConfigError`."""
    said = os.environ if environ is None else environ
    address = find_server(None, None, said)
    return Found(address, token(plane, address, said), said.get("MINIKMS_SERVER_USER") or None)


class TokenFile:
    """The token in a private file, which is read again when it has changed. It is looked at once a second at the most."""

    def __init__(self, path: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> None:
        """Raises what `read_token` raises. `environ` says whether its group may read it; it is that of this process."""
        self._path = Path(path)
        self._allow_group = is_on(os.environ if environ is None else environ, ALLOW_GROUP)
        self._read()

    def __call__(self) -> str:
        """The token; raises what `read_token` raises, where the file has changed."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS and self._identified() != self._identity:
            self._read()
        return self._token

    def __repr__(self) -> str:
        return f"<TokenFile {self._path}>"

    def _read(self) -> None:
        identity = self._identified()
        with read_token(self._path, allow_group=self._allow_group) as secret, secret.view() as view:
            self._token = str(view, "utf-8")
        self._identity = identity

    def _identified(self) -> tuple[int, ...] | None:
        self._looked = time.monotonic()
        if descriptor_named(self._path) is not None:
            return None  # what was read from it is gone
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
