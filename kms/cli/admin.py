"""`kms-admin`: the program, and the control plane."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from kms.cli import auditing, keeping, listing, operating, render, retiring, setup
from kms.cli.options import (
    HELP,
    Program,
    Settings,
    VersionNumber,
    connected,
    epilog,
    examples,
    key_argument,
    program_options,
    reachable,
)
from kms.cli.refused import naming
from kms.cli.run import EXIT_INTERRUPTED, run
from kms.cli.signals import stop_signals_raise
from kms.client.environment import ADMIN
from kms.core.spans import exact_length
from kms.errors import EXIT_OK, UnauthorizedError
from kms.host.hardening import forbid_dumps

if TYPE_CHECKING:
    from kms.client.blocking import KmsClient
    from kms.core.usage import TimedDisable
    from kms.wire.messages import KeyGroupView

PROGRAM: Final = "kms-admin"

_version = click.option("--version", type=VersionNumber(), metavar="N", required=True, help="Version of its key: 1, or v1.")


@click.group(
    PROGRAM,
    cls=Program,
    context_settings=HELP,
    epilog=epilog(
        PROGRAM,
        "kms-admin init",
        "kms-admin create-key billing",
        "kms-admin rotate-key billing",
        "kms-admin --json list-keys | jq .keyGroups",
        "kms-admin new-token billing --out billing.token",
    ),
)
@functools.partial(program_options, ADMIN)
@click.pass_context
def command(context: click.Context, /, **settings: Any) -> None:
    """Set up mini-kms and manage its keys.

    The admin token is in --admin-token-file, else in MINIKMS_ADMIN_TOKEN, else in its usual file. Who has none is known by
    the user id over a Unix socket; over TCP the token is asked for. The server is found at its Unix socket; over TCP only
    where --tcp or MINIKMS_TCP_PORT says so. These options may stand behind the name of a command, too.
    """
    context.obj = Settings(**settings)


@command.command("describe-key", epilog=examples("kms-admin describe-key billing"))
@key_argument
@click.pass_obj
def describe_key(settings: Settings, key: str) -> None:
    """Tell all that is known of one key group: its versions, how each is used, and who was refused a disabled one."""
    with _connected_about(settings, key) as client:
        group = client.describe_key_group(key)
    if settings.json:
        render.document(keyGroup=group)
    else:
        render.key_group(group, time.time())


@command.command("create-key", epilog=examples("kms-admin create-key billing"))
@key_argument
@click.pass_obj
def create_key(settings: Settings, key: str) -> None:
    """Make a key group; its version 1 is active."""
    with connected(settings, ADMIN) as (client, _), naming(key):
        group = client.create_key_group(key)
    _show_group(settings, group, "created")


@command.command("rotate-key", epilog=examples("kms-admin rotate-key billing"))
@key_argument
@click.pass_obj
def rotate_key(settings: Settings, key: str) -> None:
    """Make a new active version; what older ones encrypted still opens."""
    with _connected_about(settings, key) as client:
        group = client.rotate_key_group(key)
    _show_group(settings, group, "rotated")


@command.command(
    "disable-version",
    epilog=examples(
        "kms-admin disable-version billing --version 1",
        "kms-admin disable-version billing --version 1 --for 2h",
    ),
)
@key_argument
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
    with reachable(settings, ADMIN) as (connect, _), naming(key, connect, version):
        with connect() as client:
            detail = client.disable_version(key, version, for_seconds=seconds)
        if seconds is not None:
            detail = f"{key} v{version} disabled for {exact_length(seconds)}"
        if seconds is None or no_wait:
            render.detail(settings, detail)
            return EXIT_OK
        trial: TimedDisable | None = None
        try:
            with connect() as client:
                trial = retiring.currently(client, key, version)
            trial, state = retiring.wait_until_enabled(connect, key, version, trial)
        except UnauthorizedError:
            render.detail(settings, f"{detail}; you may not see who is refused meanwhile, the server's log will tell")
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


@command.command("enable-version", epilog=examples("kms-admin enable-version billing --version 1"))
@key_argument
@_version
@click.pass_obj
def enable_version(settings: Settings, key: str, version: int) -> None:
    """Let a disabled version decrypt again."""
    with _connected_about(settings, key, version) as client:
        detail = client.enable_version(key, version)
    render.detail(settings, detail)


@command.command("destroy-version", epilog=examples("kms-admin destroy-version billing --version 1"))
@key_argument
@_version
@click.option("--yes", is_flag=True, help="Do not ask; for scripts.")
@click.pass_obj
def destroy_version(settings: Settings, key: str, version: int, *, yes: bool) -> None:
    """Destroy a version's key for good: nothing it encrypted can ever be decrypted again."""
    with reachable(settings, ADMIN) as (connect, _), naming(key, connect, version):
        if not yes:
            retiring.confirm_destruction(connect, key, version)
        with connect() as client:
            detail = client.destroy_version(key, version)
    render.detail(settings, detail)


@contextlib.contextmanager
def _connected_about(settings: Settings, key: str, version: int | None = None) -> Iterator[KmsClient]:
    """A client for what is asked about one key group, or a version of it."""
    with reachable(settings, ADMIN) as (connect, _), naming(key, connect, version), connect() as client:
        yield client


def _show_group(settings: Settings, group: KeyGroupView, done: str) -> None:
    if settings.json:
        render.document(keyGroup=group)
    else:
        render.text(f"{group.key_id} {done}; version {group.active_version} is active")


for other in (
    listing.list_keys,
    setup.init,
    setup.new_token,
    setup.change_passphrase,
    keeping.backup,
    keeping.mend_keystore,
    auditing.explain,
    auditing.verify_audit,
    operating.status,
    operating.reload,
):
    command.add_command(other)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kms-admin` and return its exit status (docs/commands/exit-status.inc lists them)."""
    with stop_signals_raise():
        forbid_dumps()
        return run(command, PROGRAM, arguments)
