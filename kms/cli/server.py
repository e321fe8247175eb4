"""`kms-server`: configuration and secrets, then the daemon."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import rich_click as click

from kms.cli.lines import BackgroundLines
from kms.cli.logs import Voice
from kms.cli.options import (
    HELP,
    PATH,
    allow_group_option,
    epilog,
    version_option,
)
from kms.cli.run import run
from kms.cli.server_secrets import obtain_secrets
from kms.cli.setup import keystore_option
from kms.cli.signals import stop_signals_raise
from kms.errors import InputMissingError
from kms.host.hardening import forbid_dumps
from kms.host.terminal import has_terminal
from kms.server.config import LOG_FORMATS, Places, ServerConfig, log_format, resolve

PROGRAM: Final = "kms-server"
_STANDARD_ERROR: Final = 2


@click.command(
    context_settings=HELP,
    epilog=epilog(
        PROGRAM,
        "kms-server",
        "kms-server --no-tcp --passphrase-file /root/passphrase",
        "MINIKMS_TCP_PORT=0 kms-server --no-unix",
    ),
)
@click.option("--tcp-port", metavar="N", help="Port on 127.0.0.1; 0 is any free one. [MINIKMS_TCP_PORT or 9123]")
@click.option(
    "--unix-socket",
    type=PATH,
    metavar="PATH",
    help="Where the Unix socket is made. [MINIKMS_UNIX_SOCKET or <data>/kms.sock]",
)
@keystore_option
@click.option(
    "--token-file",
    type=PATH,
    metavar="PATH",
    help="The API token, for kms-client. [MINIKMS_API_TOKEN_FILE or <data>/api.token]",
)
@click.option(
    "--admin-token-file",
    type=PATH,
    metavar="PATH",
    help="The admin token, for kms-admin. [MINIKMS_ADMIN_TOKEN_FILE or <data>/admin.token]",
)
@click.option(
    "--passphrase-file",
    type=PATH,
    metavar="PATH",
    help="The passphrase of the keystore. [MINIKMS_PASSPHRASE_FILE or $CREDENTIALS_DIRECTORY/passphrase; else asked for]",
)
@click.option(
    "--unix-socket-group", metavar="GROUP", help="Who else may connect to the Unix socket. [MINIKMS_UNIX_SOCKET_GROUP]"
)
@click.option(
    "--principals",
    type=PATH,
    metavar="PATH",
    help="Who may do what; read again on SIGHUP. [MINIKMS_PRINCIPALS or <data>/principals.toml if it exists]",
)
@click.option("--no-principals", is_flag=True, help="Start without that file though an audit log shows that there was one.")
@click.option(
    "--audit-log",
    type=PATH,
    metavar="PATH",
    help="Who did what. [MINIKMS_AUDIT_LOG, or <data>/audit.log when there are principals]",
)
@click.option(
    "--audit-data",
    metavar="WHAT",
    help="Which requests of the data plane are recorded: all, refused or none. [MINIKMS_AUDIT_DATA or all]",
)
@click.option("--no-audit", is_flag=True, help="Keep no audit log, whether there are principals or not.")
@click.option(
    "--accept-rollback",
    is_flag=True,
    help="Start though the keystore is older than the audit log: an earlier one was put back.",
)
@click.option(
    "--log-format",
    metavar="|".join(LOG_FORMATS),
    help="How the log is written on standard error. [MINIKMS_LOG_FORMAT or human]",
)
@click.option("--max-frame-bytes", metavar="N", help="Longest request line. [MINIKMS_MAX_FRAME_BYTES or 1048576]")
@click.option("--idle-timeout-ms", metavar="N", help="How long a client may be idle. [MINIKMS_IDLE_TIMEOUT_MS or 30000]")
@click.option("--max-connections", metavar="N", help="How many there may be at once. [MINIKMS_MAX_CONNECTIONS or 256]")
@click.option(
    "--metrics-port", metavar="N", help="Prometheus metrics on 127.0.0.1; 0 is any free port. [MINIKMS_METRICS_PORT]"
)
@click.option("--metrics-groups", is_flag=True, help="Name key groups in the metrics.")
@click.option("--no-tcp", is_flag=True, help="Do not listen on TCP.")
@click.option("--no-unix", is_flag=True, help="Do not listen on a Unix socket.")
@allow_group_option
@version_option
@click.pass_obj
def command(voice: Voice, /, **flags: Any) -> int:
    """Serve keys on loopback TCP and a Unix socket until SIGINT or SIGTERM.

    SIGHUP reads the file of principals again; what cannot be used changes nothing. It also begins a new audit log where
    the old one was renamed. It stops a server whose terminal was closed.

    A first run at a terminal makes the keystore and the tokens; anywhere else kms-admin init has to. Secrets are never
    flags: a flag names a file, and wins over MINIKMS_PASSPHRASE, MINIKMS_API_TOKEN and MINIKMS_ADMIN_TOKEN, and these over
    the other files; what none of them gives is asked for.

    <data> is $XDG_DATA_HOME/mini-kms or ~/.mini-kms; kms-admin init fills it.
    """
    voice.use(log_format(flags, os.environ))
    config, places = resolve(flags, os.environ), Places(flags, os.environ)
    with contextlib.ExitStack() as secrets:
        lines = secrets.enter_context(BackgroundLines(_STANDARD_ERROR, partial(voice.line, logging.WARNING)))
        handler = logging.StreamHandler(lines)
        handler.setFormatter(voice.formatter)
        logging.basicConfig(handlers=[handler], level=logging.INFO)
        say = partial(_say, lines, voice)
        hangup_stops = _watch_terminal()
        # Only until the daemon runs. Then SIGINT and SIGTERM end the process where it is (`leave_on_signals`), until it is
        # ready and heeds them itself: nothing interrupts a key derivation, and what is written until then survives that.
        with stop_signals_raise():
            makes_keystore = _is_first_run(config, places)
            api, admin, passphrase = obtain_secrets(config, places, flags, say, secrets, is_first_run=makes_keystore)
        # To the daemon it means to reload; nor may one kill it that comes before it listens for signals, or after.
        secrets.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
        from kms.core.derive import KdfParameters
        from kms.server import daemon

        return daemon.run(
            config,
            passphrase,
            api,
            admin,
            say=say,
            makes_with=KdfParameters() if makes_keystore else None,
            hangup_stops=hangup_stops,
        )


def _say(lines: BackgroundLines, voice: Voice, text: str) -> None:
    lines.write(voice.line(logging.INFO, text))


def _watch_terminal() -> Callable[[], bool]:
    """What says whether the terminal is gone that this process has now; never of one that nohup(1) has started."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or not has_terminal():
        return lambda: False
    return lambda: not has_terminal()


def _is_first_run(config: ServerConfig, places: Places) -> bool:
    """Whether a keystore is to be made: none is there, nor a trace of one, and a person types its passphrase.

    Nobody reads what a server says that a service manager starts. Where the disk with its keystore is not mounted, it
    would make another, serve, and encrypt under keys that are in nobody's backup. Raises `InputMissingError`.
    """
    if os.path.lexists(config.keystore):
        return False
    from kms.storage.file import trace_of_another

    trace = trace_of_another(config.keystore, config.audit.path)
    if trace is not None:
        raise InputMissingError(
            f"there is no keystore at {config.keystore}, but there was one: {trace} is left of it. Put it back, or move "
            "all of that away"
        )
    if os.environ.get("MINIKMS_PASSPHRASE") or places.passphrase_file is not None:
        raise InputMissingError(
            f"there is no keystore at {config.keystore}. Is its disk mounted? For a first start make one: kms-admin init"
        )
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kms-server` and return its exit status (docs/commands/exit-status.inc lists them)."""
    forbid_dumps()
    voice = Voice(PROGRAM)
    return run(command, PROGRAM, arguments, obj=voice, error_line=partial(voice.line, logging.ERROR))
