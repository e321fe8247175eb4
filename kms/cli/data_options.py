"""What the commands of `kms-client` have in common: options, and what is told when something does not open."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import rich_click as click

from kms.cli import render
from kms.cli.options import (
    PATH,
    F,
    Settings,
    key_option,
    one_reader_of_standard_input,
    read_bounded,
    stream_or_path,
    utf8,
)
from kms.errors import ConfigError, DecryptionFailedError, KmsError
from kms.limits import MAX_DATA_KEY_BYTES, MAX_FRAME_BYTES

source_option = click.option(
    "--in", "source", type=PATH, metavar="PATH", required=True, help="Input file; - is standard input."
)
target_option = click.option(
    "--out",
    "target",
    type=PATH,
    metavar="PATH",
    required=True,
    help="Output file, replaced if it is there; - is standard output.",
)
optional_target_option = click.option(
    "--out", "target", type=PATH, metavar="PATH", default="-", help="Output file instead of standard output."
)
group_option = key_option("Key group. [default: default]")
also_option = click.option(
    "--also-key", "also", metavar="NAME", multiple=True, help="One more key group that opens it; up to 15, each named so."
)
bytes_option = click.option(
    "--bytes",
    "length",
    type=click.IntRange(1, MAX_DATA_KEY_BYTES),
    metavar="N",
    help="How many, 1 to 1024. [default: 32]",
)
from_key_option = key_option("The only key group that the input may be under; of any other it does not open.", "--from-key")
force_option = click.option("--force", is_flag=True, help="Write to a terminal what is not printable text, too.")


def aad_options(command: F) -> F:
    """`--aad` and `--aad-file`, which become `aad`."""

    @click.option(
        "--aad", "aad_text", metavar="TEXT", help="Encryption context: authenticated, not stored; needed again to decrypt."
    )
    @click.option("--aad-file", type=PATH, metavar="PATH", help="Encryption context that is not text: all of this file.")
    @functools.wraps(command)
    def with_aad(*arguments: Any, aad_text: str | None, aad_file: str | None, **others: Any) -> Any:
        return command(*arguments, aad=_context(aad_text, aad_file, others.get("source")), **others)

    return cast("F", with_aad)


def _context(text: str | None, file: str | None, source: str | None) -> bytes:
    if file is None:
        return utf8("--aad", text or "")
    if text is not None:
        raise ConfigError("--aad and --aad-file exclude each other; give one")
    one_reader_of_standard_input({"--aad-file": file, "--in": source})
    return read_bounded(stream_or_path(file), MAX_FRAME_BYTES // 2, "an encryption context names what it belongs to")


def origin(settings: Settings, source: str, target: str) -> Path | None:
    """Where to read; raises `ConfigError` where the output would be in the way of JSON."""
    if settings.json and target == "-":
        raise ConfigError("--json and --out - both want standard output; name a file with --out")
    return stream_or_path(source)


def say_written(settings: Settings, target: str) -> None:
    """With `--json`, what was written."""
    if settings.json:
        render.document(out=Path(target))


class CannotOpenError(KmsError):
    """`DecryptionFailedError`, which says nothing more on purpose, with what somebody can look at."""

    exit_code = DecryptionFailedError.exit_code


@contextlib.contextmanager
def opening(from_key: str | None) -> Iterator[None]:
    """Say what to look at when what is opened inside does not: the server does not tell which of them it is."""
    try:
        yield
    except DecryptionFailedError as error:
        if type(error) is not DecryptionFailedError:
            raise
        source = "" if from_key is None else ", that it is under the key group of --from-key"
        raise CannotOpenError(
            f"{error}; check that --aad is what it was encrypted with{source}, that its key version is enabled and was not "
            "destroyed, and that it is whole"
        ) from None
