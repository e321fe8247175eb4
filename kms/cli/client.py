"""`kms-client`: the data plane for people and scripts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import rich_click as click

from kms.cli import render
from kms.cli.options import (
    PATH,
    Settings,
    address_options,
    connected,
    epilog,
    examples,
    json_option,
    no_token_option,
    read_bounded,
    request_id_option,
    stream_or_path,
    utf8,
    version_option,
    write_whole,
)
from kms.cli.run import run, stop_signals_raise
from kms.client.environment import API
from kms.errors import ConfigError, InputError
from kms.host.hardening import forbid_dumps
from kms.limits import MAX_FRAME_BYTES

PROGRAM: Final = "kms-client"

_in = click.option("--in", "source", type=PATH, metavar="PATH", required=True, help="Input file; - is standard input.")
_out = click.option("--out", "target", type=PATH, metavar="PATH", required=True, help="Output file; - is standard output.")
_optional_out = click.option(
    "--out", "target", type=PATH, metavar="PATH", default="-", help="Output file instead of standard output."
)
_key = click.option("--key", metavar="NAME", help="Key group. [default: default]")
_from_key = click.option(
    "--from-key", metavar="NAME", help="The only key group that the input may be under; of any other it does not open."
)
_aad = click.option(
    "--aad", metavar="TEXT", default="", help="Encryption context: authenticated, not stored; needed again to decrypt."
)


@click.group(
    epilog=epilog(
        PROGRAM,
        "kms-client health",
        "echo -n s3cret | kms-client encrypt --in - --key billing",
        "kms-client encrypt-file --in db.dump --out db.dump.mke --aad backup",
        "kms-client decrypt-file --in db.dump.mke --out - --aad backup | psql",
    )
)
@address_options
@click.option("--token-file", type=PATH, metavar="PATH", help="API token. [MINIKMS_API_TOKEN_FILE or <data>/api.token]")
@no_token_option
@request_id_option
@json_option
@version_option
@click.pass_context
def command(
    context: click.Context,
    tcp: str | None,
    unix: str | None,
    server_user: str | None,
    token_file: str | None,
    request_id: str | None,
    *,
    no_token: bool,
    as_json: bool,
) -> None:
    """Encrypt and decrypt with keys that never leave the server.

    The token comes from MINIKMS_API_TOKEN, else from its file, else you are asked for it. The server is found at its
    Unix socket; over TCP only where --tcp or MINIKMS_TCP_PORT says so.
    """
    context.obj = Settings(tcp, unix, token_file, as_json, no_token, server_user, request_id)


@command.command(epilog=examples("kms-client health && echo up"))
@click.pass_obj
def health(settings: Settings) -> None:
    """Ask whether the server is at work and the token is right."""
    with connected(settings, API) as (client, _):
        detail = client.health()
    if settings.json:
        render.document(detail=detail)
    else:
        render.text(detail)


@command.command("generate-data-key", epilog=examples("kms-client --json generate-data-key --key billing"))
@_key
@_aad
@click.pass_obj
def generate_data_key(settings: Settings, key: str | None, aad: str) -> None:
    """Make a data key: once in the clear, to encrypt with and forget, and once wrapped, to keep beside the data."""
    context = _context(aad, key)
    with connected(settings, API) as (client, _):
        data_key = client.generate_data_key(key, context)
    if settings.json:
        render.document(plaintextDataKey=data_key.plaintext, wrappedDataKey=data_key.wrapped)
    else:
        render.text(f"plaintextDataKey: {_base64(data_key.plaintext)}")
        render.text(f"wrappedDataKey: {_base64(data_key.wrapped)}")


@command.command(
    epilog=examples(
        "kms-client encrypt --in password.txt --out password.enc",
        "echo -n s3cret | kms-client encrypt --in - --key billing --aad row-17",
    )
)
@click.option("--in", "source", type=PATH, metavar="PATH", help="Input file; - is standard input.")
@click.option("--text", metavar="STR", help="The plaintext itself. Other users can see it in the list of processes.")
@_optional_out
@_key
@_aad
@click.pass_obj
def encrypt(settings: Settings, source: str | None, text: str | None, target: str, key: str | None, aad: str) -> None:
    """Encrypt a small secret on the server: base64 on standard output, or raw bytes into a file."""
    if (source is None) == (text is None):
        raise ConfigError("give exactly one of --in and --text")
    context = _context(aad, key)
    with connected(settings, API) as (client, token):
        limit = _plaintext_limit(key, context, settings.request_id, len(token))
        if source is not None:
            plaintext = read_bounded(stream_or_path(source), limit, "use encrypt-file")
        else:
            plaintext = utf8("--text", text or "")
            if len(plaintext) > limit:
                raise InputError("--text is too large for one request; use encrypt-file")
        ciphertext = client.encrypt(plaintext, key, context)
    path = stream_or_path(target)
    if path is not None:
        _write_file(settings, path, ciphertext)
    elif settings.json:
        render.document(ciphertext=ciphertext)
    else:
        render.text(_base64(ciphertext))


@command.command(
    epilog=examples("kms-client decrypt --in password.enc", "kms-client decrypt --in - --aad row-17 < value.b64")
)
@_in
@_optional_out
@_from_key
@_aad
@click.pass_obj
def decrypt(settings: Settings, source: str, target: str, from_key: str | None, aad: str) -> None:
    """Decrypt what encrypt made, raw or as base64 text; writes the plaintext as it was, byte for byte."""
    context = _context(aad, from_key, "--from-key")
    with connected(settings, API) as (client, _):
        content = read_bounded(stream_or_path(source), MAX_FRAME_BYTES, "use decrypt-file for a file of encrypt-file")
        plaintext = client.decrypt(_ciphertext(content), context, source_key_id=from_key)
    path = stream_or_path(target)
    if path is not None:
        _write_file(settings, path, plaintext)
    elif settings.json:
        render.document(plaintext=plaintext)
    else:
        click.echo(plaintext, nl=False)


@command.command("encrypt-file", epilog=examples("tar c docs | kms-client encrypt-file --in - --out docs.tar.mke"))
@_in
@_out
@_key
@_aad
@click.pass_obj
def encrypt_file(settings: Settings, source: str, target: str, key: str | None, aad: str) -> None:
    """Encrypt a file of any size under a data key of its own, in constant memory."""
    context = _context(aad, key)
    origin, destination = _streams(settings, source, target)
    with connected(settings, API) as (client, _), render.progress(origin, destination) as progress:
        from kms.client import files

        files.encrypt_file(client, origin, destination, key_id=key, aad=context, progress=progress)
    _say_written(settings, destination)


@command.command("decrypt-file", epilog=examples("kms-client decrypt-file --in docs.tar.mke --out - | tar x"))
@_in
@_out
@_from_key
@_aad
@click.pass_obj
def decrypt_file(settings: Settings, source: str, target: str, from_key: str | None, aad: str) -> None:
    """Decrypt a file of encrypt-file; the output appears only when all of it has proved authentic."""
    context = _context(aad, from_key, "--from-key")
    origin, destination = _streams(settings, source, target)
    with connected(settings, API) as (client, _), render.progress(origin, destination) as progress:
        from kms.client import files

        files.decrypt_file(client, origin, destination, source_key_id=from_key, aad=context, progress=progress)
    _say_written(settings, destination)


@command.command(epilog=examples("kms-client reencrypt --in docs.tar.mke --out docs.tar.mke --key billing"))
@_in
@_out
@click.option("--key", metavar="NAME", required=True, help="Key group to move to, under its active version.")
@_from_key
@_aad
@click.pass_obj
def reencrypt(settings: Settings, source: str, target: str, key: str, from_key: str | None, aad: str) -> None:
    """Move a file or ciphertext to another key, or to a rotated one's new version, without seeing the plaintext.

    The input says itself which group it is under. Where others can write it, give --from-key.
    """
    _context(aad, from_key, "--from-key")
    context = _context(aad, key)
    origin, destination = _streams(settings, source, target)
    with connected(settings, API) as (client, _), render.progress(origin, destination) as progress:
        from kms.client import files

        files.reencrypt_file(
            client, origin, destination, key_id=key, source_key_id=from_key, aad=context, progress=progress
        )
    _say_written(settings, destination)


def _context(aad: str, key: str | None = None, option: str = "--key") -> bytes:
    if key is not None:
        utf8(option, key)
    return utf8("--aad", aad)


def _streams(settings: Settings, source: str, target: str) -> tuple[Path | None, Path | None]:
    if settings.json and target == "-":
        raise ConfigError("--json and --out - both want standard output; name a file with --out")
    return stream_or_path(source), stream_or_path(target)


def _write_file(settings: Settings, path: Path, data: bytes) -> None:
    write_whole(path, data)
    _say_written(settings, path)


def _say_written(settings: Settings, path: Path | None) -> None:
    if settings.json:
        render.document(out=str(path))


def _plaintext_limit(key: str | None, aad: bytes, request_id: str | None, token_bytes: int) -> int:
    from kms.wire.messages import Encrypt, encode

    others = len(encode(Encrypt(plaintext=b"", key_id=key, aad=aad, request_id=request_id))) + token_bytes
    return max(0, MAX_FRAME_BYTES - others) // 4 * 3


def _ciphertext(content: bytes) -> bytes:
    from kms.core.ciphertext import FORMAT
    from kms.core.container import MAGIC

    if content[:1] == bytes((FORMAT,)):
        return content
    if content.startswith(MAGIC):
        raise InputError("the input is an MKE1 file; use decrypt-file")
    try:
        raw = base64.b64decode(b"".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if raw[:1] != bytes((FORMAT,)):
        raise InputError("the input is neither a ciphertext nor the base64 of one; give what encrypt wrote")
    return raw


def _base64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kms-client` and return its exit status (docs/commands/exit-status.inc lists them)."""
    forbid_dumps()
    with stop_signals_raise():
        return run(command, PROGRAM, arguments)
