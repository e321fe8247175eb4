"""From the passphrase to the keys that do the work: Argon2id, then HKDF.

The root key encrypts nothing itself. One sub-key per use (HKDF-SHA256, one info label each, RFC 5869) means that no
use can be turned against another, and that the root key can be wiped as soon as they are derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from _argon2_cffi_bindings import ffi, lib
from argon2.low_level import Type, core, error_to_str
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kms.core.secret import Secret
from kms.errors import KeystoreError, MemoryShortError
from kms.limits import (
    KDF_ITERATIONS,
    KDF_ITERATIONS_RANGE,
    KDF_MEMORY_KIB,
    KDF_MEMORY_KIB_RANGE,
    KDF_PARALLELISM,
    KDF_PARALLELISM_RANGE,
    KEY_BYTES,
)

ARGON2_VERSION_13: Final[Literal[0x13]] = 0x13
_MINIMUM_SALT_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class KdfParameters:
    """Argon2id's costs, stored in the keystore so that the default may be raised later."""

    memory_kib: int = KDF_MEMORY_KIB
    iterations: int = KDF_ITERATIONS
    parallelism: int = KDF_PARALLELISM

    def check(self) -> None:
        """Raise `KeystoreError` unless each cost is within its bound.

        They are read before they can be authenticated: unbounded, a planted file could ask for a terabyte of memory.
        """
        for name, value, (low, high) in (
            ("memory", self.memory_kib, KDF_MEMORY_KIB_RANGE),
            ("iterations", self.iterations, KDF_ITERATIONS_RANGE),
            ("parallelism", self.parallelism, KDF_PARALLELISM_RANGE),
        ):
            if not low <= value <= high:
                raise KeystoreError(
                    f"the keystore's Argon2id {name} is {value}, outside {low}..{high}; it was altered or damaged"
                )


def root_key(passphrase: Secret, salt: bytes, parameters: KdfParameters) -> Secret:
    """Argon2id v0x13 of `passphrase` and `salt` (8 bytes or more): the 32-byte root key (RFC 9106).

    Blocks for as long as the parameters ask; releases the GIL meanwhile.
    """
    parameters.check()
    return argon2id(passphrase, salt, parameters)


def argon2id(
    password: Secret,
    salt: bytes,
    parameters: KdfParameters,
    *,
    secret: bytes = b"",
    associated_data: bytes = b"",
) -> Secret:
    """`root_key` with RFC 9106's two further inputs, for its test vectors.

    Calls Argon2's context interface, not argon2-cffi's `hash_secret_raw`: that one takes the passphrase as immutable
    `bytes`, copies it, and returns the key as `bytes`; none of the three could be wiped.
    """
    if len(salt) < _MINIMUM_SALT_BYTES:
        raise KeystoreError("the keystore's salt is too short; it was altered or damaged")
    key = bytearray(KEY_BYTES)
    with password.view() as password_view:
        # cffi's struct holds bare pointers: these names keep the buffers alive, and exported, until the call returns.
        password_pointer = ffi.from_buffer("uint8_t[]", password_view)
        salt_pointer = ffi.from_buffer("uint8_t[]", salt)
        key_pointer = ffi.from_buffer("uint8_t[]", key)
        secret_pointer = ffi.from_buffer("uint8_t[]", secret)
        data_pointer = ffi.from_buffer("uint8_t[]", associated_data)
        context = ffi.new(
            "argon2_context *",
            {
                "version": ARGON2_VERSION_13,
                "out": key_pointer,
                "outlen": KEY_BYTES,
                "pwd": password_pointer,
                "pwdlen": len(password),
                "salt": salt_pointer,
                "saltlen": len(salt),
                "secret": secret_pointer if secret else ffi.NULL,
                "secretlen": len(secret),
                "ad": data_pointer if associated_data else ffi.NULL,
                "adlen": len(associated_data),
                "t_cost": parameters.iterations,
                "m_cost": parameters.memory_kib,
                "lanes": parameters.parallelism,
                "threads": parameters.parallelism,
                "allocate_cbk": ffi.NULL,
                "free_cbk": ffi.NULL,
                "flags": lib.ARGON2_DEFAULT_FLAGS,
            },
        )
        status = core(context, Type.ID.value)
        for pointer in (password_pointer, salt_pointer, key_pointer, secret_pointer, data_pointer):
            ffi.release(pointer)
    if status in (lib.ARGON2_MEMORY_ALLOCATION_ERROR, lib.ARGON2_THREAD_FAIL):
        raise MemoryShortError(
            f"there is not enough memory: to open this keystore takes {parameters.memory_kib // 1024} MiB, and nothing was "
            "changed. Free some, or raise the limit (ulimit -v)"
        )
    if status != lib.ARGON2_OK:
        raise KeystoreError(f"Argon2id failed: {error_to_str(status)}")
    return Secret(key)


def sub_key(root: Secret, label: str) -> Secret:
    """The 32-byte sub-key of `root` for one use, HKDF-SHA256 with `label` as its info (RFC 5869, no salt)."""
    return Secret(hkdf_sha256(root, salt=None, info=label.encode("ascii"), length=KEY_BYTES))


def hkdf_sha256(key_material: Secret, *, salt: bytes | None, info: bytes, length: int) -> bytearray:
    """HKDF-SHA256 of RFC 5869, `length` bytes."""
    output = bytearray(length)
    with key_material.view() as view:
        HKDF(SHA256(), length, salt, info).derive_into(view, output)
    return output
