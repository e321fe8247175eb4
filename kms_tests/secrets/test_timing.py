"""How long a refusal takes tells nothing: where a token is wrong, or what state the version of a ciphertext is in.

Two classes of tokens, wrong at the first and at the last byte, are shown in random order to the real pipeline, and
Welch's t-test says whether their times differ. As in dudect (Reparaz et al., 2017) the slowest tenth is cropped, which
is the operating system's doing, and |t| > 4.5 counts as a leak. That the test sees one is shown with a comparison that
stops at the first difference.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from kms.core import ciphertext
from kms.core.keyring import EMPTY, CreateGroup, DestroyVersion, DisableVersion, RotateGroup, apply
from kms.core.policy import AllowAll, Plane, Principal
from kms.core.secret import Secret
from kms.errors import AuthFailedError, DecryptionFailedError
from kms.service.authentication import Authenticator
from kms.service.handlers import Handlers
from kms.service.local_provider import LocalMasterKeyProvider
from kms.service.pipeline import RequestPipeline
from kms.service.served import Peer
from kms_tests.in_memory import mint
from kms_tests.keks import forged

THRESHOLD: Final = 4.5
CROP: Final = 0.9
TOKEN: Final = secrets.token_urlsafe(32)
PEER: Final = Peer(1, "unix")
NO_HANDLERS: Final = Handlers(cast(Any, None), cast(Any, None), cast(Any, None), random=bytes)
"""Nobody gets so far as to need one."""

Probe = Callable[[Any], object]


class StopsAtTheFirstDifference(Authenticator):
    def authenticate(self, plane: Plane, token: str, peer: Peer) -> Principal:
        for shown, right in zip(token, TOKEN, strict=True):
            if shown != right:
                raise AuthFailedError("invalid API token")
        raise AssertionError("no token here is right")


@pytest.fixture(scope="module")
def tries(long: bool) -> int:
    """Wrong tokens to measure."""
    return 2_000_000 if long else 100_000


def authenticator(kind: type[Authenticator] = Authenticator) -> Authenticator:
    return kind(Secret(bytearray(TOKEN.encode())), Secret(bytearray(b"the other")))


def directly(kind: type[Authenticator] = Authenticator) -> Probe:
    authenticate = authenticator(kind).authenticate

    def probe(token: str) -> None:
        try:
            authenticate(Plane.DATA, token, PEER)
        except AuthFailedError:
            return

    return probe


def through_the_pipeline(kind: type[Authenticator] = Authenticator) -> Probe:
    return RequestPipeline(NO_HANDLERS, authenticator(kind), AllowAll()).session(PEER).serve


def in_a_request(token: str) -> bytes:
    return json.dumps({"type": "Health", "token": token}).encode()


def wrong(position: int) -> str:
    """The right token but for one character, as a string of its own."""
    other = "#" if TOKEN[position] != "#" else "%"
    characters = list(TOKEN)
    characters[position] = other
    return "".join(characters)


def t_statistic(probe: Probe, tries: int, dress: Callable[[str], Any] = str) -> float:
    """Welch's t of the times that `probe` takes for tokens wrong at the first byte, and at the last."""
    classes = [index % 2 for index in range(tries)]
    random.shuffle(classes)
    # Each a new object, so that no class has the better place in memory.
    shown = [dress(wrong(-kind)) for kind in classes]
    for one in shown[:1000]:
        probe(one)
    times: list[int] = []
    clock = time.perf_counter_ns
    gc.collect()
    gc.disable()
    try:
        for one in shown:
            start = clock()
            probe(one)
            times.append(clock() - start)
    finally:
        gc.enable()
    limit = sorted(times)[int(len(times) * CROP)]
    samples: tuple[list[int], list[int]] = ([], [])
    for kind, spent in zip(classes, times, strict=True):
        if spent <= limit:
            samples[kind].append(spent)
    return welch(*samples)


def welch(left: Sequence[float], right: Sequence[float]) -> float:
    spread = statistics.variance(left) / len(left) + statistics.variance(right) / len(right)
    return (statistics.fmean(left) - statistics.fmean(right)) / math.sqrt(spread)


@pytest.fixture(scope="module")
def refusals(long: bool) -> int:
    """Ciphertexts of 700 KB that are refused, to measure."""
    return 20_000 if long else 1_000


def refusal_statistic(provider: LocalMasterKeyProvider, versions: tuple[int, int], refusals: int) -> float:
    """Welch's t of the times it takes to refuse a forged ciphertext of the one version, and of the other.

    Each has a nonce that nobody has seen. The times are compared in pairs of neighbours, in random order: a machine that
    is busy for a while is so for both.
    """
    differences: list[float] = []
    clock = time.perf_counter_ns
    gc.collect()
    gc.disable()
    try:
        for _ in range(refusals // 2):
            pair = list(versions)
            random.shuffle(pair)
            times = {}
            for version in pair:
                blob = forged("default", version, size=700_000)
                head = len(blob) - (24 + 700_000 + 16 + 32)
                blob = blob[:head] + secrets.token_bytes(24) + blob[head + 24 :]
                sealed = ciphertext.parse(blob)
                start = clock()
                with contextlib.suppress(DecryptionFailedError):
                    provider.open(sealed, b"")
                times[version] = clock() - start
            differences.append(times[versions[0]] - times[versions[1]])
    finally:
        gc.enable()
    limit = sorted(map(abs, differences))[int(len(differences) * CROP)]
    kept = [difference for difference in differences if abs(difference) <= limit]
    return statistics.fmean(kept) / math.sqrt(statistics.variance(kept) / len(kept))


def test_a_ciphertext_is_refused_as_fast_whatever_the_state_of_its_version(
    refusals: int, record_property: Callable[[str, object], None]
) -> None:
    holder, provider = disabled_and_destroyed()
    for version, state in ((1, "destroyed"), (2, "disabled"), (9, "unknown")):
        t = refusal_statistic(provider, (version, holder.current.groups["default"].active.version), refusals)
        record_property(state, t)
        print(f"|t| = {abs(t):.2f} over {refusals} ciphertexts, {state} against usable")
        assert abs(t) < THRESHOLD


def test_a_refusal_that_looks_at_no_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    _, provider = disabled_and_destroyed()
    monkeypatch.setattr(provider, "_nobodys", SimpleNamespace(open=lambda *_: None))
    assert refusal_statistic(provider, (1, 3), 100) < -THRESHOLD


def disabled_and_destroyed() -> tuple[Any, LocalMasterKeyProvider]:
    holder = SimpleNamespace(current=EMPTY)
    for change in (
        CreateGroup("default"),
        RotateGroup("default"),
        RotateGroup("default"),
        DestroyVersion("default", 1),
        DisableVersion("default", 2),
    ):
        holder.current = apply(holder.current, change, now=0, mint=mint)
    return holder, LocalMasterKeyProvider(holder)


def test_welch_is_computed_as_in_the_textbook() -> None:
    left, right = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5]
    mean_difference, squared_error = -2.3666667, 15.724 / 6 + 4.4826667 / 6
    assert welch(left, right) == pytest.approx(mean_difference / math.sqrt(squared_error))


def test_the_comparison_takes_as_long_wherever_a_token_is_wrong(
    tries: int, record_property: Callable[[str, object], None]
) -> None:
    t = t_statistic(directly(), tries)
    record_property("t", t)
    print(f"|t| = {abs(t):.2f} over {tries} wrong tokens, the comparison alone")
    assert abs(t) < THRESHOLD


def test_a_request_takes_as_long_wherever_its_token_is_wrong(
    tries: int, record_property: Callable[[str, object], None]
) -> None:
    t = t_statistic(through_the_pipeline(), tries, in_a_request)
    record_property("t", t)
    print(f"|t| = {abs(t):.2f} over {tries} wrong tokens, whole requests")
    assert abs(t) < THRESHOLD


def test_a_comparison_that_stops_at_the_first_difference_is_caught() -> None:
    assert t_statistic(directly(StopsAtTheFirstDifference), 10_000) < -THRESHOLD
    assert t_statistic(through_the_pipeline(StopsAtTheFirstDifference), 10_000, in_a_request) < -THRESHOLD
