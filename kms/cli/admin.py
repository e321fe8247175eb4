"""`kms-admin`: setting up, and the control plane."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rich_click as click

from kms.cli import prompt, render, retiring
from kms.cli.options import (
    PATH,
    Settings,
    address_options,
    connected,
    epilog,
    examples,
    json_option,
    no_token_option,
    reachable,
    request_id_option,
    utf8,
    version_option,
)
from kms.cli.run import EXIT_INTERRUPTED, run, stop_signals_raise
from kms.client.environment import ADMIN, API
from kms.core.policy import Operation
from kms.errors import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    EXIT_REFUSED,
    ConfigError,
    FileAccessError,
    InputMissingError,
    SaveOutcomeUnknownError,
    UnauthorizedError,
)
from kms.host.hardening import forbid_dumps
from kms.host.paths import data_directory
from kms.limits import MAX_VERSION, TOKEN_BYTES
from kms.server.config import ServerConfig, resolve

if TYPE_CHECKING:
    from kms.core.audit_verifier import Verifier
    from kms.core.secret import Secret
    from kms.core.usage import TimedDisable
    from kms.wire.messages import KeyGroupView

PROGRAM: Final = "kms-admin"
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_TOKEN_CHARACTERS: Final = -(-TOKEN_BYTES * 8 // 6)
"""Six bits each."""

_key = click.option("--key", metavar="NAME", required=True, help="Key group.")
_version = click.option(
    "--version", type=click.IntRange(1, MAX_VERSION), metavar="N", required=True, help="Version of its key."
)
_keystore = click.option("--keystore", type=PATH, metavar="PATH", help="[MINIKMS_KEYSTORE or <data>/keystore.json]")
_passphrase_file = click.option(
    "--passphrase-file", type=PATH, metavar="PATH", help="Passphrase. [MINIKMS_PASSPHRASE_FILE; else asked for]"
)
_audit_log = click.option(
    "--audit-log", type=PATH, metavar="PATH", help="Audit log. [MINIKMS_AUDIT_LOG or <data>/audit.log]"
)


@click.group(
    epilog=epilog(
        PROGRAM,
        "kms-admin init",
        "kms-admin create-key --key billing",
        "kms-admin rotate-key --key billing",
        "kms-admin --json list-keys | jq .keyGroups",
        "kms-admin new-token billing > billing.token",
    )
)
@address_options
@click.option(
    "--admin-token-file", type=PATH, metavar="PATH", help="Admin token. [MINIKMS_ADMIN_TOKEN_FILE or <data>/admin.token]"
)
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
    admin_token_file: str | None,
    request_id: str | None,
    *,
    no_token: bool,
    as_json: bool,
) -> None:
    """Set up mini-kms and manage its keys.

    The admin token comes from MINIKMS_ADMIN_TOKEN, else from its file, else you are asked for it. The server is found
    at its Unix socket; over TCP only where --tcp or MINIKMS_TCP_PORT says so.
    """
    context.obj = Settings(tcp, unix, admin_token_file, as_json, no_token, server_user, request_id)


@command.command("list-keys", epilog=examples("kms-admin list-keys | grep ACTIVE", "kms-admin list-keys --usage"))
@click.option("--usage", is_flag=True, help="Also when each version was last used, by whom and for what.")
@click.pass_obj
def list_keys(settings: Settings, *, usage: bool) -> None:
    """List the key groups and their versions."""
    with connected(settings, ADMIN) as (client, _):
        groups = list(client.iter_key_groups(usage=usage))
    if settings.json:
        render.document(keyGroups=groups)
    else:
        render.key_groups(groups, usage=usage)


@command.command("describe-key", epilog=examples("kms-admin describe-key --key billing"))
@_key
@click.pass_obj
def describe_key(settings: Settings, key: str) -> None:
    """Tell all that is known of one key group: its versions, how each is used, and who was refused a disabled one."""
    with connected(settings, ADMIN) as (client, _):
        group = client.describe_key_group(key)
    if settings.json:
        render.document(keyGroup=group)
    else:
        render.key_group(group, time.time())


@command.command("create-key", epilog=examples("kms-admin create-key --key billing"))
@_key
@click.pass_obj
def create_key(settings: Settings, key: str) -> None:
    """Make a key group; its version 1 is active."""
    with connected(settings, ADMIN) as (client, _):
        group = client.create_key_group(key)
    _show_group(settings, group, "created")


@command.command("rotate-key", epilog=examples("kms-admin rotate-key --key billing"))
@_key
@click.pass_obj
def rotate_key(settings: Settings, key: str) -> None:
    """Make a new active version; what older ones encrypted still opens."""
    with connected(settings, ADMIN) as (client, _):
        group = client.rotate_key_group(key)
    _show_group(settings, group, "rotated")


@command.command(
    "disable-version",
    epilog=examples(
        "kms-admin disable-version --key billing --version 1",
        "kms-admin disable-version --key billing --version 1 --for 2h",
    ),
)
@_key
@_version
@click.option(
    "--for",
    "seconds",
    callback=retiring.duration,
    metavar="TIME",
    help="Until then only (30s, 15m, 2h, 7d); the server enables it again by itself. Waits, and tells who was refused.",
)
@click.option("--no-wait", is_flag=True, help="With --for: do not wait; describe-key tells who was refused.")
@click.pass_obj
def disable_version(settings: Settings, key: str, version: int, seconds: int | None, *, no_wait: bool) -> int:
    """Forbid a version to decrypt, until it is enabled again."""
    if no_wait and seconds is None:
        raise click.UsageError("--no-wait goes with --for; without it the version would be disabled for good")
    with reachable(settings, ADMIN) as (connect, _):
        with connect() as client:
            detail = client.disable_version(key, version, for_seconds=seconds)
        if seconds is None or no_wait:
            _show_detail(settings, detail)
            return EXIT_OK
        trial: TimedDisable | None = None
        try:
            with connect() as client:
                trial = retiring.currently(client, key, version)
            trial, state = retiring.wait_until_enabled(connect, key, version, trial)
        except UnauthorizedError:
            _show_detail(settings, f"{detail}; you may not see who is refused meanwhile, the server's log will tell")
            return EXIT_OK
        except KeyboardInterrupt:
            again = "by itself" if trial is None else render.moment(trial.until_epoch_sec, time.time())
            render.remark(f"stopped waiting; the server enables {key} v{version} {again}, and describe-key tells the rest")
            return EXIT_INTERRUPTED
    if settings.json:
        render.document(keyId=key, version=version, status=state, timedDisable=trial)
    else:
        render.text(f"{key} v{version} is {state}; refused while it was disabled:")
        for line in render.refusals(trial, time.time()):
            render.text(f"  {line}")
    return EXIT_OK


@command.command("enable-version", epilog=examples("kms-admin enable-version --key billing --version 1"))
@_key
@_version
@click.pass_obj
def enable_version(settings: Settings, key: str, version: int) -> None:
    """Let a disabled version decrypt again."""
    with connected(settings, ADMIN) as (client, _):
        detail = client.enable_version(key, version)
    _show_detail(settings, detail)


@command.command("destroy-version", epilog=examples("kms-admin destroy-version --key billing --version 1"))
@_key
@_version
@click.option("--yes", is_flag=True, help="Do not ask; for scripts.")
@click.pass_obj
def destroy_version(settings: Settings, key: str, version: int, *, yes: bool) -> None:
    """Destroy a version's key for good: nothing it encrypted can ever be decrypted again."""
    with reachable(settings, ADMIN) as (connect, _):
        if not yes:
            retiring.confirm_destruction(connect, key, version)
        with connect() as client:
            detail = client.destroy_version(key, version)
    _show_detail(settings, detail)


@command.command(epilog=examples("kms-admin init", "kms-admin init --passphrase-file /root/passphrase"))
@_keystore
@click.option("--token-file", type=PATH, metavar="PATH", help="[MINIKMS_API_TOKEN_FILE or <data>/api.token]")
@click.option("--admin-token-file", type=PATH, metavar="PATH", help="[MINIKMS_ADMIN_TOKEN_FILE or <data>/admin.token]")
@_passphrase_file
@click.option("--keystore-only", is_flag=True, help="Make no tokens: they come from elsewhere.")
@click.pass_obj
def init(
    settings: Settings,
    keystore: str | None,
    token_file: str | None,
    admin_token_file: str | None,
    passphrase_file: str | None,
    *,
    keystore_only: bool,
) -> None:
    """Make the data directory, two fresh tokens and a keystore with the group `default`.

    Needs no server. If any of them is there already, or anything that an earlier keystore has left, nothing is touched.
    """
    config = resolve(
        {
            "keystore": keystore,
            "token_file": token_file,
            "admin_token_file": admin_token_file or settings.token_file,
            "passphrase_file": passphrase_file,
        },
        os.environ,
    )
    data = data_directory(os.environ)
    tokens = (config.token_file or data / API.file_name, config.admin_token_file or data / ADMIN.file_name)
    if len({config.keystore, *tokens}) != 1 + len(tokens):
        raise ConfigError("keystore, token file and admin token file must be three files; name another")
    from kms.storage.file import trace_of_another

    trace = None if os.path.lexists(config.keystore) else trace_of_another(config.keystore, config.audit.path)
    if trace is not None:
        raise ConfigError(
            f"there was a keystore at {config.keystore}: {trace} is left of it. Nothing was changed; put the keystore "
            "back, or move all of that away"
        )
    made = (config.keystore,) if keystore_only else (config.keystore, *tokens)
    for path in made:
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already and nothing was changed; move it away, or just start kms-server")
    with _passphrase(config, new=True) as passphrase:
        _make(config.keystore, () if keystore_only else tokens, passphrase)
    if keystore_only:
        if settings.json:
            render.document(keystore=str(config.keystore))
        else:
            render.text(f"keystore     {config.keystore}")
            render.text(_KEEP_IT_SAFE)
        return
    if settings.json:
        render.document(keystore=str(config.keystore), tokenFile=str(tokens[0]), adminTokenFile=str(tokens[1]))
        return
    render.text(f"keystore     {config.keystore}")
    render.text(f"API token    {tokens[0]}")
    render.text(f"admin token  {tokens[1]}")
    render.text(_KEEP_IT_SAFE)
    render.text("Next: start kms-server, then try: kms-client health")


_KEEP_IT_SAFE: Final = "Keep the passphrase safe: without it nothing can be decrypted, and nobody can recover it."


def _make(keystore: Path, tokens: Sequence[Path], passphrase: Secret) -> None:
    from kms.core.derive import KdfParameters
    from kms.storage.file import KeystoreLock, initialise

    made: list[Path] = []
    with KeystoreLock(keystore) as lock:
        try:
            for path in tokens:
                # Looked at again under the lock: another init may just have finished.
                if os.path.lexists(path):
                    raise ConfigError(f"{path} exists already and nothing was changed; move it away")
                _write_token(path, made)
            store, _ = initialise(lock, passphrase, now=int(time.time()), parameters=KdfParameters())
            store.wipe()
        except SaveOutcomeUnknownError:
            # The keystore may be there; with its tokens it is of use.
            raise
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise


def _write_token(path: Path, made: list[Path]) -> None:
    """A fresh token, durably, in a new file of mode 0600 at `path`, which joins `made` once it may exist.

    Whole or not at all: of one that a power cut has cut short, the rest could be guessed.
    """
    from kms.host.durable import DurableFile, remove_stale_temp_files
    from kms.host.private import make_private_directory

    if not path.parent.exists():
        make_private_directory(path.parent)
    try:
        remove_stale_temp_files(path)
        with DurableFile(path) as file:
            with _fresh_token() as token:
                file.write(token)
            file.write(b"\n")
            made.append(path)
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


@command.command("new-token", epilog=examples("kms-admin new-token billing > billing.token"))
@click.argument("name")
@click.pass_obj
def new_token(settings: Settings, name: str) -> None:
    """Print a fresh token for the principal NAME, once, and on standard error the line for the file of principals.

    Needs no server, and writes nothing: the token is on standard output alone.
    """
    from hashlib import sha256

    from kms.service.principals import check_name

    check_name(name)
    with _fresh_token() as token:
        digest = sha256(token).hexdigest()
        if settings.json:
            render.document(principal=name, token=str(token, "ascii"), tokenSha256=digest)
            return
        click.echo(f'token_sha256 = ["{digest}"]', err=True)
        render.octets(token)


@command.command(epilog=examples("kms-admin explain --principal billing --operation Decrypt --key billing-2026"))
@click.option("--principal", metavar="NAME", required=True, help="Who asks.")
@click.option("--operation", type=click.Choice([one.value for one in Operation]), required=True, help="For what.")
@_key
@click.option("--aad", metavar="TEXT", default="", help="The AAD of the request.")
@click.option("--principals", type=PATH, metavar="PATH", help="[MINIKMS_PRINCIPALS or <data>/principals.toml]")
@click.pass_obj
def explain(settings: Settings, principal: str, operation: str, key: str, aad: str, principals: str | None) -> int:
    """Say which rule of the file of principals allows or refuses an operation; the exit code is 0 or 1.

    Needs no server: the file is read as it is, which a server does only at its start and on SIGHUP. ReEncrypt needs
    Decrypt on the group it moves from, too.
    """
    from kms.service.principals import load

    file = load(resolve({"principals": principals}, os.environ).principals)
    member = file.members.get(principal)
    if member is None:
        raise ConfigError(f"{file.path} has no principal of this name; it has {', '.join(file.members) or 'none'}")
    verdict = member.grants.explain(Operation(operation), key, utf8("--aad", aad))
    if settings.json:
        render.document(allowed=verdict.allowed, rule=verdict.rule, reason=verdict.reason)
    else:
        render.text(f"{'allowed' if verdict.allowed else 'refused'}: {verdict.reason}")
    return EXIT_OK if verdict.allowed else EXIT_REFUSED


@command.command("change-passphrase", epilog=examples("kms-admin change-passphrase --keystore ~/.mini-kms/keystore.json"))
@_keystore
@_passphrase_file
@click.option(
    "--new-passphrase-file",
    type=PATH,
    metavar="PATH",
    help="New passphrase. [MINIKMS_NEW_PASSPHRASE first; else asked for]",
)
@_audit_log
@click.pass_obj
def change_passphrase(
    settings: Settings,
    keystore: str | None,
    passphrase_file: str | None,
    new_passphrase_file: str | None,
    audit_log: str | None,
) -> None:
    """Wrap all keys under a new passphrase; the server must be stopped. Every ciphertext still opens.

    The audit log, if there is one, goes on under the new passphrase, which verifies what was written before, too.
    """
    from kms.core.derive import KdfParameters
    from kms.storage import file
    from kms.storage.audit_log import is_kept

    config = resolve({"keystore": keystore, "passphrase_file": passphrase_file, "audit_log": audit_log}, os.environ)
    if not os.path.lexists(config.keystore):
        raise InputMissingError(f"there is no keystore at {config.keystore}; make one with: kms-admin init")
    with file.KeystoreLock(config.keystore) as lock, _passphrase(config, new=False) as old:
        new_file = Path(new_passphrase_file) if new_passphrase_file else None
        with prompt.obtain("new passphrase", "MINIKMS_NEW_PASSPHRASE", new_file, "--new-passphrase-file", new=True) as new:
            log = config.audit.path if is_kept(config.audit.path) else None
            notes = file.change_passphrase(lock, old, new, parameters=KdfParameters(), audit_log=log)
    for note in notes:
        render.remark(f"keystore of the Java server: {note}")
    _show_detail(settings, "passphrase changed")


@command.command(
    "verify-audit",
    epilog=examples("kms-admin verify-audit", "kms-admin verify-audit audit.log.2 audit.log.1 ~/.mini-kms/audit.log"),
)
@click.argument("files", nargs=-1, type=PATH, metavar="[FILE]...")
@_audit_log
@_keystore
@_passphrase_file
@click.pass_obj
def verify_audit(
    settings: Settings,
    files: Sequence[str],
    audit_log: str | None,
    keystore: str | None,
    passphrase_file: str | None,
) -> int:
    """Say whether the audit log is as it was written: nothing changed, removed, moved or cut off. The exit code is 0 or 65.

    Name rotated files, the oldest first, with the one that is written last; without FILE that one alone. Needs no
    server, and minds none.
    """
    from kms.storage.audit_check import verify
    from kms.storage.file import AuditReader

    config = resolve({"audit_log": audit_log, "keystore": keystore, "passphrase_file": passphrase_file}, os.environ)
    paths = [Path(file) for file in files] or [config.audit.path]
    if not os.path.lexists(config.keystore):
        raise InputMissingError(f"there is no keystore at {config.keystore}; name it with --keystore")
    with _passphrase(config, new=False) as passphrase, AuditReader(config.keystore, passphrase) as reader:
        report = verify(paths, reader, needs_head=os.path.realpath(paths[-1]) == os.path.realpath(config.audit.path))
    if settings.json:
        render.document(
            authentic=not report.count,
            files=[
                {
                    "file": span.file,
                    "records": span.records,
                    "first": span.first,
                    "last": span.last,
                    "begins": span.begins,
                    "ends": span.ends,
                }
                for span in report.spans
            ],
            findings=[one._asdict() for one in report.findings],
            findingCount=report.count,
            notes=[one._asdict() for one in report.notes],
            refusalsCounted=report.counted,
            principalsPutInForce=report.reloads,
        )
    else:
        _show_report(report)
    return EXIT_BAD_INPUT if report.count else EXIT_OK


def _show_report(report: Verifier) -> None:
    for span in report.spans:
        if span.records:
            render.text(f"{span.file}: records {span.first} to {span.last}, {span.begins} to {span.ends}")
        else:
            render.text(f"{span.file}: no authentic record")
    if report.principals:
        render.text(f"principals: put in force {_times(report.reloads)}, last by {report.principals}")
    if report.counted:
        render.text(f"refusals: {report.counted} more than have a record of their own")
    for word, found in (("note", report.notes), ("FOUND", report.findings)):
        for file, line, what in found:
            render.text(f"{word}: {file}{f', line {line}' if line else ''}: {what}")
    if report.count > len(report.findings):
        render.text(f"and {report.count - len(report.findings)} more")
    total = sum(span.records for span in report.spans)
    render.text(
        f"NOT AUTHENTIC: {report.count} found; {total} records are" if report.count else f"authentic: {total} records"
    )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _passphrase(config: ServerConfig, *, new: bool) -> Secret:
    return prompt.obtain("passphrase", "MINIKMS_PASSPHRASE", config.passphrase_file, "--passphrase-file", new=new)


def _show_detail(settings: Settings, detail: str) -> None:
    if settings.json:
        render.document(detail=detail)
    else:
        render.text(detail)


def _show_group(settings: Settings, group: KeyGroupView, done: str) -> None:
    if settings.json:
        render.document(keyGroup=group)
    else:
        render.text(f"{group.key_id} {done}; version {group.active_version} is active")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kms-admin` and return its exit status (docs/commands/exit-status.inc lists them)."""
    forbid_dumps()
    with stop_signals_raise():
        return run(command, PROGRAM, arguments)
