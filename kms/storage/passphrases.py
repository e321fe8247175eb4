"""Which form of a passphrase a keystore is under: earlier releases took one as it came."""

from __future__ import annotations

from pathlib import Path

from kms.core.secret import Passphrase, Secret
from kms.errors import InputError, WrongPassphraseError
from kms.storage.audit_reader import AuditReader


def check(keystore: Path, passphrase: Secret) -> None:
    """Raise `WrongPassphraseError` unless the keystore is under `passphrase`, and what `load` raises for a damaged one."""
    with AuditReader(keystore, passphrase):
        pass


def opening_form(keystore: Path, passphrase: Secret) -> Secret:
    """The form of `passphrase` that opens the keystore; it belongs to `passphrase`, and is wiped with it.

    Without a key derivation where there is but one form, which is nearly always: its reader finds out. Raises
    `InputError` where none opens and what was given could not be a passphrase today, else what `check` raises.
    """
    if not isinstance(passphrase, Passphrase) or not (passphrase.earlier_forms or passphrase.complaint):
        return passphrase
    for form in (passphrase, *passphrase.earlier_forms):
        try:
            check(keystore, form)
        except WrongPassphraseError:
            continue
        return form
    if passphrase.complaint is not None:
        raise InputError(passphrase.complaint)
    return passphrase
