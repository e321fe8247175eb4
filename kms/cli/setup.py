"""Setting up: the commands of `kms-admin` that make what a server needs, or change its passphrase. They need no server."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rich_click as click

from kms.cli import render
from kms.cli.options import PATH, Settings, allows_group, examples, one_reader_of_standard_input
from kms.cli.prompt import Wanted, obtain_new_passphrase, obtain_passphrase
from kms.errors import ConfigError, FileAccessError, InputMissingError, SaveOutcomeUnknownError
from kms.limits import TOKEN_BYTES
from kms.server.config import Places

if TYPE_CHECKING:
    from kms.core.secret import Passphrase, Secret

_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_TOKEN_CHARACTERS: Final = -(-TOKEN_BYTES * 8 // 6)
"""Six bits each."""

keystore_option = click.option(
    "--keystore", type=PATH, metavar="PATH", help="The keystore. [MINIKMS_KEYSTORE or <data>/keystore.json]"
)
passphrase_file_option = click.option(
    "--passphrase-file",
    type=PATH,
    metavar="PATH",
    help="The passphrase; - is standard input. [MINIKMS_PASSPHRASE or MINIKMS_PASSPHRASE_FILE; else asked for]",
)
audit_log_option = click.option(
    "--audit-log", type=PATH, metavar="PATH", help="Audit log. [MINIKMS_AUDIT_LOG or <data>/audit.log]"
)
_allow_weak = click.option("--allow-weak", is_flag=True, help="Take a passphrase of less than 8 characters.")


@click.command(epilog=examples("kms-admin init", "kms-admin init --passphrase-file /root/passphrase"))
@keystore_option
@click.option(
    "--token-file", type=PATH, metavar="PATH", help="Where the API token goes. [MINIKMS_API_TOKEN_FILE or <data>/api.token]"
)
@click.option(
    "--admin-token-file",
    type=PATH,
    metavar="PATH",
    help="Where the admin token goes. [MINIKMS_ADMIN_TOKEN_FILE or <data>/admin.token]",
)
@passphrase_file_option
@click.option("--keystore-only", is_flag=True, help="Make no tokens: they come from elsewhere.")
@_allow_weak
@click.pass_obj
def init(
    settings: Settings,
    keystore: str | None,
    token_file: str | None,
    admin_token_file: str | None,
    passphrase_file: str | None,
    *,
    keystore_only: bool,
    allow_weak: bool,
) -> None:
    """Make the data directory, two fresh tokens and a keystore with the key group `default`.

    Needs no server. If any of them is there already, or anything that an earlier keystore has left, nothing is touched.
    The passphrase has 8 characters at least; how long a weak one withstands is told.
    """
    named = {"keystore": keystore, "token_file": token_file, "admin_token_file": admin_token_file or settings.token_file}
    places = Places(named | {"passphrase_file": passphrase_file}, os.environ)
    keystore_path = places.keystore
    tokens = () if keystore_only else places.new_token_files
    made = (keystore_path, *tokens)
    if len(set(made)) != len(made):
        raise ConfigError("keystore, token file and admin token file must be three files; name another")
    _refuse_what_is_there(places, made)
    _check_directory(keystore_path.parent)
    with _new_passphrase(settings, places, passphrase_file, allow_weak=allow_weak) as passphrase:
        _make(keystore_path, tokens, passphrase)
    if settings.json:
        files = {"tokenFile": tokens[0], "adminTokenFile": tokens[1]} if tokens else {}
        render.document(keystore=keystore_path, **files)
        return
    for what, path in zip(("keystore    ", "API token   ", "admin token "), made, strict=False):
        render.text(f"{what} {path}")
    render.text(_KEEP_IT_SAFE)
    if tokens:
        render.text("Next: start kms-server, then try: kms-client health")


_KEEP_IT_SAFE: Final = "Keep the passphrase safe: without it nothing can be decrypted, and nobody can recover it."


def _refuse_what_is_there(places: Places, made: Sequence[Path]) -> None:
    from kms.storage.file import trace_of_another

    keystore = places.keystore
    trace = None if os.path.lexists(keystore) else trace_of_another(keystore, places.audit_log_if_known)
    if trace is not None:
        raise ConfigError(
            f"there was a keystore at {keystore}: {trace} is left of it. Nothing was changed; put the keystore "
            "back, or move all of that away"
        )
    for path in made:
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already and nothing was changed; move it away, or just start kms-server")


def _check_directory(path: Path) -> None:
    """Raise `SecretFileError` for one that is there and not private, before anybody thinks of a passphrase for it."""
    from kms.host.private import make_private_directory

    if path.exists():
        make_private_directory(path)


def _make(keystore: Path, tokens: Sequence[Path], passphrase: Secret) -> None:
    from kms.core.derive import KdfParameters
    from kms.storage.file import initialise
    from kms.storage.lock import KeystoreLock

    made: list[Path] = []
    with KeystoreLock(keystore) as lock:
        try:
            for path in tokens:
                # Looked at again under the lock: another init may just have finished.
                if os.path.lexists(path):
                    raise ConfigError(f"{path} exists already and nothing was changed; move it away")
                make_token(path, made.append)
            store, _ = initialise(lock, passphrase, now=int(time.time()), parameters=KdfParameters())
            store.wipe()
        except SaveOutcomeUnknownError:
            # The keystore may be there; with its tokens it is of use.
            raise
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise


def make_token(path: Path, may_exist: Callable[[Path], None] = lambda _: None) -> None:
    """A fresh token in a new private file, whose directory is made if it is missing; `may_exist` as in `_write_token`."""
    from kms.host.private import make_private_directory

    if not path.parent.exists():
        make_private_directory(path.parent)
    with _fresh_token() as token:
        _write_token(path, token, may_exist)


def _write_token(path: Path, token: memoryview, may_exist: Callable[[Path], None] = lambda _: None) -> None:
    """`token`, durably, in a new file of mode 0600 at `path`, with which `may_exist` is called before it does.

    Whole or not at all: of one that a power cut has cut short, the rest could be guessed.
    """
    from kms.host.durable import DurableFile, remove_stale_temp_files

    try:
        remove_stale_temp_files(path)
        with DurableFile(path) as file:
            file.write(token)
            file.write(b"\n")
            may_exist(path)
            file.commit()
    except OSError as error:
        raise FileAccessError(f"cannot make {path}: {error.strerror}; nothing was kept") from error


@contextlib.contextmanager
def _fresh_token() -> Iterator[memoryview]:
    """A token that nobody has had, for as long as this is open."""
    from kms.core.secret import Secret
    from kms.host.entropy import random_secret

    with (
        random_secret(_TOKEN_CHARACTERS) as random,
        random.view() as octets,
        Secret(bytearray(_ALPHABET[octet % len(_ALPHABET)] for octet in octets)) as token,
        token.view() as view,
    ):
        yield view


@click.command("new-token", epilog=examples("kms-admin new-token billing --out billing.token"))
@click.argument("name")
@click.option(
    "--out",
    "target",
    type=PATH,
    metavar="PATH",
    help="A new file for the token, for you alone; - is standard output.",
)
@click.pass_obj
def new_token(settings: Settings, name: str, target: str | None) -> None:
    """Make a fresh token for the principal NAME, and show the line for the file of principals, which does not hold it.

    Needs no server. With --out the token is in that file alone, and the line on standard output; without it the token
    is printed once, and the line on standard error.
    """
    from hashlib import sha256

    from kms.service.principals import check_name

    check_name(name)
    with _fresh_token() as token:
        digest = sha256(token).hexdigest()
        line = f'token_sha256 = ["{digest}"]'
        if target is None or target == "-":
            if settings.json:
                render.document(principal=name, token=str(token, "ascii"), tokenSha256=digest)
                return
            # First: a token whose digest nobody has is of no use.
            render.to_copy(line, err=True)
            render.octets(token)
            if render.is_terminal(sys.stdout):
                render.remark("The token is shown this once; --out would have put it into a file")
            return
        path = Path(target)
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already and nothing was changed; name another, or move it away")
        if not path.parent.is_dir():
            raise FileAccessError(f"there is no directory {path.parent}; make it first, or name another file")
        _write_token(path, token)
    if settings.json:
        render.document(principal=name, tokenFile=path, tokenSha256=digest)
    else:
        render.to_copy(line)


@click.command("change-passphrase", epilog=examples("kms-admin change-passphrase --keystore ~/.mini-kms/keystore.json"))
@keystore_option
@passphrase_file_option
@click.option(
    "--new-passphrase-file",
    type=PATH,
    metavar="PATH",
    help="New passphrase; - is standard input. [MINIKMS_NEW_PASSPHRASE; else asked for]",
)
@audit_log_option
@_allow_weak
@click.pass_obj
def change_passphrase(
    settings: Settings,
    keystore: str | None,
    passphrase_file: str | None,
    new_passphrase_file: str | None,
    audit_log: str | None,
    *,
    allow_weak: bool,
) -> None:
    """Wrap all keys under a new passphrase; the server must be stopped. Every ciphertext still opens.

    The audit log, if there is one, goes on under the new passphrase, which verifies what was written before, too.
    """
    from kms.core.derive import KdfParameters
    from kms.storage import file, passphrases
    from kms.storage.audit_log import is_kept
    from kms.storage.lock import KeystoreLock

    one_reader_of_standard_input({"--passphrase-file": passphrase_file, "--new-passphrase-file": new_passphrase_file})
    named = {"keystore": keystore, "passphrase_file": passphrase_file, "audit_log": audit_log}
    places = Places(named, os.environ)
    if not os.path.lexists(places.keystore):
        raise InputMissingError(f"there is no keystore at {places.keystore}; make one with: kms-admin init")
    with KeystoreLock(places.keystore) as lock, existing_passphrase(settings, places, passphrase_file) as given:
        old = passphrases.opening_form(places.keystore, given)
        # Before anybody is asked to think of a new one.
        passphrases.check(places.keystore, old)
        wanted = Wanted(
            "new passphrase",
            "MINIKMS_NEW_PASSPHRASE",
            "--new-passphrase-file",
            new_passphrase_file,
            allow_group=allows_group(settings.allow_group_readable_secrets),
        )
        with obtain_new_passphrase(wanted, render.remark, allow_weak=allow_weak) as new:
            log = places.audit_log if is_kept(places.audit_log) else None
            is_same = old.is_same(new)
            notes = file.change_passphrase(lock, old, new, parameters=KdfParameters(), audit_log=log)
    for note in notes:
        render.remark(note)
    done = "the keystore was written anew, under the same passphrase as before" if is_same else "passphrase changed"
    render.detail(settings, done)


def places_with_keystore(**named: str | None) -> Places:
    """Where things are by these options, for what needs a keystore; raises `InputMissingError` where there is none."""
    places = Places(named, os.environ)
    if not os.path.lexists(places.keystore):
        raise InputMissingError(f"there is no keystore at {places.keystore}; name it with --keystore")
    return places


def existing_passphrase(settings: Settings, places: Places, flag: str | None) -> Passphrase:
    """The passphrase of the keystore that is there; `flag` is what --passphrase-file named."""
    return obtain_passphrase(_wanted(settings, places, flag))


def _new_passphrase(settings: Settings, places: Places, flag: str | None, *, allow_weak: bool) -> Passphrase:
    return obtain_new_passphrase(_wanted(settings, places, flag), render.remark, allow_weak=allow_weak)


def _wanted(settings: Settings, places: Places, flag: str | None) -> Wanted:
    allow_group = allows_group(settings.allow_group_readable_secrets)
    return Wanted(
        "passphrase",
        "MINIKMS_PASSPHRASE",
        "--passphrase-file",
        flag,
        lambda: places.passphrase_file,
        allow_group=allow_group,
    )
