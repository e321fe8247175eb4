"""How the server is, and reloading it: `kms-admin status` and `kms-admin reload`."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Final

import rich_click as click

from kms.cli import render
from kms.cli.options import Settings, connected, examples
from kms.client.environment import ADMIN
from kms.core.policy import Operation
from kms.core.spans import length

if TYPE_CHECKING:
    from kms.wire.messages import RuleView, ServerView, StatusView

_EVERY_OPERATION: Final = "every operation"
_EVERY_GROUP: Final = "every key group"
_ALL: Final = {operation.value for operation in Operation} - {Operation.HEALTH.value}
"""What `*` is in a file of principals: Health needs no grant."""
_NO_LOG: Final = "none: it is kept where there are principals, or where --audit-log is given"
_FROM_FILE: Final = re.compile(r"principals from (.*): (\d+)")
"""How the server says it, in its log, too."""
_RECORDED: Final = {
    "all": "with all requests of the data plane",
    "refused": "with the refused requests of the data plane",
    "none": "without requests of the data plane",
}


@click.command(epilog=examples("kms-admin status", "kms-admin status --json | jq .report.server.warnings"))
@click.pass_obj
def status(settings: Settings) -> None:
    """Tell whether the server is up, who you are to it and what you may do, and, if you may see that, how it is."""
    with connected(settings, ADMIN) as (client, _):
        report = client.status()
    if settings.json:
        render.document(report=report)
        return
    _show("server", f"kms-server {report.version}, up for {length(report.uptime_sec)}")
    _show("you are", report.principal)
    for label, line in _rights(report):
        _show(label, line)
    if report.server is None:
        _show("the rest", "is shown to who may use Status")
    else:
        _show_server(report.server)


@click.command(epilog=examples("kms-admin reload"))
@click.pass_obj
def reload(settings: Settings) -> None:
    """Have the server read its file of principals again, and begin a new audit log where the old one was renamed.

    As SIGHUP does, but it says what came of it. A file that cannot be used changes nothing, and is an error here.
    """
    with connected(settings, ADMIN) as (client, _):
        words = client.reload()
    render.detail(settings, words)


def _rights(report: StatusView) -> list[tuple[str, str]]:
    """What is shown of them, each with its label."""
    if report.rules is None:
        return [("you may", f"{_EVERY_OPERATION} on {_EVERY_GROUP}")]
    shown = [("you may" if rule.allow else "but not", _right(rule)) for rule in report.rules]
    return shown or [("you may", "nothing but ask for this")]


def _right(rule: RuleView) -> str:
    operations = _EVERY_OPERATION if set(rule.operations) >= _ALL else ", ".join(rule.operations)
    groups = _EVERY_GROUP if "*" in rule.groups else ", ".join(rule.groups)
    prefix = f", with an AAD that begins with {_readable(rule.aad_prefix)}" if rule.aad_prefix else ""
    return f"{operations} on {groups}{prefix}"


def _readable(octets: bytes) -> str:
    """As text where it is that, else as the base64 that a file of principals has."""
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text else f"the bytes {base64.b64encode(octets).decode('ascii')} (base64)"


def _show_server(server: ServerView) -> None:
    _show("listens on", ", ".join(server.listening))
    groups = "1 key group" if server.key_groups == 1 else f"{server.key_groups} key groups"
    _show("keystore", f"{server.keystore}, {groups}, generation {server.generation}")
    _show("principals", _FROM_FILE.sub(r"\2 in \1", server.principals))
    log = _NO_LOG if server.audit_log is None else f"{server.audit_log}, {_RECORDED.get(server.audit_data or '', '')}"
    _show("audit log", log)
    _show("memory", "locked: no key is written to swap" if server.memory_locked else "not locked")
    if server.metrics is not None:
        _show("metrics", server.metrics)
    for warning in server.warnings:
        _show("WARNING", warning)


def _show(what: str, told: str) -> None:
    render.text(f"{what:<11} {told}", indent=12)
