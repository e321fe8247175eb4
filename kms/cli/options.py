"""What the commands have in common: options, paths where `-` is a stream, and how a server is found and called."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import rich_click as click

from kms.cli.prompt import obtain
from kms.client.environment import Plane, find_server, token_file
from kms.errors import ConfigError, FileAccessError, InputError, InputMissingError
from kms.host import package, streams

if TYPE_CHECKING:
    from kms.client.blocking import KmsClient
    from kms.core.secret import Secret

F = TypeVar("F", bound=Callable[..., Any])

# Not `readable`: click's own check would be a usage error without a remedy, where opening says what to do.
PATH: Final = click.Path(readable=False)
"""Completes file names. A str, not a Path, since `./-` is a file and `-` is a stream."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What stands before the name of a command."""

    tcp: str | None
    unix: str | None
    token_file: str | None
    json: bool
    no_token: bool = False
    server_user: str | None = None
    request_id: str | None = None


def address_options(command: F) -> F:
    """`--tcp`, `--unix` and `--server-user`."""
    unix = click.option(
        "--unix", type=PATH, metavar="PATH", help="Unix socket of the server. [MINIKMS_UNIX_SOCKET or <data>/kms.sock]"
    )
    tcp = click.option(
        "--tcp",
        metavar="HOST:PORT",
        help="TCP address of the server; a loopback address only. [127.0.0.1:MINIKMS_TCP_PORT]",
    )
    user = click.option(
        "--server-user",
        metavar="USER",
        help="Who may be the server, beside you, root and the owner of the socket's directory: name, uid or any. "
        "[MINIKMS_SERVER_USER]",
    )
    return tcp(unix(user(command)))


def no_token_option(command: F) -> F:
    """`--no-token`."""
    return click.option("--no-token", is_flag=True, help="Be known by your user id; over a Unix socket only.")(command)


def request_id_option(command: F) -> F:
    """`--request-id`."""
    return click.option(
        "--request-id", metavar="ID", help="What the server's logs call this: at most 64 printable characters."
    )(command)


def json_option(command: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def version_option(command: F) -> F:
    """`--version`."""

    def show(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
        if value:
            click.echo(f"{context.info_name} {package.version()}")
            context.exit()

    return click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )(command)


def epilog(program: str, *lines: str) -> str:
    """A help text's end: examples, and how to get completion."""
    name = program.replace("-", "_").upper()
    completion = f'Completion in bash (also zsh_source, fish_source): eval "$(_{name}_COMPLETE=bash_source {program})"'
    return f"{examples(*lines)}\n\n{completion}"


def examples(*lines: str) -> str:
    """The examples under a command's help."""
    # rich-click keeps a line of an epilog apart only as a paragraph.
    return "\n\n".join(("Examples:", *(f"$ {line}" for line in lines)))


@contextlib.contextmanager
def reachable(settings: Settings, plane: Plane) -> Iterator[tuple[Callable[[], KmsClient], Secret]]:
    """What connects to the server that `settings` name, as often as it is called, and the token it shows, wiped afterwards.

    For who lets time pass between two requests: the server closes a connection that idles.
    """
    from kms.client.blocking import KmsClient

    address = find_server(settings.tcp, settings.unix, os.environ)
    if settings.no_token and address.unix is None:
        raise ConfigError("--no-token: the server knows a user id only over a Unix socket; give --unix PATH")
    if settings.no_token and settings.token_file is not None:
        raise ConfigError(f"--no-token and {plane.option} exclude each other; give one")
    with _no_token() if settings.no_token else _token_of(settings, plane) as token:
        user = settings.server_user or os.environ.get("MINIKMS_SERVER_USER") or None

        def connect() -> KmsClient:
            if address.unix is not None:
                return KmsClient.connect_unix(address.unix, token=token, request_id=settings.request_id, server_user=user)
            return KmsClient.connect_tcp(
                address.host, address.port, token=token, request_id=settings.request_id, server_user=user
            )

        yield connect, token


@contextlib.contextmanager
def connected(settings: Settings, plane: Plane) -> Iterator[tuple[KmsClient, Secret]]:
    """A client of the server that `settings` name, and the token it shows, wiped afterwards."""
    with reachable(settings, plane) as (connect, token), connect() as client:
        yield client, token


def _token_of(settings: Settings, plane: Plane) -> Secret:
    return obtain(plane.name, plane.variable, token_file(settings.token_file, plane, os.environ), plane.option)


def _no_token() -> Secret:
    from kms.core.secret import Secret

    return Secret(bytearray())


def stream_or_path(text: str) -> Path | None:
    """None for `-`, which is standard input or output."""
    return None if text == "-" else Path(text)


def utf8(option: str, text: str) -> bytes:
    """What was typed after `option`, as UTF-8; raises `ConfigError` when the shell passed bytes that are not."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option}: not UTF-8; put binary data into a file") from None


def read_bounded(path: Path | None, limit: int, remedy: str) -> bytes:
    """All of `path` (None: standard input), at most `limit` bytes; raises `InputError` with `remedy` for more."""
    name = "standard input" if path is None else str(path)
    buffer = bytearray(limit + 1)
    try:
        if path is None:
            length = streams.fill(streams.standard_input(), memoryview(buffer))
        else:
            with path.open("rb") as file:
                length = streams.fill(file, memoryview(buffer))
    except FileNotFoundError:
        raise InputMissingError(f"there is no file {name}") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory; name a file") from None
    except OSError as error:
        raise FileAccessError(f"cannot read {name}: {error.strerror}") from error
    if length > limit:
        raise InputError(f"{name} is too large for one request; {remedy}")
    return bytes(buffer[:length])


def write_whole(path: Path, data: bytes) -> None:
    """`data` durably at `path`, through symbolic links; or, where it names what is open, a pipe or a device, into that."""
    from kms.client.files import write_output

    write_output(path, data)
