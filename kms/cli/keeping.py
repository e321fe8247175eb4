"""`kms-admin backup` and `kms-admin mend-keystore`: the keystore in one file, and what is left of one."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from kms.cli import render
from kms.cli.options import PATH, Settings, examples
from kms.cli.prompt import confirm
from kms.cli.setup import existing_passphrase, keystore_option, passphrase_file_option, places_with_keystore


@click.command(epilog=examples("kms-admin backup --out /mnt/backup/keystore-$(date +%F).json"))
@click.option(
    "--out", "target", type=PATH, metavar="PATH", required=True, help="A new file, for you alone. It is never written over."
)
@keystore_option
@passphrase_file_option
@click.pass_obj
def backup(settings: Settings, target: str, keystore: str | None, passphrase_file: str | None) -> None:
    """Write the keystore, with what is in its journal, into one file. Needs no server, and minds none.

    Every key is opened first: what was written can be put back, as keystore.json, with the same passphrase.
    """
    from kms.storage.backup import back_up, check_target
    from kms.storage.passphrases import opening_form

    places = places_with_keystore(keystore=keystore, passphrase_file=passphrase_file)
    check_target(Path(target))
    with existing_passphrase(settings, places, passphrase_file) as given:
        generation = back_up(places.keystore, opening_form(places.keystore, given), Path(target))
    if settings.json:
        render.document(backup=target, generation=generation)
    else:
        render.detail(settings, f"{target} is the keystore at generation {generation}")


@click.command("mend-keystore", epilog=examples("kms-admin mend-keystore --keystore ~/.mini-kms/keystore.json"))
@keystore_option
@passphrase_file_option
@click.option("--yes", is_flag=True, help="Do not ask; for scripts.")
@click.pass_obj
def mend_keystore(settings: Settings, keystore: str | None, passphrase_file: str | None, *, yes: bool) -> None:
    """Go on without a journal that is lost or damaged, with what can be read of it; the server must be stopped.

    Put back a good copy of both files instead, if there is one: keys that were made since are lost otherwise, and with
    them what was encrypted under them. The journal that is there is kept beside it.
    """
    from kms.storage.lock import KeystoreLock
    from kms.storage.mending import mend
    from kms.storage.passphrases import opening_form

    places = places_with_keystore(keystore=keystore, passphrase_file=passphrase_file)
    with KeystoreLock(places.keystore) as lock, existing_passphrase(settings, places, passphrase_file) as given:
        if not yes:
            confirm("go on without what cannot be read of the journal? Keys that were made since are lost", "add --yes")
        mended = mend(lock, opening_form(places.keystore, given))
    if settings.json:
        render.document(keystore=places.keystore, generation=mended.generation, kept=mended.kept)
        return
    render.detail(settings, f"the keystore goes on from generation {mended.generation}")
    if mended.kept is not None:
        render.remark(f"the journal that was there is kept as {mended.kept}")
