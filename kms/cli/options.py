"""What the commands have in common: options, paths where `-` is a stream, and how a server is found and called."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import rich_click as click
from click.core import ParameterSource

from kms.cli.prompt import Wanted, obtain, obtain_if_given
from kms.cli.refused import naming
from kms.client.environment import ALLOW_GROUP, NO_TOKEN, Plane, find_server, token_file
from kms.core.names import is_blank
from kms.errors import AuthFailedError, ConfigError, FileAccessError, InputError, InputMissingError
from kms.host import package, streams
from kms.host.variables import is_on
from kms.limits import MAX_VERSION

if TYPE_CHECKING:
    from kms.client.blocking import KmsClient
    from kms.core.secret import Secret

F = TypeVar("F", bound=Callable[..., Any])

_MOST_DIGITS: Final = len(str(MAX_VERSION))

# Not `readable`: click's own check would be a usage error without a remedy, where opening says what to do.
PATH: Final = click.Path(readable=False)
"""Completes file names. A str, not a Path, since `./-` is a file and `-` is a stream."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What stands before the name of a command, or behind it."""

    tcp: str | None = None
    unix: str | None = None
    server_user: str | None = None
    token_file: str | None = None
    no_token: bool = False
    allow_group_readable_secrets: bool = False
    request_id: str | None = None
    json: bool = False


class Program(click.RichGroup):
    """A program with commands. Its own options mean the same behind the name of a command, where most people put them."""

    def add_command(self, cmd: click.Command, *arguments: Any, **others: Any) -> None:
        super().add_command(cmd, *arguments, **others)
        taken = {text for parameter in cmd.params for text in parameter.opts}
        for option in cast("list[click.Option]", self.params):
            if option.name in _SETTINGS and not taken & set(option.opts):
                again = copy(option)
                again.expose_value = False
                again.callback = _change_setting
                # Of the others the program's own help tells, to which this one's points.
                again.hidden = option.name != "json"
                cmd.params.append(again)
        cmd.epilog = f"{cmd.epilog}\n\nThe options of {self.name} may stand here, too: {self.name} --help"


_SETTINGS: Final = {field.name for field in fields(Settings)}


def _change_setting(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    name = str(parameter.name)
    if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
        context.obj = replace(context.obj, **{name: value})


def program_options(plane: Plane, command: F) -> F:
    """What every command of a program takes, as the fields of `Settings`; its token is that of `plane`."""
    for option in reversed(
        (
            click.option(
                "--tcp",
                metavar="HOST:PORT",
                help="TCP address of the server; a loopback address only. [127.0.0.1:MINIKMS_TCP_PORT]",
            ),
            click.option(
                "--unix",
                type=PATH,
                metavar="PATH",
                help="Unix socket of the server. [MINIKMS_UNIX_SOCKET or <data>/kms.sock]",
            ),
            click.option(
                "--server-user",
                metavar="USER",
                help="Who may be the server, beside you, root and the owner of the socket's directory: name, uid or any. "
                "[MINIKMS_SERVER_USER]",
            ),
            click.option(
                plane.option,
                "token_file",
                type=PATH,
                metavar="PATH",
                help=f"The {plane.name}; - is standard input. [{plane.file_variable} or <data>/{plane.file_name}]",
            ),
            click.option(
                "--no-token",
                is_flag=True,
                help="Be known by your user id, though there is a token; over a Unix socket only. [MINIKMS_NO_TOKEN=1]",
            ),
            allow_group_option,
            click.option(
                "--request-id", metavar="ID", help="What the server's logs call this: at most 64 printable characters."
            ),
            click.option("--json", is_flag=True, help="Print one JSON document."),
            version_option,
        )
    ):
        command = option(command)
    return command


def allow_group_option(command: F) -> F:
    """`--allow-group-readable-secrets`."""
    return click.option(
        "--allow-group-readable-secrets",
        is_flag=True,
        help="Take files of secrets as containers mount them: by a symbolic link, readable by a group of yours. "
        "[MINIKMS_ALLOW_GROUP_READABLE_SECRETS=1]",
    )(command)


def version_option(command: F) -> F:
    """`--version`."""

    def show(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
        if value:
            click.echo(f"{context.info_name} {package.version()}")
            context.exit()

    return click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )(command)


HELP: Final = {
    "help_option_names": ["-h", "--help"],
    # Beside four columns of names there is no room for words in a terminal of 80.
    "rich_help_config": {
        "options_table_column_types": ["opt_all_metavar", "help"],
        "append_metavars_help_string": "{}",
        "delimiter_comma": ", ",
    },
}
"""What a program's `context_settings` are."""


class VersionNumber(click.ParamType[int]):
    """A version as people write it: `3`, or `v3` as it is printed."""

    name = "version"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        digits = text[1:] if text[:1] in ("v", "V") else text
        if not (digits.isascii() and digits.isdigit()) or len(digits) > _MOST_DIGITS or not 1 <= int(digits) <= MAX_VERSION:
            self.fail("give a version such as 3 or v3", param, ctx)
        return int(digits)


class OneOf(click.Choice[str]):
    """One of these words, in capitals or not; told as they are written."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(words, case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        found = next((word for word in self.choices if word.casefold() == str(value).casefold()), None)
        return found if found is not None else self.fail(f"give one of {', '.join(self.choices)}", param, ctx)


class Count(click.ParamType[int]):
    """A number of things, one at least."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit()) or len(text) > _MOST_DIGITS or not int(text):
            self.fail("give a whole number from 1", param, ctx)
        return int(text)


def key_option(help_text: str, name: str = "--key", *, required: bool = False) -> Callable[[F], F]:
    """An option that names a key group."""
    return click.option(name, metavar="NAME", help=help_text, required=required, callback=_named_key)


def key_argument(command: F, *, is_needed: bool = True) -> F:
    """The key group that a command is about, as its argument KEY or after `--key`: given once, it becomes `key`."""

    @click.argument("key_argument", metavar="[KEY]", required=False, callback=_named_key)
    @key_option("The key group, instead of KEY.")
    @functools.wraps(command)
    def with_key(*arguments: Any, key_argument: str | None, key: str | None, **others: Any) -> Any:
        if key_argument is not None and key is not None and key_argument != key:
            raise click.UsageError("two key groups are given; give one", click.get_current_context())
        named = key_argument if key is None else key
        if named is None and is_needed:
            raise click.UsageError("name the key group", click.get_current_context())
        return command(*arguments, key=named, **others)

    return cast("F", with_key)


def _named_key(_context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    # From an unset variable of a script it would be the group `default` that is meant.
    if value is None:
        return None
    if is_blank(value):
        hint = "KEY" if isinstance(parameter, click.Argument) else None
        raise click.BadParameter("the name of a key group is not blank", param=parameter, param_hint=hint)
    utf8("the key group", value)
    return value


def epilog(program: str, *lines: str) -> str:
    """A help text's end: examples, and how to get completion."""
    name = program.replace("-", "_").upper()
    completion = f'$ eval "$(_{name}_COMPLETE=bash_source {program})"'
    return f"{examples(*lines)}\n\nCompletion in bash (also zsh_source, fish_source):\n\n{completion}"


def examples(*lines: str) -> str:
    """The examples under a command's help."""
    # rich-click keeps a line of an epilog apart only as a paragraph.
    return "\n\n".join(("Examples:", *(f"$ {line}" for line in lines)))


@contextlib.contextmanager
def reachable(
    settings: Settings, plane: Plane, source: str | None = None
) -> Iterator[tuple[Callable[[], KmsClient], Secret]]:
    """What connects to the server that `settings` name, as often as it is called, and the token it shows, wiped afterwards.

    For who lets time pass between two requests: the server closes a connection that idles. `source` is what the command
    reads, which may not be what the token comes from.
    """
    from kms.client.blocking import KmsClient

    one_reader_of_standard_input({plane.option: settings.token_file, "--in": source})
    address = find_server(settings.tcp, settings.unix, os.environ)
    if settings.no_token and address.unix is None:
        raise ConfigError("--no-token: the server knows a user id only over a Unix socket; give --unix PATH")
    if settings.no_token and settings.token_file is not None:
        raise ConfigError(f"--no-token and {plane.option} exclude each other; give one")
    wanted = _wanted(settings, plane)
    origin = wanted.origin
    with _token(settings, wanted, is_over_unix=address.unix is not None) as token:
        user = settings.server_user or os.environ.get("MINIKMS_SERVER_USER") or None

        def connect() -> KmsClient:
            if address.unix is not None:
                return KmsClient.connect_unix(address.unix, token=token, request_id=settings.request_id, server_user=user)
            return KmsClient.connect_tcp(
                address.host, address.port, token=token, request_id=settings.request_id, server_user=user
            )

        try:
            with naming():
                yield connect, token
        except AuthFailedError as error:
            told = _wrong_token(origin) if len(token) else _unknown_user(plane)
            raise AuthFailedError(f"{error}{told}") from None


@contextlib.contextmanager
def connected(settings: Settings, plane: Plane, source: str | None = None) -> Iterator[tuple[KmsClient, Secret]]:
    """A client of the server that `settings` name, and the token it shows, wiped afterwards; `source` as there."""
    with reachable(settings, plane, source) as (connect, token), connect() as client:
        yield client, token


def _wanted(settings: Settings, plane: Plane) -> Wanted:
    return Wanted(
        plane.name,
        plane.variable,
        plane.option,
        settings.token_file,
        lambda: token_file(plane, os.environ),
        allow_group=allows_group(settings.allow_group_readable_secrets),
    )


def _token(settings: Settings, wanted: Wanted, *, is_over_unix: bool) -> Secret:
    """The token that is shown; empty where the server knows who connects by the user id."""
    from kms.core.secret import Secret

    without = settings.no_token or (settings.token_file is None and is_on(os.environ, NO_TOKEN))
    if is_over_unix and without:
        return Secret(bytearray())
    if not is_over_unix:
        return obtain(wanted)
    return obtain_if_given(wanted) or Secret(bytearray())


def allows_group(flag: bool) -> bool:  # noqa: FBT001 - what the flag says
    """Whether `--allow-group-readable-secrets` was given, or its variable says so."""
    return flag or is_on(os.environ, ALLOW_GROUP)


def one_reader_of_standard_input(sources: Mapping[str, str | None]) -> None:
    """Raise `ConfigError` when more than one of these options was given `-`."""
    readers = [option for option, source in sources.items() if source == "-"]
    if len(readers) > 1:
        raise ConfigError(f"{' and '.join(readers)} all want standard input; give all but one a file")


def _wrong_token(origin: str) -> str:
    return (
        f" (from {origin}); kms-client shows the server's API token or a principal's, kms-admin its admin token or a "
        "principal's"
    )


def _unknown_user(plane: Plane) -> str:
    return (
        f": no token was shown, and the server does not know the user id {os.geteuid()}; name a token's file with "
        f"{plane.option}, or have this user named in the server's file of principals"
    )


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


def write_whole(target: Any, data: bytes) -> None:
    """`data` durably at a path, through symbolic links; or, where it names what is open, a pipe or a device, into that.

    `target` may also be None for standard output, or what `kms.cli.screen` makes of a terminal.
    """
    from kms.client.files import write_output

    write_output(target, data)
