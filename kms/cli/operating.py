"""How the server is, and reloading it: `kms-admin status` and `kms-admin reload`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from kms.cli import render
from kms.cli.options import Settings, connected, examples
from kms.client.environment import ADMIN

if TYPE_CHECKING:
    from kms.wire.messages import RuleView, ServerView, StatusView

_EVERYTHING = "every operation on every key group"


@click.command(epilog=examples("kms-admin status", "kms-admin status --json | jq .report.server.warnings"))
@click.pass_obj
def status(settings: Settings) -> None:
    """Tell whether the server is up, who you are to it and what you may do, and, if you may see that, how it is."""
    with connected(settings, ADMIN) as (client, _):
        report = client.status()
    if settings.json:
        render.document(report=report)
        return
    _show("server", f"kms-server {report.version}, up for {render.length(report.uptime_sec)}")
    _show("you are", report.principal)
    for line in _rights(report):
        _show("you may", line)
    if report.server is None:
        _show("the rest", "you may not see (Status)")
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


def _rights(report: StatusView) -> list[str]:
    if report.rules is None:
        return [_EVERYTHING]
    return [_right(rule) for rule in report.rules] or ["nothing but ask for this"]


def _right(rule: RuleView) -> str:
    on = f"{', '.join(rule.operations)} on {', '.join(rule.groups)}"
    prefix = f", with an AAD that begins with {rule.aad_prefix!r}" if rule.aad_prefix else ""
    return f"{on}{prefix}" if rule.allow else f"not {on}"


def _show_server(server: ServerView) -> None:
    _show("listens on", ", ".join(server.listening))
    groups = "1 key group" if server.key_groups == 1 else f"{server.key_groups} key groups"
    _show("keystore", f"{server.keystore}, {groups}, generation {server.generation}")
    _show("principals", server.principals)
    log = "none" if server.audit_log is None else f"{server.audit_log}, of the data plane: {server.audit_data}"
    _show("audit log", log)
    _show("memory", "locked: no key is written to swap" if server.memory_locked else "not locked")
    if server.metrics is not None:
        _show("metrics", server.metrics)
    for warning in server.warnings:
        _show("WARNING", warning)


def _show(what: str, told: str) -> None:
    render.text(f"{what:<11} {told}")
