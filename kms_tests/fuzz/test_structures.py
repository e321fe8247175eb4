"""Documents that are altered as documents: right JSON, right MAC, hostile content.

A fuzzer of bytes seldom gets past a MAC. Here a field is replaced, dropped, moved or put in twice and the MAC made
anew, as only someone could who knows the passphrase. What comes out is refused with the one error of a keystore, or
is a legal keyring whose every key is the one that was wrapped for its slot.
"""

from __future__ import annotations

import copy
import json
import random
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.core.keyring import Keyring
from kms_tests.budget import within_budget
from kms_tests.fuzz.targets import (
    KEYSTORES,
    check_ciphertext,
    check_container,
    check_legal,
    check_reencrypt,
    containers,
    encode4,
    open4,
    reseal4,
    world,
)

Path = tuple[str | int, ...]
Tree = Any

FORMATS = [pytest.param(one.encode(), one.reseal, one.open, id=f"format {number}") for number, one in KEYSTORES.items()]
SHORT, LONG = 400, 100_000

hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**400, 10**4299]),
    st.floats(),
    st.sampled_from(
        ["", " ", "\0", "ACTIVE", "DESTROYED", "active", "default", "x" * 256, "\ud800", "A" * 40, "=", "AA=="]
    ),
    st.text(max_size=20),
    st.binary(max_size=70).map(lambda data: b64encode(data).decode()),
    st.builds(list),
    st.builds(dict),
    st.builds(lambda: [[], [], []]),
)


def _paths(tree: Tree, at: Path = ()) -> list[Path]:
    """Every place in the tree but its root."""
    steps: list[str | int] = []
    if isinstance(tree, dict):
        steps = list(tree)
    elif isinstance(tree, list):
        steps = list(range(len(tree)))
    return [path for step in steps for path in [(*at, step), *_paths(tree[step], (*at, step))]]


def _get(tree: Tree, path: Path) -> Tree:
    for step in path:
        tree = tree[step]
    return tree


def _alter(tree: Tree, data: st.DataObject) -> None:
    """One change somewhere in the tree."""
    path = data.draw(st.sampled_from(_paths(tree)))
    parent, last = _get(tree, path[:-1]), path[-1]
    change = data.draw(st.sampled_from(["replace", "drop", "copy", "repeat", "rename"]))
    if change == "replace":
        parent[last] = data.draw(hostile)
    elif change == "drop":
        del parent[last]
    elif change == "copy":
        parent[last] = copy.deepcopy(_get(tree, data.draw(st.sampled_from(_paths(tree)))))
    elif isinstance(parent, list):
        parent.insert(0, copy.deepcopy(_get(tree, path)))
    else:
        parent[data.draw(st.text(max_size=8))] = parent.pop(last)


def _wrapped(keyring: Keyring) -> set[tuple[str, int, bytes]]:
    return {(v.key_id, n, w.wrapped) for v in keyring.groups.values() for n, w in v.versions.items() if w.wrapped}


@pytest.mark.parametrize(("raw", "reseal", "open_"), FORMATS)
def test_a_hostile_document_under_a_right_mac_is_refused_or_a_legal_keyring(
    raw: bytes, reseal: Callable[[Tree], bytes], open_: Callable[[bytes], Keyring], long: bool
) -> None:
    refused = loaded = 0
    wrapped = _wrapped(open4(encode4()))

    @settings(max_examples=LONG if long else SHORT)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal refused, loaded
        tree = json.loads(raw)
        for _ in range(data.draw(st.integers(1, 3))):
            if _paths(tree):
                _alter(tree, data)
        altered = reseal(tree)
        keyring = check_legal(altered, open_)
        within_budget(lambda: check_legal(altered, open_))
        refused += keyring is None
        loaded += keyring is not None
        if keyring is not None and open_ is open4:
            assert _wrapped(keyring) <= wrapped, "a key in a slot that it was not wrapped for"

    run()
    # Both ends are reached, or the test would be about nothing.
    assert refused > 20
    assert loaded > 5


@pytest.mark.parametrize(
    ("check", "seeds"),
    [
        (check_ciphertext, [*world().ciphertexts, *world().closed]),
        (check_container, list(containers())),
        (check_reencrypt, [*containers(), *world().ciphertexts]),
    ],
    ids=["ciphertext", "container", "reencrypt"],
)
def test_nothing_that_is_put_together_from_pieces_of_what_was_made_opens(
    check: Callable[[bytes], None], seeds: list[bytes], long: bool
) -> None:
    @settings(max_examples=LONG if long else SHORT)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        one, other = data.draw(st.sampled_from(seeds)), data.draw(st.sampled_from(seeds))
        start, end = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
        middle = data.draw(st.binary(max_size=20))
        within_budget(lambda: check(one[:start] + middle + other[end:]))

    run()


def test_a_large_keystore_loads_and_its_altered_copies_are_refused() -> None:
    tree = json.loads(encode4())
    group = tree["keyGroups"][1]
    tombstone = {"version": 1, "status": "DESTROYED", "createdAtEpochSec": 1, "wrappedKey": None}
    active = group["versions"][-1]
    group["versions"] = [{**tombstone, "version": 10 + number} for number in range(9_000)] + [active]
    assert check_legal(reseal4(tree), open4) is not None
    random.Random(1).shuffle(group["versions"])
    assert check_legal(reseal4(tree), open4) is not None
    group["versions"].append(group["versions"][0])
    assert check_legal(reseal4(tree), open4) is None
