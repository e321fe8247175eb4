"""What a principal may do: which operations on which key groups a request needs, asked of the policy one by one."""

from __future__ import annotations

from typing import Any, Final

from kms.core import ciphertext
from kms.core.policy import KeyAuthorizationPolicy, Operation, Principal
from kms.errors import UnauthorizedError
from kms.wire.messages import (
    Decrypt,
    Encrypt,
    GenerateDataKey,
    GenerateDataKeyWithoutPlaintext,
    ReEncrypt,
    Status,
    group_of,
)

_FORBIDDEN: Final = "the policy does not allow this operation on this key group"


def authorize(policy: KeyAuthorizationPolicy, principal: Principal, request: Any) -> None:
    """Ask `policy` once for each operation and group that `request` needs; raises `UnauthorizedError`.

    ReEncrypt needs DECRYPT on the group the blob names and RE_ENCRYPT on the destination. A blob that names no group
    raises `DecryptionFailedError`, as it would when opened. A data key needs its operation on each group that it is wrapped
    under.
    """
    kind = type(request)
    if kind is Status:
        return  # who somebody is may be asked by each; the rest of the answer is looked at when it is made
    group: str | None
    if kind is Encrypt:
        group, aad = group_of(request.key_id), request.aad or b""
    elif kind is GenerateDataKey or kind is GenerateDataKeyWithoutPlaintext:
        group, aad = group_of(request.key_id), request.aad or b""
        for other in request.also_key_ids or ():
            if not policy.allows(principal, request.operation, group_of(other), aad):
                raise UnauthorizedError(_FORBIDDEN)
    elif kind is Decrypt:
        group, aad = ciphertext.group(request.ciphertext), request.aad or b""
    elif kind is ReEncrypt:
        group, aad = group_of(request.key_id), request.aad or b""
        if not policy.allows(principal, Operation.DECRYPT, ciphertext.group(request.ciphertext), aad):
            raise UnauthorizedError(_FORBIDDEN)
    else:
        group, aad = getattr(request, "key_id", None), b""
    if not policy.allows(principal, request.operation, group, aad):
        raise UnauthorizedError(_FORBIDDEN)
