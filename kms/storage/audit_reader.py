"""What verifying an audit log needs of a keystore."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kms.core.audit import AuditKeys
from kms.core.secret import Secret
from kms.storage import formats
from kms.storage.content import read_pair
from kms.storage.file import naming
from kms.storage.root_keys import RootKeys


class AuditReader:
    """A keystore's audit keys and its generation. Needs no lock, and opens no key."""

    def __init__(self, path: Path, passphrase: Secret) -> None:
        """Raises what `load` raises."""
        self.path: Final = path
        pair = read_pair(path)
        with naming(path):
            opener = formats.opener(pair)
            # Kept, as each format has sub-keys of its own, and a server may write another while this is read.
            self._root = opener.header.derive(passphrase)
            try:
                opener.authenticate(self._root)
            except BaseException:
                self._root.wipe()
                raise
        self._keys = RootKeys(self._root)

    @property
    def keys(self) -> AuditKeys:
        """They are wiped with this."""
        return self._keys.audit

    def generation(self) -> int:
        """The generation on disk now, which is that of a server that is running; raises what `load` raises."""
        pair = read_pair(self.path)
        with naming(self.path):
            return formats.opener(pair).authenticate(self._root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._root.wipe()
        self._keys.wipe()
