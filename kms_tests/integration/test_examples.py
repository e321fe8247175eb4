"""The programs of the page of examples run, against a real server, and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from kms_tests.integration.processes import DEADLINE, ROOT, Machine, Server

EXAMPLES = sorted(path for path in (ROOT / "docs" / "examples").iterdir() if path.suffix in (".py", ".sh"))


def promised(path: Path) -> str:
    """What the text at the beginning of the program says that it prints."""
    text = re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = re.search(r"^Prints:\n\n((?: {4}.+\n)+)", text, re.MULTILINE)
    assert found is not None, "it does not say what it prints"
    return dedent(found[1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_prints_what_it_says(path: Path, machine: Machine, server: Server) -> None:
    environment = {
        "MINIKMS_UNIX_SOCKET": str(server.socket),
        "MINIKMS_API_TOKEN_FILE": str(machine.data / "api.token"),
        "MINIKMS_ADMIN_TOKEN_FILE": str(machine.data / "admin.token"),
        "PATH": machine.path(),
    }
    done = subprocess.run(
        [sys.executable, path] if path.suffix == ".py" else ["bash", path],
        env=machine.changed(environment),
        cwd=machine.root,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == promised(path)
