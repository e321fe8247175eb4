"""The rules of what a power cut may leave, on operations so few that every state can be written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from kms_tests.faults.disk import LONG, Disk, State
from kms_tests.faults.strace import Call

ROOT = Path("/root")


def _hex(text: str) -> str:
    return "".join(f"\\x{octet:02x}" for octet in text.encode())


def _string(text: str) -> str:
    return f'"{_hex(text)}"'


def _call(name: str, *arguments: str, result: int = 0) -> Call:
    return Call(1, name, arguments, result)


def _open(name: str, flags: str = "O_WRONLY|O_CREAT|O_EXCL") -> Call:
    return _call("openat", f"AT_FDCWD<{_hex('/')}>", _string(f"/root/{name}"), flags, "0600", result=3)


def _write(name: str, data: str) -> Call:
    return _call("write", f"3<{_hex(f'/root/{name}')}>", _string(data), str(len(data)), result=len(data))


def _fsync(path: str) -> Call:
    return _call("fsync", f"3<{_hex(path)}>")


def _rename(source: str, target: str) -> Call:
    return _call("rename", _string(f"/root/{source}"), _string(f"/root/{target}"))


def _after(before: State, *calls: Call) -> list[State]:
    disk = Disk(ROOT, before)
    for call in calls:
        disk.apply(call)
    return list(disk.states(LONG))


def test_a_new_name_is_there_or_not_until_its_directory_is_synced() -> None:
    assert _after({}, _open("a")) == [{}, {"a": b""}]
    assert _after({}, _open("a"), _fsync("/root")) == [{"a": b""}]


def test_fsync_of_a_file_does_not_make_its_name_durable() -> None:
    assert _after({}, _open("a"), _write("a", "x"), _fsync("/root/a")) == [{}, {"a": b"x"}]


def test_fsync_of_a_directory_does_not_make_content_durable() -> None:
    states = _after({}, _open("a"), _write("a", "xyz"), _fsync("/root"))
    contents = [state["a"] for state in states]
    assert {b"", b"x", b"xy", b"xyz", bytes(3)} < set(contents)
    assert any(content is not None and len(content) == 3 and content not in (b"xyz", bytes(3)) for content in contents)


def test_a_rename_may_have_happened_for_either_name_alone() -> None:
    states = _after({"a": b"new", "b": b"old"}, _rename("a", "b"))
    assert len(states) == 4
    for state in ({"a": b"new", "b": b"old"}, {"a": b"new", "b": b"new"}, {"b": b"old"}, {"b": b"new"}):
        assert state in states
    assert _after({"a": b"new", "b": b"old"}, _rename("a", "b"), _fsync("/root")) == [{"b": b"new"}]


def test_a_file_that_is_cut_to_nothing_may_be_old_empty_or_anything_between() -> None:
    states = _after({"a": b"old"}, _open("a", "O_WRONLY|O_TRUNC"), _write("a", "new"), _fsync("/root"))
    contents = {state["a"] for state in states}
    assert {b"old", b"", b"n", b"ne", b"new"} <= contents


def test_a_directory_that_was_made_may_be_gone_with_all_that_is_durable_in_it() -> None:
    made = (
        _call("mkdir", _string("/root/d"), "0700"),
        _open("d/a"),
        _write("d/a", "x"),
        _fsync("/root/d/a"),
        _fsync("/root/d"),
    )
    assert _after({}, *made) == [{}, {"d": None, "d/a": b"x"}]
    assert _after({}, *made, _fsync("/root")) == [{"d": None, "d/a": b"x"}]


def test_a_call_that_failed_changes_nothing() -> None:
    assert _after({"a": b"x"}, _call("unlink", _string("/root/a"), result=-1)) == [{"a": b"x"}]


def test_a_call_that_is_not_known_is_an_error_if_it_is_about_the_directory() -> None:
    with pytest.raises(AssertionError, match="not known here"):
        _after({}, _call("link", _string("/root/a"), _string("/root/b")))
    assert _after({}, _call("link", _string("/etc/a"), _string("/etc/b"))) == [{}]
