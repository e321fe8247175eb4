"""`kms-client`: the data plane for people and scripts."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Sequence
from typing import Any, Final

import rich_click as click

from kms.cli import render, screen
from kms.cli.data_options import (
    aad_options,
    also_option,
    bytes_option,
    force_option,
    from_key_option,
    group_option,
    opening,
    optional_target_option,
    origin,
    say_written,
    source_option,
    target_option,
)
from kms.cli.options import (
    HELP,
    PATH,
    OneOf,
    Program,
    Settings,
    connected,
    epilog,
    examples,
    program_options,
    read_bounded,
    stream_or_path,
    utf8,
    write_whole,
)
from kms.cli.refused import naming
from kms.cli.rewrapping import reencrypt
from kms.cli.run import run
from kms.cli.signals import stop_signals_raise
from kms.client.environment import API
from kms.errors import ConfigError, InputError
from kms.host.hardening import forbid_dumps
from kms.limits import KEY_BYTES, MAX_FRAME_BYTES

PROGRAM: Final = "kms-client"


@click.group(
    PROGRAM,
    cls=Program,
    context_settings=HELP,
    epilog=epilog(
        PROGRAM,
        "kms-client health",
        "echo -n s3cret | kms-client encrypt --in - --key billing",
        "kms-client encrypt-file --in db.dump --out db.dump.mke --aad backup",
        "kms-client decrypt-file --in db.dump.mke --out - --aad backup | psql",
    ),
)
@functools.partial(program_options, API)
@click.pass_context
def command(context: click.Context, /, **settings: Any) -> None:
    """Encrypt and decrypt with keys that never leave the server.

    The token is in --token-file, else in MINIKMS_API_TOKEN, else in its usual file. Who has none is known by the user id
    over a Unix socket; over TCP the token is asked for. The server is found at its Unix socket; over TCP only where --tcp
    or MINIKMS_TCP_PORT says so. These options may stand behind the name of a command, too.
    """
    context.obj = Settings(**settings)


@command.command(epilog=examples("kms-client health && echo up"))
@click.pass_obj
def health(settings: Settings) -> None:
    """Ask whether the server is at work and the token is right."""
    with connected(settings, API) as (client, _):
        detail = client.health()
    render.detail(settings, detail)


@command.command("generate-data-key", epilog=examples("kms-client --json generate-data-key --key billing"))
@group_option
@also_option
@bytes_option
@click.option("--no-plaintext", is_flag=True, help="Only wrapped, for who opens it later or elsewhere.")
@aad_options
@click.pass_obj
def generate_data_key(
    settings: Settings, key: str | None, also: tuple[str, ...], length: int | None, aad: bytes, *, no_plaintext: bool
) -> None:
    """Make a data key: once in the clear, to encrypt with and forget, and once wrapped, to keep beside the data."""
    fields: dict[str, Any] = {}
    with connected(settings, API) as (client, _), naming(key):
        if no_plaintext:
            wrapped = client.generate_data_key_without_plaintext(key, aad, length=length, also_key_ids=also)
            fields["wrappedDataKey"], others = wrapped.wrapped, wrapped.also
        else:
            made = client.generate_data_key(key, aad, length=length, also_key_ids=also)
            fields["plaintextDataKey"], fields["wrappedDataKey"], others = made.plaintext, made.wrapped, made.also
    if settings.json:
        render.document(**fields, **({"wrappedDataKeys": list(others)} if also else {}))
        return
    for name, value in fields.items():
        render.to_copy(f"{name}: {_base64(value)}")
    for name, value in zip(also, others, strict=True):
        render.to_copy(f"{name}: {_base64(value)}")


@command.command("generate-random", epilog=examples("kms-client generate-random --bytes 32"))
@bytes_option
@click.pass_obj
def generate_random(settings: Settings, length: int | None) -> None:
    """Get random bytes from the server, as base64."""
    with connected(settings, API) as (client, _):
        drawn = client.generate_random(KEY_BYTES if length is None else length)
    if settings.json:
        render.document(plaintext=drawn)
    else:
        render.to_copy(_base64(drawn))


@command.command(
    epilog=examples(
        "kms-client encrypt --in password.txt --out password.enc",
        "echo -n s3cret | kms-client encrypt --in - --key billing --aad row-17",
    )
)
@click.option("--in", "source", type=PATH, metavar="PATH", help="Input file; - is standard input.")
@click.option("--text", metavar="STR", help="The plaintext itself. Other users can see it in the list of processes.")
@optional_target_option
@group_option
@aad_options
@force_option
@click.pass_obj
def encrypt(
    settings: Settings, source: str | None, text: str | None, target: str, key: str | None, aad: bytes, *, force: bool
) -> None:
    """Encrypt a small secret on the server: base64 on standard output, or raw bytes into a file."""
    if (source is None) == (text is None):
        raise ConfigError("give exactly one of --in and --text")
    with connected(settings, API, source) as (client, token), naming(key):
        limit = _plaintext_limit(key, aad, settings.request_id, len(token))
        if source is not None:
            plaintext = read_bounded(stream_or_path(source), limit, "use encrypt-file")
        else:
            plaintext = utf8("--text", text or "")
            if len(plaintext) > limit:
                raise InputError("--text is too large for one request; use encrypt-file")
        ciphertext = client.encrypt(plaintext, key, aad)
    if target != "-":
        _write(settings, target, ciphertext, force=force)
    elif settings.json:
        render.document(ciphertext=ciphertext)
    else:
        render.text(_base64(ciphertext))


@command.command(
    epilog=examples("kms-client decrypt --in password.enc", "kms-client decrypt --in - --aad row-17 < value.b64")
)
@source_option
@optional_target_option
@from_key_option
@aad_options
@force_option
@click.pass_obj
def decrypt(settings: Settings, source: str, target: str, from_key: str | None, aad: bytes, *, force: bool) -> None:
    """Decrypt what encrypt made, raw or as base64 text; writes the plaintext as it was, byte for byte."""
    with connected(settings, API, source) as (client, _), opening(from_key):
        content = read_bounded(stream_or_path(source), MAX_FRAME_BYTES, "use decrypt-file for a file of encrypt-file")
        plaintext = client.decrypt(_ciphertext(content), aad, source_key_id=from_key)
    if settings.json and target == "-":
        render.document(plaintext=plaintext)
    else:
        _write(settings, target, plaintext, force=force)


@command.command("encrypt-file", epilog=examples("tar c docs | kms-client encrypt-file --in - --out docs.tar.mke"))
@source_option
@target_option
@group_option
@also_option
@click.option(
    "--format",
    "file_format",
    type=OneOf(["mke2", "mke1"]),
    metavar="FORMAT",
    default="mke2",
    help="mke2, or mke1 for programs that read nothing else (up to 64 GiB). [default: mke2]",
)
@aad_options
@force_option
@click.pass_obj
def encrypt_file(
    settings: Settings,
    source: str,
    target: str,
    key: str | None,
    also: tuple[str, ...],
    file_format: str,
    aad: bytes,
    *,
    force: bool,
) -> None:
    """Encrypt a file of any size under a data key of its own, in constant memory."""
    begin = origin(settings, source, target)
    with (
        connected(settings, API, source) as (client, _),
        naming(key),
        screen.target(target, force=force) as destination,
        render.progress(begin, screen.path_of(destination)) as progress,
    ):
        from kms.client import files

        files.encrypt_file(
            client,
            begin,
            destination,
            key_id=key,
            aad=aad,
            progress=progress,
            file_format=files.format_named(file_format),
            also_key_ids=also,
        )
    say_written(settings, target)


@command.command("decrypt-file", epilog=examples("kms-client decrypt-file --in docs.tar.mke --out - | tar x"))
@source_option
@target_option
@from_key_option
@aad_options
@force_option
@click.pass_obj
def decrypt_file(settings: Settings, source: str, target: str, from_key: str | None, aad: bytes, *, force: bool) -> None:
    """Decrypt a file of encrypt-file. A file appears only when all has proved authentic; a pipe gets what has so far."""
    begin = origin(settings, source, target)
    with (
        connected(settings, API, source) as (client, _),
        opening(from_key),
        screen.target(target, force=force) as destination,
        render.progress(begin, screen.path_of(destination)) as progress,
    ):
        from kms.client import files

        files.decrypt_file(client, begin, destination, source_key_id=from_key, aad=aad, progress=progress)
    say_written(settings, target)


def _write(settings: Settings, target: str, data: bytes, *, force: bool) -> None:
    with screen.target(target, force=force) as destination:
        write_whole(destination, data)
    say_written(settings, target)


def _plaintext_limit(key: str | None, aad: bytes, request_id: str | None, token_bytes: int) -> int:
    from kms.wire.messages import Encrypt, encode

    others = len(encode(Encrypt(plaintext=b"", key_id=key, aad=aad, request_id=request_id))) + token_bytes
    return max(0, MAX_FRAME_BYTES - others) // 4 * 3


def _ciphertext(content: bytes) -> bytes:
    from kms.core.ciphertext import is_one
    from kms.core.mke1 import MAGIC as MKE1
    from kms.core.mke2 import MAGIC as MKE2

    if is_one(content):
        return content
    if content.startswith((MKE1, MKE2)):
        raise InputError("the input is a file of encrypt-file; use decrypt-file")
    try:
        raw = base64.b64decode(b"".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not is_one(raw):
        raise InputError("the input is neither a ciphertext nor the base64 of one; give what encrypt wrote")
    return raw


def _base64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


command.add_command(reencrypt)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kms-client` and return its exit status (docs/commands/exit-status.inc lists them)."""
    with stop_signals_raise():
        forbid_dumps()
        return run(command, PROGRAM, arguments)
