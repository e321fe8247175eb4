"""The rules of key groups and their versions: each row of the contract's transition table, then all of them at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kms.core import keyring as keyring_module
from kms.core.kek import Kek
from kms.core.keyring import (
    EMPTY,
    Command,
    CreateGroup,
    DestroyVersion,
    DisableVersion,
    EnableVersion,
    Keyring,
    KeySlot,
    KeyVersion,
    NewKey,
    RotateGroup,
    VersionStatus,
    apply,
)
from kms.core.names import check_new_name, is_possible_name
from kms.core.secret import Secret
from kms.errors import InvalidRequestError
from kms.limits import MAX_VERSION
from kms_tests.keks import group_of
from kms_tests.strategies import new_names, stored_names

ACTIVE, ENABLED, DISABLED, DESTROYED = VersionStatus
G = "billing"


def _mint(slot: KeySlot) -> NewKey:
    return NewKey(Kek(Secret(bytearray(32))), f"{slot.group}/{slot.version}".encode())


def _apply(keyring: Keyring, *commands: Command, now: int = 1_700_000_000) -> Keyring:
    for command in commands:
        keyring = apply(keyring, command, now=now, mint=_mint)
    return keyring


def _with_v1(status: VersionStatus) -> Keyring:
    """A keyring with one group, whose version 1 has this status (and version 2 is ACTIVE, unless version 1 is)."""
    made = _apply(EMPTY, CreateGroup(G))
    if status is not ACTIVE:
        made = _apply(made, RotateGroup(G))
    if status is DISABLED:
        made = _apply(made, DisableVersion(G, 1))
    if status is DESTROYED:
        made = _apply(made, DestroyVersion(G, 1))
    assert _status(made, 1) is status
    return made


def _status(keyring: Keyring, version: int) -> VersionStatus:
    return keyring.groups[G].versions[version].status


def _refused(keyring: Keyring, command: Command) -> str:
    before = dict(keyring.groups)
    with pytest.raises(InvalidRequestError) as caught:
        _apply(keyring, command)
    assert dict(keyring.groups) == before
    return str(caught.value)


# create group


def test_create_makes_version_1_ACTIVE() -> None:
    group = _apply(EMPTY, CreateGroup(G), now=7).groups[G]
    assert (group.key_id, group.created_at, group.active.version) == (G, 7, 1)
    assert [(v.version, v.status, v.created_at, v.wrapped) for v in group.versions.values()] == [
        (1, ACTIVE, 7, b"billing/1")
    ]


def test_create_is_refused_when_the_name_exists() -> None:
    assert _refused(_with_v1(ACTIVE), CreateGroup(G)) == "keyId: the key group exists already"


def test_create_is_refused_when_the_name_exists_with_tombstones() -> None:
    assert "exists already" in _refused(_with_v1(DESTROYED), CreateGroup(G))


def test_create_compares_names_byte_for_byte() -> None:
    assert list(_apply(EMPTY, CreateGroup("a"), CreateGroup("A")).groups) == ["a", "A"]


@pytest.mark.parametrize("name", ["", " ", "-a", ".a", "_a", "a b", "a/b", "é", "a\n", "a\0", "x" * 65, "\ud800", "٣"])
def test_create_is_refused_for_a_bad_name(name: str) -> None:
    assert _refused(EMPTY, CreateGroup(name)).startswith("keyId: a name has 1 to 64 of")


@given(new_names)
def test_create_takes_every_name_of_the_rule(name: str) -> None:
    check_new_name(name)
    assert is_possible_name(name)


def test_create_is_refused_when_the_keyring_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring_module, "MAX_KEY_GROUPS", 1)
    assert "the most a keystore holds" in _refused(_with_v1(ACTIVE), CreateGroup("other"))


# rotate


def test_rotate_makes_the_next_version_ACTIVE_and_the_former_ENABLED() -> None:
    group = _apply(_with_v1(ACTIVE), RotateGroup(G), now=9).groups[G]
    assert group.active.version == 2
    assert [(v.version, v.status) for v in group.versions.values()] == [(1, ENABLED), (2, ACTIVE)]
    assert (group.active.created_at, group.active.wrapped) == (9, b"billing/2")


def test_rotate_is_refused_for_no_such_group() -> None:
    assert _refused(EMPTY, RotateGroup(G)) == "keyId: no such key group"


def test_rotate_never_reuses_the_number_of_a_tombstone() -> None:
    made = _apply(
        _with_v1(ACTIVE), RotateGroup(G), RotateGroup(G), DestroyVersion(G, 2), DestroyVersion(G, 1), RotateGroup(G)
    )
    assert [(v.version, v.status) for v in made.groups[G].versions.values()] == [
        (1, DESTROYED),
        (2, DESTROYED),
        (3, ENABLED),
        (4, ACTIVE),
    ]


def test_rotate_counts_on_from_the_highest_version_even_when_a_lower_one_is_ACTIVE() -> None:
    low = KeyVersion.build(G, 1, ACTIVE, 0, b"w", None)
    high = KeyVersion.build(G, 9, DESTROYED, 0, None, None)
    made = _apply(Keyring(0, {G: group_of(G, {1: low, 9: high})}), RotateGroup(G))
    assert made.groups[G].active.version == 10


def test_rotate_is_refused_past_the_highest_number() -> None:
    last = KeyVersion.build(G, MAX_VERSION, ACTIVE, 0, b"w", None)
    made = Keyring(0, {G: group_of(G, {MAX_VERSION: last})})
    assert "as many versions as it can hold" in _refused(made, RotateGroup(G))


def test_rotate_is_refused_past_the_most_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring_module, "MAX_VERSIONS_PER_GROUP", 2)
    assert "as many versions as it can hold" in _refused(_with_v1(ENABLED), RotateGroup(G))


# disable


def test_disable_takes_ENABLED_to_DISABLED() -> None:
    assert _status(_apply(_with_v1(ENABLED), DisableVersion(G, 1)), 1) is DISABLED


def test_disable_leaves_DISABLED_as_it_is() -> None:
    made = _with_v1(DISABLED)
    assert _apply(made, DisableVersion(G, 1)) is made


def test_disable_is_refused_when_the_version_is_ACTIVE() -> None:
    assert _refused(_with_v1(ACTIVE), DisableVersion(G, 1)) == "version: it is ACTIVE; rotate the key group first"


def test_disable_is_refused_when_the_version_is_DESTROYED() -> None:
    assert "DESTROYED" in _refused(_with_v1(DESTROYED), DisableVersion(G, 1))


# enable


def test_enable_takes_DISABLED_to_ENABLED() -> None:
    made = _apply(_with_v1(DISABLED), EnableVersion(G, 1))
    assert _status(made, 1) is ENABLED
    assert made.groups[G].versions[1].key is not None


def test_enable_leaves_ENABLED_as_it_is() -> None:
    made = _with_v1(ENABLED)
    assert _apply(made, EnableVersion(G, 1)) is made


def test_enable_leaves_ACTIVE_as_it_is() -> None:
    made = _with_v1(ACTIVE)
    assert _apply(made, EnableVersion(G, 1)) is made


def test_enable_is_refused_when_the_version_is_DESTROYED() -> None:
    assert "DESTROYED" in _refused(_with_v1(DESTROYED), EnableVersion(G, 1))


# destroy


@pytest.mark.parametrize("status", [ENABLED, DISABLED])
def test_destroy_takes_ENABLED_and_DISABLED_to_DESTROYED(status: VersionStatus) -> None:
    assert _status(_apply(_with_v1(status), DestroyVersion(G, 1)), 1) is DESTROYED


def test_destroy_leaves_DESTROYED_as_it_is() -> None:
    made = _with_v1(DESTROYED)
    assert _apply(made, DestroyVersion(G, 1)) is made


def test_destroy_is_refused_when_the_version_is_ACTIVE() -> None:
    assert _refused(_with_v1(ACTIVE), DestroyVersion(G, 1)) == "version: it is ACTIVE; rotate the key group first"


def test_destroy_leaves_a_tombstone_without_key_bytes() -> None:
    tombstone = _with_v1(DESTROYED).groups[G].versions[1]
    assert (tombstone.version, tombstone.wrapped, tombstone.key) == (1, None, None)


# every change of one version


@pytest.mark.parametrize("kind", [DisableVersion, EnableVersion, DestroyVersion])
def test_a_change_of_a_version_of_no_such_group_is_refused(
    kind: type[DisableVersion | EnableVersion | DestroyVersion],
) -> None:
    assert _refused(EMPTY, kind(G, 1)) == "keyId: no such key group"


@pytest.mark.parametrize("kind", [DisableVersion, EnableVersion, DestroyVersion])
@pytest.mark.parametrize("version", [0, 3, MAX_VERSION])
def test_a_change_of_no_such_version_is_refused(
    kind: type[DisableVersion | EnableVersion | DestroyVersion], version: int
) -> None:
    assert _refused(_with_v1(ENABLED), kind(G, version)) == "version: no such version in this key group"


def test_a_change_leaves_the_keyring_before_it_untouched() -> None:
    before = _with_v1(ENABLED)
    _apply(before, DestroyVersion(G, 1))
    assert _status(before, 1) is ENABLED
    assert before.groups[G].versions[1].key is not None


def test_a_change_leaves_other_groups_as_they_are() -> None:
    before = _apply(_with_v1(ENABLED), CreateGroup("other"))
    assert _apply(before, DestroyVersion(G, 1)).groups["other"] is before.groups["other"]


def test_a_change_does_not_count_as_a_save() -> None:
    assert _apply(replace(EMPTY, generation=5), CreateGroup(G)).generation == 5


# the words


@pytest.mark.parametrize(("status", "decrypts"), [(ACTIVE, True), (ENABLED, True), (DISABLED, False), (DESTROYED, False)])
def test_ACTIVE_and_ENABLED_versions_decrypt_and_no_others(status: VersionStatus, decrypts: bool) -> None:
    assert _with_v1(status).groups[G].versions[1].decrypts is decrypts


def test_a_kek_id_is_what_stands_in_front_of_every_ciphertext() -> None:
    assert _with_v1(ACTIVE).groups[G].active.kek_id == b"\x07billing" + (1).to_bytes(8, "big")


def test_a_group_rotates_by_itself() -> None:
    made = _apply(EMPTY, CreateGroup("a"), CreateGroup("b"), RotateGroup("a"))
    assert (made.groups["a"].active.version, made.groups["b"].active.version) == (2, 1)


def test_the_keys_to_be_wiped_are_those_that_are_not_destroyed() -> None:
    made = _apply(_with_v1(DESTROYED), CreateGroup("other"))
    assert len(list(made.live_keys())) == 2


def test_a_keyring_is_a_value_that_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        EMPTY.generation = 1  # type: ignore[misc] # that it cannot be done is the test


def test_the_repr_of_a_version_shows_no_key() -> None:
    assert "<Kek>" in repr(_with_v1(ACTIVE).groups[G].active)


@given(stored_names)
def test_a_migrated_name_may_be_any_that_is_not_blank(name: str) -> None:
    assert is_possible_name(name)


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "\u00a0", "\u0085", "\u2007\u202f"])
def test_a_migrated_name_may_be_long_and_what_only_python_calls_blank(name: str) -> None:
    assert is_possible_name(name)


@pytest.mark.parametrize("name", ["", " ", "\t\n", "\x1c\x1d\x1e\x1f\v\f\r", "a\ud800"])
def test_a_name_may_be_neither_blank_nor_half_a_character(name: str) -> None:
    assert not is_possible_name(name)


class KeyringMachine(RuleBasedStateMachine):
    """Random commands against a model that is only a table: group -> version -> status."""

    groups = st.sampled_from(["a", "b", "-bad"])
    numbers = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.keyring = EMPTY
        self.model: dict[str, dict[int, str]] = {}
        self.destroyed: set[tuple[str, int]] = set()

    def _try(self, command: Command) -> bool:
        try:
            self.keyring = _apply(self.keyring, command)
        except InvalidRequestError:
            return False
        return True

    @rule(group=groups)
    def create(self, group: str) -> None:
        allowed = group not in self.model and group != "-bad"
        assert self._try(CreateGroup(group)) is allowed
        if allowed:
            self.model[group] = {1: "ACTIVE"}

    @rule(group=groups)
    def rotate(self, group: str) -> None:
        allowed = group in self.model
        assert self._try(RotateGroup(group)) is allowed
        if allowed:
            versions = {n: "ENABLED" if s == "ACTIVE" else s for n, s in self.model[group].items()}
            self.model[group] = {**versions, max(versions) + 1: "ACTIVE"}

    def _change(self, command: DisableVersion | EnableVersion | DestroyVersion, table: Mapping[str, str]) -> None:
        now = self.model.get(command.group, {}).get(command.version, "")
        assert self._try(command) is (now in table)
        if now in table:
            self.model[command.group][command.version] = table[now]
            if table[now] == "DESTROYED":
                self.destroyed.add((command.group, command.version))

    @rule(group=groups, number=numbers)
    def disable(self, group: str, number: int) -> None:
        self._change(DisableVersion(group, number), {"ENABLED": "DISABLED", "DISABLED": "DISABLED"})

    @rule(group=groups, number=numbers)
    def enable(self, group: str, number: int) -> None:
        self._change(EnableVersion(group, number), {"DISABLED": "ENABLED", "ENABLED": "ENABLED", "ACTIVE": "ACTIVE"})

    @rule(group=groups, number=numbers)
    def destroy(self, group: str, number: int) -> None:
        table = {"ENABLED": "DESTROYED", "DISABLED": "DESTROYED", "DESTROYED": "DESTROYED"}
        self._change(DestroyVersion(group, number), table)

    @invariant()
    def it_is_the_model(self) -> None:
        made = {name: {n: v.status.value for n, v in g.versions.items()} for name, g in self.keyring.groups.items()}
        assert made == self.model
        assert list(made) == list(self.model)

    @invariant()
    def exactly_one_version_is_active(self) -> None:
        for group in self.keyring.groups.values():
            assert [v for v in group.versions.values() if v.status is ACTIVE] == [group.active]
            assert list(group.versions) == sorted(group.versions)

    @invariant()
    def what_is_destroyed_stays_so_and_holds_no_key(self) -> None:
        for name, group in self.keyring.groups.items():
            for number, version in group.versions.items():
                gone = (name, number) in self.destroyed
                assert (version.key is None) is (version.wrapped is None) is gone


TestKeyringMachine = KeyringMachine.TestCase
