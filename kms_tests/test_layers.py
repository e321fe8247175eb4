"""Who may import whom, read from the source. Imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "errors": set[str](),
    "limits": set[str](),
    "core": {"errors", "limits", "core"},
    "wire": {"errors", "limits", "core", "wire"},
    "host": {"errors", "limits", "core", "host"},
    "storage": {"errors", "limits", "core", "host", "storage"},
    "service": {"errors", "limits", "core", "wire", "host", "storage", "service"},
    "server": {"errors", "limits", "core", "wire", "host", "storage", "service", "server"},
    "client": {"errors", "limits", "core", "wire", "host", "client"},
    "cli": {"errors", "limits", "core", "wire", "host", "storage", "service", "server", "client", "cli"},
}
IMPURE = {
    "trio",
    "asyncio",
    "socket",
    "pathlib",
    "io",
    "fcntl",
    "tempfile",
    "shutil",
    "subprocess",
    "threading",
    "time",
    "datetime",
}
SOURCES = sorted((ROOT / "kms").rglob("*.py"))


def _layer(path: Path) -> str:
    return path.relative_to(ROOT / "kms").with_suffix("").parts[0]


def _in(*layers: str) -> list[Path]:
    return [path for path in SOURCES if _layer(path) in layers]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[str]:
    """The dotted name of everything `path` imports; `from a import b` gives `a.b`."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _calls(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_source = pytest.mark.parametrize("path", [p for p in SOURCES if _layer(p) != "__init__"], ids=_id)


@every_source
def test_a_file_imports_only_its_own_layer_and_those_below(path: Path) -> None:
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "kms":
            assert parts[1] in MAY_IMPORT[_layer(path)], f"{name} is not below {_layer(path)}"


@pytest.mark.parametrize("path", _in("core", "wire", "errors", "limits"), ids=_id)
def test_the_pure_layers_touch_no_socket_file_or_clock(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path)} & IMPURE
    assert not {"open", "os.open", "input"} & set(_calls(path))


@pytest.mark.parametrize("path", _in("core", "wire"), ids=_id)
def test_of_the_operating_system_the_pure_layers_use_its_randomness_alone(path: Path) -> None:
    assert not {name for name in _imports(path) if name.startswith("os.")}
    assert {call for call in _calls(path) if call.startswith("os.")} <= {"os.urandom"}


@pytest.mark.parametrize("path", _in("host", "storage", "client"), ids=_id)
def test_of_all_below_the_service_only_the_async_client_knows_trio(path: Path) -> None:
    if path.name != "on_trio.py":
        assert "trio" not in {name.split(".")[0] for name in _imports(path)}


_SOCKETS = re.compile(r"trio\.(socket|Socket|SSL|open_tcp|open_unix|serve_|lowlevel\.wait_)")


@pytest.mark.parametrize("path", _in("service"), ids=_id)
def test_what_serves_a_request_knows_no_socket(path: Path) -> None:
    assert not {"socket", "socketserver", "ssl", "select", "selectors"} & {name.split(".")[0] for name in _imports(path)}
    names = {ast.unparse(node) for node in ast.walk(_tree(path)) if isinstance(node, ast.Attribute)}
    assert not {name for name in names.union(_imports(path)) if _SOCKETS.match(name)}


@every_source
def test_only_the_command_lines_print_or_exit(path: Path) -> None:
    if _layer(path) != "cli":
        assert not {"print", "sys.exit", "exit", "quit", "os._exit", "input"} & set(_calls(path))
        assert "SystemExit" not in path.read_text(encoding="utf-8")


@every_source
def test_aes_runs_in_one_file_alone(path: Path) -> None:
    if _id(path) != "kms/core/envelope.py":
        assert not [name for name in _imports(path) if "hazmat.primitives.ciphers" in name]
        assert "AES" + "GCM(" not in path.read_text(encoding="utf-8")


@every_source
def test_a_nonce_is_given_by_no_caller(path: Path) -> None:
    if _id(path) != "kms/core/envelope.py":
        assert not [call for call in _calls(path) if call.endswith("seal_with_nonce")]


@every_source
def test_no_random_number_comes_from_elsewhere_than_the_system(path: Path) -> None:
    assert "random" not in {name.split(".")[0] for name in _imports(path)}


@every_source
def test_nothing_is_pickled_evaluated_or_run_through_a_shell(path: Path) -> None:
    assert not {"pickle", "marshal", "shelve"} & {name.split(".")[0] for name in _imports(path)}
    assert not {"eval", "exec", "os.system"} & set(_calls(path))


@every_source
def test_what_the_metrics_need_is_an_extra_that_nothing_else_imports(path: Path) -> None:
    if _id(path) not in ("kms/service/metrics.py", "kms/server/metrics_listener.py"):
        assert not {"prometheus_client", "h11"} & {name.split(".")[0] for name in _imports(path)}


def test_the_command_lines_read_the_configuration_without_waiting_for_trio_or_cryptography() -> None:
    program = "import sys, kms.server.config; print(*{'trio', 'cryptography', 'kms.core.envelope'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_every_layer_is_known_here() -> None:
    assert {_layer(path) for path in SOURCES} == {*MAY_IMPORT, "__init__"}
