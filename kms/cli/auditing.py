"""Looking into what the server keeps: the commands of `kms-admin` that read the audit log and the file of principals."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rich_click as click

from kms.cli import render
from kms.cli.options import PATH, OneOf, Settings, examples, key_argument, utf8
from kms.cli.setup import (
    audit_log_option,
    existing_passphrase,
    keystore_option,
    passphrase_file_option,
    places_with_keystore,
)
from kms.core.policy import OF_SERVER, Operation
from kms.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_REFUSED, ConfigError, InputMissingError
from kms.server.config import Places

if TYPE_CHECKING:
    from kms.core.audit_verifier import Verifier

_ON_NO_GROUP: Final = OF_SERVER | {Operation.HEALTH}


@click.command(epilog=examples("kms-admin explain billing-2026 --principal billing --operation Decrypt"))
@click.option("--principal", metavar="NAME", required=True, help="Who asks: its name in the file of principals.")
@click.option(
    "--operation",
    type=OneOf([one.value for one in Operation]),
    metavar="OPERATION",
    required=True,
    help="For what, such as Decrypt.",
)
@functools.partial(key_argument, is_needed=False)
@click.option("--aad", metavar="TEXT", default="", help="The AAD of the request.")
@click.option("--principals", type=PATH, metavar="PATH", help="The file. [MINIKMS_PRINCIPALS or <data>/principals.toml]")
@click.pass_obj
def explain(settings: Settings, principal: str, operation: str, key: str | None, aad: str, principals: str | None) -> int:
    """Say which rule of the file of principals allows or refuses an operation; the exit code is 0 or 1.

    Needs no server: the file is read as it is, which a server does only at its start and on SIGHUP. ReEncrypt needs
    Decrypt on the key group it moves from, too.
    """
    from kms.service.principals import load

    asked = Operation(operation)
    if key is None and asked not in _ON_NO_GROUP:
        raise click.UsageError("name the key group", click.get_current_context())
    path = Places({"principals": principals}, os.environ).principals
    if not os.path.lexists(path):
        raise InputMissingError(
            f"there is no file {path}, without which a shared token may do everything on its plane; name another with "
            "--principals"
        )
    file = load(path)
    member = file.members.get(principal)
    if member is None:
        raise ConfigError(f"{file.path} has no principal of this name; it has {', '.join(file.members) or 'none'}")
    verdict = member.grants.explain(asked, key or "", utf8("--aad", aad))
    if settings.json:
        render.document(allowed=verdict.allowed, rule=verdict.rule, reason=verdict.reason)
    else:
        render.text(f"{'allowed' if verdict.allowed else 'refused'}: {verdict.reason}")
    return EXIT_OK if verdict.allowed else EXIT_REFUSED


@click.command(
    "verify-audit",
    epilog=examples("kms-admin verify-audit", "kms-admin verify-audit audit.log.2 audit.log.1 ~/.mini-kms/audit.log"),
)
@click.argument("files", nargs=-1, type=PATH, metavar="[FILE]...")
@audit_log_option
@keystore_option
@passphrase_file_option
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
    from kms.storage.audit_check import check_readable, verify
    from kms.storage.audit_reader import AuditReader
    from kms.storage.passphrases import opening_form

    places = places_with_keystore(audit_log=audit_log, keystore=keystore, passphrase_file=passphrase_file)
    current = places.audit_log
    paths = [Path(file) for file in files] or [current]
    # Before anybody is asked for the passphrase.
    check_readable(paths)
    with (
        existing_passphrase(settings, places, passphrase_file) as given,
        AuditReader(places.keystore, opening_form(places.keystore, given)) as reader,
    ):
        report = verify(paths, reader, needs_head=os.path.realpath(paths[-1]) == os.path.realpath(current))
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
