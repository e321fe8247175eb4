"""The examples for web frameworks: many requests at once, over forks, threads and a restart, and none mixed up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kms_tests.integration.processes import DEADLINE, ROOT, Machine, Server, eventually

EXAMPLES = ROOT / "docs" / "examples" / "web"
WORKERS = 16
REQUESTS = 20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def environment(server: Server) -> dict[str, str]:
    machine = server.machine
    return machine.changed(
        {
            "MINIKMS_UNIX_SOCKET": str(server.socket),
            "MINIKMS_API_TOKEN_FILE": str(machine.data / "api.token"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CELERY_PLACE": str(machine.root),
        }
    )


@contextlib.contextmanager
def running(server: Server, *command: str) -> Iterator[Path]:
    """A program of a framework; its log."""
    log = server.machine.root / "framework.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment(server),
            cwd=server.machine.root,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield log
    finally:
        # Its children too, which some leave behind.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(url: str, text: str) -> str:
    with urllib.request.urlopen(url + urllib.parse.quote(text), timeout=DEADLINE) as response:
        return str(response.read().decode())


def is_up(url: str) -> bool:
    try:
        return answer(url, "up") == "up"
    except (urllib.error.URLError, OSError):
        return False


def ask_often(*urls: str) -> None:
    """As many requests at once as a small site has; each is answered with its own text."""

    def work(number: int) -> list[str]:
        url = urls[number % len(urls)]
        mine = [f"{number}-{step}-" + "x" * number for step in range(REQUESTS)]
        return [text for text in mine if answer(url, text) != text]

    with ThreadPoolExecutor(WORKERS) as pool:
        wrong = [text for texts in pool.map(work, range(WORKERS)) for text in texts]
    assert wrong == []


def check_over_a_restart(machine: Machine, server: Server, log: Path, *urls: str) -> None:
    for url in urls:
        eventually(f"{url} answers\n{log.read_text(errors='replace')}", lambda url=url: is_up(url))  # type: ignore[misc]
    ask_often(*urls)
    assert server.stop() == 0
    machine.start()
    ask_often(*urls)


def test_gunicorn_with_a_client_that_was_made_before_its_workers(machine: Machine, server: Server) -> None:
    pytest.importorskip("gunicorn", reason="the integration session installs it")
    port = free_port()
    bind = f"127.0.0.1:{port}"
    with running(server, "-m", "gunicorn", "--preload", "--workers", "4", "--bind", bind, "wsgi:app") as log:
        check_over_a_restart(machine, server, log, f"http://{bind}/?")


def test_fastapi_with_threads_and_with_its_event_loop(machine: Machine, server: Server) -> None:
    pytest.importorskip("fastapi", reason="the integration session installs it")
    port = free_port()
    with running(server, "-m", "uvicorn", "--port", str(port), "fastapi_app:app") as log:
        base = f"http://127.0.0.1:{port}"
        check_over_a_restart(machine, server, log, f"{base}/?text=", f"{base}/async?text=")


def test_django_with_its_own_server(machine: Machine, server: Server) -> None:
    pytest.importorskip("django", reason="the integration session installs it")
    port = free_port()
    with running(server, str(EXAMPLES / "django_app.py"), "runserver", f"127.0.0.1:{port}") as log:
        check_over_a_restart(machine, server, log, f"http://127.0.0.1:{port}/?text=")


SENDS = """
import sys
from celery_tasks import there_and_back
texts = [f"{number}-" + "x" * number for number in range(int(sys.argv[1]))]
results = [there_and_back.delay(text) for text in texts]
print([text for text, result in zip(texts, results) if result.get(timeout=float(sys.argv[2])) != text])
"""


def test_celery_with_a_client_that_was_made_before_its_workers(machine: Machine, server: Server) -> None:
    pytest.importorskip("celery", reason="the integration session installs it")
    for name in ("queue", "control", "results"):
        (machine.root / name).mkdir()

    def send() -> None:
        done = subprocess.run(
            [sys.executable, "-c", SENDS, "100", str(DEADLINE)],
            env=environment(server),
            cwd=machine.root,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

    with running(server, "-m", "celery", "--app", "celery_tasks", "worker", "--pool", "prefork", "--concurrency", "4"):
        send()
        assert server.stop() == 0
        machine.start()
        send()
