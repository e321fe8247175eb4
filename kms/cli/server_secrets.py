"""The three secrets that `kms-server` starts with: given, made at a first run, or asked for."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kms.cli.options import allows_group, one_reader_of_standard_input
from kms.cli.prompt import Wanted, obtain, obtain_new_passphrase, obtain_passphrase
from kms.cli.setup import make_token
from kms.client.environment import ADMIN, API, Plane
from kms.core.secret import Passphrase, Secret
from kms.errors import ConfigError
from kms.host import secret_input
from kms.server.config import Places, ServerConfig

_FILES: Final = ("token_file", "admin_token_file", "passphrase_file")
_SHORT_TOKEN: Final = 16
"""Characters; of fewer, somebody who may connect could find it by trying."""

Say = Callable[[str], None]


def obtain_secrets(
    config: ServerConfig,
    places: Places,
    flags: Mapping[str, Any],
    say: Say,
    wiped: contextlib.ExitStack,
    *,
    is_first_run: bool,
) -> tuple[Secret, Secret, Passphrase]:
    """API token, admin token and passphrase, which `wiped` wipes in the end.

    At a first run the passphrase is a new one, and what is missing of the tokens is made, as `kms-admin init` does. Before
    anybody is asked, it is looked whether a server could start at all. Raises what `obtain` raises.
    """
    one_reader_of_standard_input({f"--{name.replace('_', '-')}": flags[name] for name in _FILES})
    allow_group = allows_group(flags["allow_group_readable_secrets"])

    def wanted(name: str, variable: str, option: str, flag: str, file: Callable[[], Path | None]) -> Wanted:
        return Wanted(name, variable, option, flags[flag], file, allow_group=allow_group)

    def wanted_token(plane: Plane, flag: str, file: Callable[[], Path | None]) -> Wanted:
        return wanted(plane.name, plane.variable, plane.option, flag, file)

    of_keystore = wanted(
        "passphrase", "MINIKMS_PASSPHRASE", "--passphrase-file", "passphrase_file", lambda: places.passphrase_file
    )
    tokens = (
        wanted_token(API, "token_file", lambda: places.token_file),
        wanted_token(ADMIN, "admin_token_file", lambda: places.admin_token_file),
    )
    if any(one.is_asked_for for one in (of_keystore, *tokens)):
        from kms.server.daemon import check_free

        check_free(config)
    if is_first_run:
        weak_remedy = "make the keystore with: kms-admin init --allow-weak"
        passphrase = obtain_new_passphrase(of_keystore, say, weak_remedy=weak_remedy)
    else:
        passphrase = obtain_passphrase(of_keystore)
    wiped.enter_context(passphrase)
    api, admin = (
        wiped.enter_context(_token(one, path, say, is_made=is_first_run))
        for one, path in zip(tokens, places.new_token_files, strict=True)
    )
    if hmac.compare_digest(_digest(api), _digest(admin)):
        raise ConfigError("the API token and the admin token are the same; give each plane its own")
    for one, token in zip(tokens, (api, admin), strict=True):
        if len(token) < _SHORT_TOKEN:
            say(f"the {one.name} is short: who may connect could find it by trying; kms-admin new-token makes better ones")
    return api, admin, passphrase


def _token(wanted: Wanted, path: Path, say: Say, *, is_made: bool) -> Secret:
    if not wanted.is_asked_for:
        return obtain(wanted)
    if is_made:
        make_token(path)
        say(f"made an {wanted.name} in {path}")
        return secret_input.read_token(path)
    say(f"there is no {wanted.name} in {path}: type the one that clients are to show. It is not kept")
    return obtain(wanted)


def _digest(token: Secret) -> bytes:
    with token.view() as view:
        return hashlib.sha256(view).digest()
