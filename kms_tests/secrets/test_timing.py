"""How long a wrong token takes tells nothing about where it is wrong.

Two classes of tokens, wrong at the first and at the last byte, are shown in random order to the real pipeline, and
Welch's t-test says whether their times differ. As in dudect (Reparaz et al., 2017) the slowest tenth is cropped, which
is the operating system's doing, and |t| > 4.5 counts as a leak. That the test sees one is shown with a comparison that
stops at the first difference.
"""

from __future__ import annotations

import gc
import json
import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import pytest

from kms.core.policy import AllowAll, Plane, Principal
from kms.core.secret import Secret
from kms.errors import AuthFailedError
from kms.service.authentication import Authenticator
from kms.service.handlers import Handlers
from kms.service.pipeline import RequestPipeline
from kms.service.served import Peer

THRESHOLD: Final = 4.5
CROP: Final = 0.9
TOKEN: Final = secrets.token_urlsafe(32)
PEER: Final = Peer(1, "unix")
NO_HANDLERS: Final = Handlers(cast(Any, None), cast(Any, None), cast(Any, None), new_data_key=bytes)
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
