"""What a power cut may leave on a disk: every state that POSIX allows, from the system calls that were made.

The rules, as weak as the standard lets them be:

- fsync of a file makes its content and its length durable, and nothing else: not its name.
- fsync of a directory makes the names in it durable, and nothing else: not its own name, not the content of its files.
- Of what a file had since its last fsync, anything may be there: any prefix of the operations, the last one cut off
  anywhere; and at its full length, any of its blocks old, zero or garbage. But what was durable before the place where it
  was written to stays as it is, also where both are in one block: what SQLite calls a power-safe overwrite.
- A name in a directory is, by itself and independent of all others, anything that it has been since the directory's last
  fsync. So a rename may have happened for the one name and not for the other, and later operations may be there where
  earlier ones are lost. But a single name is never torn: it leads to one file or another, or to none.
- A file comes into being with its mode.

A call that changes files and is not known here is an error, so a save cannot escape by a new one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kms_tests.faults.strace import Call

State = dict[str, bytes | None]
"""What is below the root: paths relative to it, each with a file's content, or None for a directory."""

_HARMLESS: Final = frozenset(
    """
    read pread64 readv lseek close stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat
    getdents64 getcwd chdir mmap fcntl flock ioctl fadvise64 poll ppoll select pselect6 epoll_ctl epoll_wait epoll_pwait
    epoll_create1 dup dup2 dup3 pipe2 execve statfs fstatfs eventfd2 memfd_create signalfd4 getxattr lgetxattr fgetxattr
    socket socketpair connect bind listen accept4 getsockname getpeername setsockopt getsockopt sendto recvfrom recvmsg
    shutdown inotify_init1 exit fchmod fchown setxattr listxattr flistxattr
    """.split()  # noqa: SIM905 (a list of strings would be three times as long)
)
"""Calls that leave what is on the disk as it is."""


@dataclass(frozen=True)
class Thorough:
    """How closely torn files are looked at: the step between lengths, the size of a block, and how many subsets."""

    step: int = 31
    block: int = 128
    subsets: int = 64


SHORT: Final = Thorough()
LONG: Final = Thorough(step=1, block=64, subsets=4096)


@dataclass
class _File:
    content: bytes = b""
    """As the process sees it."""

    history: list[bytes] = field(default_factory=list)
    """Its contents since its last fsync, the durable one first."""

    def __post_init__(self) -> None:
        self.history.append(self.content)

    def change(self, content: bytes) -> None:
        self.content = content
        self.history.append(content)

    def contents(self, how: Thorough) -> Iterator[bytes]:
        """Whatever may be left of it."""
        yield from self.history
        for before, after in itertools.pairwise(self.history):
            # The prefixes of what was written, over what was there.
            start = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
            for end in {*range(start, len(after), how.step), len(after) - 1} - {-1}:
                yield after[:end] + before[end:]
                yield after[:end]
        if len(self.history) > 1:
            yield from self._torn(how)

    def _torn(self, how: Thorough) -> Iterator[bytes]:
        durable, latest = self.history[0], self.content
        columns = enumerate(zip(*self.history, strict=False))
        kept = next((at for at, column in columns if len(set(column)) > 1), min(map(len, self.history)))
        blocks = [latest[at : at + how.block] for at in range(0, len(latest), how.block)]
        old = [durable[at : at + how.block].ljust(len(block), b"\0") for at, block in _placed(blocks, how.block)]
        zero = [bytes(len(block)) for block in blocks]
        garbage = [random.Random(at).randbytes(len(block)) for at, block in _placed(blocks, how.block)]
        for other in (old, zero, garbage):
            for lost in _subsets(len(blocks), how.subsets):
                torn = b"".join(other[i] if i in lost else block for i, block in enumerate(blocks))
                yield latest[:kept] + torn[kept:]


def _placed(blocks: Sequence[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    return ((index * size, block) for index, block in enumerate(blocks))


def _subsets(count: int, most: int) -> Iterator[set[int]]:
    """All subsets of range(count), or, where these are more than `most`, all of it, each one of it and a random sample."""
    if 1 << count <= most:
        for bits in range(1 << count):
            yield {i for i in range(count) if bits >> i & 1}
        return
    yield set(range(count))
    yield from ({i} for i in range(count))
    chance = random.Random(count)
    for _ in range(most):
        yield {i for i in range(count) if chance.random() < 0.5}


@dataclass
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    history: dict[str, list[_File | _Directory | None]] = field(default_factory=dict)
    """What each name was since the last fsync of this directory, the durable one first."""

    def set(self, name: str, node: _File | _Directory | None) -> None:
        self.history.setdefault(name, [self.names.get(name)]).append(node)
        if node is None:
            del self.names[name]
        else:
            self.names[name] = node

    def states(self, how: Thorough, place: str) -> Iterator[State]:
        """Whatever may be left of this directory, whose path is `place`."""
        choices: list[list[State]] = []
        for name in sorted({*self.names, *self.history}):
            path = f"{place}{name}"
            nodes = self.history.get(name, [self.names.get(name)])
            different = {id(node): node for node in nodes}.values()
            choices.append([state for node in different for state in _states(node, how, path)])
        for chosen in itertools.product(*choices):
            yield {path: content for state in chosen for path, content in state.items()}


def _states(node: _File | _Directory | None, how: Thorough, path: str) -> Iterator[State]:
    if node is None:
        yield {}
    elif isinstance(node, _File):
        for content in dict.fromkeys(node.contents(how)):
            yield {path: content}
    else:
        yield from ({path: None, **state} for state in node.states(how, f"{path}/"))


class Disk:
    """A directory, durable as it is given, and what a process does to it call by call."""

    def __init__(self, root: Path, state: State) -> None:
        self._root = root
        self._top = _Directory()
        for path in sorted(state):
            parent, name = self._find(root / path)
            content = state[path]
            parent.names[name] = _Directory() if content is None else _File(content)
        self._positions: dict[int, int] = {}
        self._unnamed: dict[int, _File] = {}
        """By the descriptor: made with O_TMPFILE, and on no disk until they have a name."""

    def states(self, how: Thorough) -> Iterator[State]:
        """Every state that a power cut may leave now, each once."""
        seen: set[frozenset[tuple[str, bytes | None]]] = set()
        for state in self._top.states(how, ""):
            key = frozenset(state.items())
            if key not in seen:
                seen.add(key)
                yield state

    def state(self) -> State:
        """The state that a process sees: what is left when only the process dies."""
        return dict(_visible(self._top, ""))

    def apply(self, call: Call) -> bool:
        """Do what `call` did; whether that changed anything on the disk."""
        if call.result is None or call.result < 0 or call.name in _HARMLESS:
            return False
        act = getattr(self, f"_{call.name}", None)
        if act is not None:
            return bool(act(call))
        touched = [argument for argument in call.arguments if "\\x" in argument and self._is_below(call, argument)]
        assert not touched, f"a system call whose effect on a power cut is not known here: {call}"
        return False

    def _is_below(self, call: Call, argument: str) -> bool:
        index = call.arguments.index(argument)
        path = call.path(index) if argument.startswith('"') else call.descriptor(index)[1]
        return path == self._root or self._root in path.parents

    def _openat(self, call: Call) -> bool:
        path, flags = call.path(1), call.arguments[2].split("|")
        if "O_TMPFILE" in flags:
            assert call.result is not None
            if path == self._root or self._holds(path):
                self._unnamed[call.result] = _File()
                self._positions[call.result] = 0
            return False
        if not self._holds(path) or "O_DIRECTORY" in flags:
            return False
        assert call.result is not None
        parent, name = self._find(path)
        changed = False
        if name not in parent.names:
            assert "O_CREAT" in flags, call
            parent.set(name, _File())
            changed = True
        file = parent.names[name]
        if isinstance(file, _File):
            if "O_TRUNC" in flags:
                file.change(b"")
                changed = True
            self._positions[call.result] = len(file.content) if "O_APPEND" in flags else 0
        return changed

    def _write(self, call: Call) -> bool:
        number, path = call.descriptor()
        assert call.result is not None
        if number in self._unnamed:
            file = self._unnamed[number]
            file.change(file.content + call.text(1)[: call.result])
            return False
        if not self._holds(path):
            return False
        at = self._positions[number]
        self._positions[number] = at + call.result
        return self._write_at(path, at, call.text(1)[: call.result])

    def _pwrite64(self, call: Call) -> bool:
        assert call.result is not None
        path = call.descriptor()[1]
        return self._holds(path) and self._write_at(path, int(call.arguments[3]), call.text(1)[: call.result])

    def _write_at(self, path: Path, at: int, data: bytes) -> bool:
        file = self._file(path)
        file.change(file.content[:at].ljust(at, b"\0") + data + file.content[at + len(data) :])
        return True

    def _ftruncate(self, call: Call) -> bool:
        path, length = call.descriptor()[1], int(call.arguments[1])
        if self._holds(path):
            file = self._file(path)
            file.change(file.content[:length].ljust(length, b"\0"))
        return self._holds(path)

    def _fsync(self, call: Call) -> bool:
        number, path = call.descriptor()
        if number in self._unnamed:
            file = self._unnamed[number]
            file.history = [file.content]
            return False
        if not self._holds(path) and path != self._root:
            return False
        node = self._node(path)
        if isinstance(node, _File):
            node.history = [node.content]
        else:
            node.history.clear()
        return True

    _fdatasync = _fsync

    def _linkat(self, call: Call) -> bool:
        """Of a file without a name, by way of /proc; what is at work here makes no other links."""
        source, target = call.path(1), call.path(3)
        if not self._holds(target):
            return False
        parent, name = self._find(target)
        parent.set(name, self._unnamed.pop(int(source.name)))
        return True

    def _renameat(self, call: Call) -> bool:
        return self._renamed(call, call.path(1), call.path(3))

    _renameat2 = _renameat

    def _rename(self, call: Call) -> bool:
        return self._renamed(call, call.path(0), call.path(1))

    def _renamed(self, call: Call, source: Path, target: Path) -> bool:
        if not self._holds(source):
            assert not self._holds(target), call
            return False
        (old_parent, old), (new_parent, new) = self._find(source), self._find(target)
        node = old_parent.names[old]
        new_parent.set(new, node)
        old_parent.set(old, None)
        return True

    def _unlinkat(self, call: Call) -> bool:
        return self._removed(call.path(1))

    def _unlink(self, call: Call) -> bool:
        return self._removed(call.path(0))

    def _removed(self, path: Path) -> bool:
        if self._holds(path):
            parent, name = self._find(path)
            parent.set(name, None)
        return self._holds(path)

    def _mkdir(self, call: Call) -> bool:
        path = call.path(0)
        if self._holds(path):
            parent, name = self._find(path)
            parent.set(name, _Directory())
        return self._holds(path)

    def _holds(self, path: Path) -> bool:
        return self._root in path.parents

    def _find(self, path: Path) -> tuple[_Directory, str]:
        node: _File | _Directory = self._top
        *parents, name = path.relative_to(self._root).parts
        for part in parents:
            assert isinstance(node, _Directory), path
            node = node.names[part]
        assert isinstance(node, _Directory), path
        return node, name

    def _node(self, path: Path) -> _File | _Directory:
        if path == self._root:
            return self._top
        parent, name = self._find(path)
        return parent.names[name]

    def _file(self, path: Path) -> _File:
        node = self._node(path)
        assert isinstance(node, _File), path
        return node


def _visible(directory: _Directory, place: str) -> Iterator[tuple[str, bytes | None]]:
    for name, node in directory.names.items():
        path = f"{place}{name}"
        if isinstance(node, _File):
            yield path, node.content
        else:
            yield path, None
            yield from _visible(node, f"{path}/")


def read(root: Path) -> State:
    """The state of a real directory; sockets are no part of it."""
    state: State = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir():
            state[str(path.relative_to(root))] = None
        elif path.is_file():
            state[str(path.relative_to(root))] = path.read_bytes()
    return state


def write(state: State, root: Path) -> None:
    """Make `state` real below `root`, which is empty."""
    for path, content in sorted(state.items()):
        if content is None:
            (root / path).mkdir(mode=0o700)
        else:
            (root / path).touch(mode=0o600)
            (root / path).write_bytes(content)
