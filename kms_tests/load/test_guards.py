"""Each check of the load tests can fail: a server without the bound, or with a fault, is found out."""

from __future__ import annotations

from random import Random

import pytest

from kms.limits import MAX_FRAME_BYTES_CEILING, WRITE_TIMEOUT
from kms_tests.integration.processes import Machine, Server
from kms_tests.load import attacks
from kms_tests.load.mutants import STALL
from kms_tests.load.watch import unharmed


def broken(machine: Machine, fault: str) -> Server:
    return machine.start(change=f"from kms_tests.load import mutants; mutants.{fault}()")


def test_a_server_that_lets_everybody_in_is_found_out(machine: Machine) -> None:
    server = machine.start("--max-connections", "1000")
    with pytest.raises(AssertionError, match="at most 255 are kept"):
        attacks.flood(server, attempts=600)


def test_a_server_that_waits_for_frames_for_ever_is_found_out(machine: Machine) -> None:
    server = machine.start("--idle-timeout-ms", "3600000")
    with pytest.raises(AssertionError, match="one byte a second are cut off"):
        attacks.slow_loris(server, idle=1, clients=1)
    with pytest.raises(AssertionError, match="silent clients are cut off"):
        attacks.half_open(server, idle=1, clients=1)
    with pytest.raises(AssertionError, match="no whole frame is cut off"):
        attacks.hoard(server, idle=1, clients=1)


def test_a_server_that_cuts_off_too_early_is_found_out(machine: Machine) -> None:
    server = machine.start("--idle-timeout-ms", "1000")
    with pytest.raises(AssertionError, match="too early"):
        attacks.slow_loris(server, idle=10, clients=1)


def test_a_server_that_takes_lines_of_any_length_is_found_out(machine: Machine) -> None:
    server = machine.start("--max-frame-bytes", str(MAX_FRAME_BYTES_CEILING))
    with pytest.raises(AssertionError, match="left it open"):
        attacks.oversized(server, clients=1)


def test_a_server_that_waits_for_its_readers_for_ever_is_found_out(machine: Machine) -> None:
    with pytest.raises(AssertionError, match="read nothing are cut off"):
        attacks.deaf(broken(machine, "waits_for_readers"), WRITE_TIMEOUT, clients=1)


def test_a_server_that_answers_a_pipeline_wrongly_is_found_out(machine: Machine) -> None:
    with pytest.raises(AssertionError, match="in its place"):
        attacks.pipelined(broken(machine, "errs"), count=1000)


def test_a_server_that_fails_on_random_bytes_is_found_out(machine: Machine) -> None:
    server = broken(machine, "fails")
    with pytest.raises(AssertionError, match="log has: a connection failed"), unharmed(server):
        attacks.noise(server, Random(1))


def test_a_client_that_holds_up_all_others_is_found_out(machine: Machine) -> None:
    server = broken(machine, "stalls")
    with pytest.raises(AssertionError, match=r"p99 was [1-9]"), unharmed(server):
        _stall(server)


def _stall(server: Server) -> None:
    with attacks.connect(server) as sock:
        sock.sendall(b"{" + STALL + b"\n")
        sock.recv(1000)


def test_an_honest_client_that_gets_an_error_is_found_out(machine: Machine) -> None:
    with pytest.raises(AssertionError, match=r"was harmed.*was answered"), unharmed(broken(machine, "errs")):
        pass


def test_memory_that_does_not_come_back_is_found_out(machine: Machine) -> None:
    server = broken(machine, "keeps_memory")
    with pytest.raises(AssertionError, match="MiB of memory again"), unharmed(server, settle=3):
        attacks.oversized(server)


def test_descriptors_that_do_not_come_back_are_found_out(machine: Machine) -> None:
    server = broken(machine, "keeps_descriptors")
    with pytest.raises(AssertionError, match="descriptors again"), unharmed(server, settle=3):
        attacks.come_and_go(server)
