"""One function per operation: a decoded, authorized request in, a reply out.

Handlers know the seams of `core/provider.py` and nothing behind them. Those of the data plane answer at once; those
of the control plane may wait for the keyring, and are coroutines. They are told who asks: whoever is authorized when a
request comes need not be any more when its change is made, and a list shows only what its reader may see.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from kms.core import ciphertext
from kms.core.ciphertext import Ciphertext, Purpose
from kms.core.keyring import KeyGroup, VersionStatus
from kms.core.names import NO_SUCH_GROUP, is_blank
from kms.core.policy import Operation, Rule, Rules
from kms.core.provider import KeyringManager, MasterKeyProvider, UsageKeeper
from kms.errors import InvalidRequestError
from kms.limits import KEY_BYTES, MAX_FRAME_BYTES, MAX_REQUEST_ID_CHARACTERS
from kms.service.listing import Description, Listing, LongReply, Reader
from kms.service.operator import Operator
from kms.wire import messages
from kms.wire.messages import Reply, Request, group_of


class Caller(Reader, Protocol):
    """Who asks for an operation of the control plane."""

    def permit(self) -> None:
        """Raise the `WireError` that refuses the request, if it is refused by now."""
        ...

    @property
    def name(self) -> str:
        """What the principal is called."""
        ...

    @property
    def rules(self) -> Rules | None:
        """The rules that decide on its requests; None where it may do everything."""
        ...

    def may(self, operation: Operation) -> bool:
        """Whether it may use an operation that is on no key group."""
        ...

    @property
    def most_timed_disables(self) -> int | None:
        """How many versions the principal may have disabled for a time at once; None for any number."""
        ...


DataHandler = Callable[[Any], Reply]
ControlHandler = Callable[[Any, Caller], Awaitable[Reply | LongReply]]
"""From a request of its own kind. `Any`, since the tables below are keyed by that kind."""

_DECRYPT_OVERHEAD_BYTES = 128 + 4 * MAX_REQUEST_ID_CHARACTERS
"""The JSON around the values of a Decrypt request, base64's padding and a requestId, with room for spaces."""

# Each time it is looked up in an enum it costs 0.2 us.
_ENCRYPT, _DATA_KEY = Purpose.ENCRYPT, Purpose.DATA_KEY
_HEALTHY = messages.DetailReply("ok")


class Handlers:
    """All operations over the three seams."""

    def __init__(
        self,
        master_keys: MasterKeyProvider,
        keyring: KeyringManager,
        usage: UsageKeeper,
        *,
        random: Callable[[int], bytes],
        max_frame_bytes: int = MAX_FRAME_BYTES,
        operator: Operator | None = None,
    ) -> None:
        """`random` draws so many fresh bytes; `max_frame_bytes` is what a request line may have."""
        self._operator = Operator() if operator is None else operator
        self._max_frame_bytes = max_frame_bytes
        self._master_keys = master_keys
        self._keyring = keyring
        self._usage = usage
        self._random = random

    def data_plane(self) -> dict[type[Request], DataHandler]:
        """Which handler serves which request of the data plane."""
        return {
            messages.Health: self.health,
            messages.Ping: self.health,
            messages.GenerateDataKey: self.generate_data_key,
            messages.GenerateDataKeyWithoutPlaintext: self.generate_data_key_without_plaintext,
            messages.GenerateRandom: self.generate_random,
            messages.Encrypt: self.encrypt,
            messages.Decrypt: self.decrypt,
            messages.ReEncrypt: self.re_encrypt,
        }

    def control_plane(self) -> dict[type[Request], ControlHandler]:
        """Which handler serves which request of the control plane."""
        return {
            messages.CreateKeyGroup: self.create_key_group,
            messages.RotateKeyGroup: self.rotate_key_group,
            messages.ListKeyGroups: self.list_key_groups,
            messages.DescribeKeyGroup: self.describe_key_group,
            messages.DisableVersion: self.disable_version,
            messages.EnableVersion: self.enable_version,
            messages.DestroyVersion: self.destroy_version,
            messages.Status: self.status,
            messages.Reload: self.reload,
        }

    def health(self, request: messages.Health) -> Reply:
        return _HEALTHY

    def generate_data_key(self, request: messages.GenerateDataKey) -> Reply:
        return messages.DataKeyReply(*self._new_data_key(request))

    def generate_data_key_without_plaintext(self, request: messages.GenerateDataKeyWithoutPlaintext) -> Reply:
        _, wrapped, also = self._new_data_key(request)
        return messages.WrappedDataKeyReply(wrapped, also)

    def generate_random(self, request: messages.GenerateRandom) -> Reply:
        return messages.PlaintextReply(self._random(request.length))

    def _new_data_key(self, request: messages.GenerateDataKey) -> tuple[bytes, bytes, list[bytes] | None]:
        """A data key; wrapped; and under each of the other groups. All of them, or the request is refused."""
        key, first, aad = self._random(request.length or KEY_BYTES), group_of(request.key_id), request.aad or b""
        wrapped = self._master_keys.seal(first, key, aad, _DATA_KEY)
        if request.also_key_ids is None:
            return key, wrapped, None
        groups = [group_of(name) for name in request.also_key_ids]
        if len({first, *groups}) <= len(groups):
            raise InvalidRequestError("alsoKeyIds: a key group is named twice")
        try:
            return key, wrapped, [self._master_keys.seal(group, key, aad, _DATA_KEY) for group in groups]
        except InvalidRequestError as error:
            raise InvalidRequestError(f"alsoKeyIds: {str(error).removeprefix('keyId: ')}") from None

    def encrypt(self, request: messages.Encrypt) -> Reply:
        aad = request.aad or b""
        sealed = self._master_keys.seal(group_of(request.key_id), request.plaintext, aad, _ENCRYPT)
        if not self._is_returnable(sealed, aad, request):
            raise InvalidRequestError("plaintext: its ciphertext would be too large for a request; use a data key")
        return messages.CiphertextReply(sealed)

    def decrypt(self, request: messages.Decrypt) -> Reply:
        source = ciphertext.parse(request.ciphertext)
        return messages.PlaintextReply(self._opened(source, request))

    def re_encrypt(self, request: messages.ReEncrypt) -> Reply:
        aad = request.aad or b""
        source = ciphertext.parse(request.ciphertext)
        # What it was made for stays with it, wherever it is moved.
        sealed = self._master_keys.seal(group_of(request.key_id), self._opened(source, request), aad, source.purpose)
        if not self._is_returnable(sealed, aad, request):
            raise InvalidRequestError("ciphertext: re-encrypted it would be too large for a request; decrypt it instead")
        return messages.CiphertextReply(sealed)

    def _opened(self, source: Ciphertext, request: messages.Decrypt | messages.ReEncrypt) -> bytes:
        only_of = None if request.source_key_id is None else group_of(request.source_key_id)
        return self._master_keys.open(source, request.aad or b"", only_of)

    def _is_returnable(self, sealed: bytes, aad: bytes, request: Request) -> bool:
        """Whether it fits into the request that opens it, which is longer than the one that made it."""
        return (len(sealed) + len(aad)) * 4 // 3 + len(request.token) + _DECRYPT_OVERHEAD_BYTES <= self._max_frame_bytes

    async def create_key_group(self, request: messages.CreateKeyGroup, caller: Caller) -> Description:
        return Description(await self._keyring.create_group(_named(request.key_id), caller.permit), request.request_id)

    async def rotate_key_group(self, request: messages.RotateKeyGroup, caller: Caller) -> Description:
        return Description(await self._keyring.rotate_group(_named(request.key_id), caller.permit), request.request_id)

    async def list_key_groups(self, request: messages.ListKeyGroups, caller: Caller) -> Listing:
        return Listing(request, self._keyring.list_groups(), caller, self._usage)

    async def describe_key_group(self, request: messages.DescribeKeyGroup, caller: Caller) -> Description:
        group = self._keyring.find_group(_named(request.key_id))
        if group is None:
            raise InvalidRequestError(NO_SUCH_GROUP)
        return Description(group, request.request_id, self._usage)

    async def status(self, request: messages.Status, caller: Caller) -> Reply:
        operator, rules = self._operator, caller.rules
        report = None if operator.report is None or not caller.may(Operation.STATUS) else operator.report()
        return messages.StatusReply(
            messages.StatusView(
                version=operator.version,
                uptime_sec=operator.uptime,
                principal=caller.name,
                rules=None if rules is None else _viewed(rules),
                server=report,
            )
        )

    async def reload(self, request: messages.Reload, caller: Caller) -> Reply:
        return messages.DetailReply(await self._operator.reload())

    async def disable_version(self, request: messages.DisableVersion, caller: Caller) -> Reply:
        group, version, seconds = _named(request.key_id), request.version, request.for_seconds
        if seconds is None:
            is_tied = self._is_for_a_time(group, version)
            before = self._keyring.find_group(group)
            after = await self._keyring.disable_version(group, version, caller.permit)
            if is_tied:
                return _done(request, "disabled for good")
            return _done(request, "disabled", before, after)
        until = await self._usage.disable_version_for(
            group, version, seconds, caller.permit, by=caller.name, most=caller.most_timed_disables
        )
        return messages.DetailReply(f"{group} v{version} disabled for {seconds} s", until_epoch_sec=until)

    async def enable_version(self, request: messages.EnableVersion, caller: Caller) -> Reply:
        before = self._keyring.find_group(_named(request.key_id))
        after = await self._keyring.enable_version(request.key_id, request.version, caller.permit)
        return _done(request, "enabled", before, after)

    async def destroy_version(self, request: messages.DestroyVersion, caller: Caller) -> Reply:
        before = self._keyring.find_group(_named(request.key_id))
        after = await self._keyring.destroy_version(request.key_id, request.version, caller.permit)
        return _done(request, "destroyed", before, after)

    def _is_for_a_time(self, name: str, number: int) -> bool:
        group = self._keyring.find_group(name)
        version = None if group is None else group.versions.get(number)
        if version is None or version.status is not VersionStatus.DISABLED:
            return False
        trial = self._usage.usage_of(version).timed_disable
        return trial is not None and trial.ended_epoch_sec is None


def _named(key_id: str) -> str:
    if is_blank(key_id):
        raise InvalidRequestError("keyId: blank")
    return key_id


def _done(
    request: messages.VersionRequest, what: str, before: KeyGroup | None = None, after: KeyGroup | None = None
) -> Reply:
    """That a version is `what` now; or was already, where its group is the very same one `after` as `before`."""
    version = f"{request.key_id} v{request.version}"
    if after is not None and after is before:
        return messages.DetailReply(f"{version} was {after.versions[request.version].status} already; nothing was changed")
    return messages.DetailReply(f"{version} {what}")


def _viewed(rules: Rules) -> list[messages.RuleView]:
    return [_rule(rule, allow=True) for rule in rules.allow] + [_rule(rule, allow=False) for rule in rules.deny]


def _rule(rule: Rule, *, allow: bool) -> messages.RuleView:
    operations = sorted(operation.value for operation in rule.operations)
    return messages.RuleView(allow, operations, list(rule.groups), rule.aad_prefix)
