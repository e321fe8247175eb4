from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kms.core.policy import Principal
from kms.errors import AuthFailedError, InvalidRequestError, UnauthorizedError, WireError
from kms.host.peer import Credentials
from kms.limits import MAX_REFUSAL_KINDS, REFUSALS_OF_A_PRINCIPAL, REFUSALS_OF_A_PRINCIPAL_PER_SECOND
from kms.service.refusals import Kind, Refusals
from kms.service.served import Peer, Served
from kms.wire.messages import Decrypt, Encrypt, Request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(
    kind: type[Request] | None = Encrypt,
    *,
    uid: int | None = None,
    connection: int = 1,
    error: WireError | None = None,
    who: str | None = None,
) -> Served:
    credentials = None if uid is None else Credentials(7, uid, 7)
    peer = Peer(connection, "tcp" if uid is None else "unix", credentials, port=connection)
    principal = None if who is None else Principal(who)
    return Served(peer, 1, None, kind, principal, None, error or AuthFailedError("no"), 0.0, f"id-{connection}")


def test_the_first_of_a_kind_is_put_on_record_and_the_others_are_counted() -> None:
    refusals = Refusals(Clock())
    assert [refusals.is_first(refused(connection=number)) for number in range(4)] == [True, False, False, False]
    assert refusals.is_first(refused(Decrypt))
    assert refusals.is_first(refused(uid=1000))
    assert refusals.is_first(refused(uid=1001))
    assert refusals.is_first(refused(error=InvalidRequestError("no")))
    assert refusals.is_first(refused(None))
    assert refusals.take() == [(Kind(None, None, "tcp", "Encrypt", "AuthFailed"), 3)]


def test_while_it_goes_on_only_the_number_is_told_each_second_and_after_a_quiet_one_it_is_a_first_again() -> None:
    refusals = Refusals(Clock())
    refusals.is_first(refused())
    assert refusals.take() == []
    assert refusals.is_first(refused()), "nothing came for a second"
    assert not refusals.is_first(refused())
    assert [count for _, count in refusals.take()] == [1]
    assert not refusals.is_first(refused())
    assert [count for _, count in refusals.take()] == [1]
    assert refusals.take() == []
    assert refusals.is_first(refused())


def test_a_first_that_could_not_be_put_on_record_leaves_the_next_to_be_it() -> None:
    refusals = Refusals(Clock())
    assert refusals.is_first(refused())
    refusals.forget(refused())
    assert refusals.is_first(refused())
    assert not refusals.is_first(refused())
    refusals.forget(refused())
    assert not refusals.is_first(refused()), "what was counted is not lost"


def test_more_kinds_than_can_be_told_apart_are_counted_together() -> None:
    refusals = Refusals(Clock())
    firsts = sum(refusals.is_first(refused(uid=uid)) for uid in range(MAX_REFUSAL_KINDS + 50))
    assert firsts == MAX_REFUSAL_KINDS + 1
    ((kind, count),) = refusals.take()
    assert (kind, count) == (Kind(None, None, "-", "-", "-"), 49)


def test_a_principal_has_a_bucket_of_refusals_before_they_are_only_counted() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    one = refused(who="billing", error=UnauthorizedError("no"))
    assert sum(refusals.is_first(one) for _ in range(1000)) == REFUSALS_OF_A_PRINCIPAL + 1
    assert refusals.is_first(refused(who="another", error=UnauthorizedError("no"))), "it has one of its own"
    assert refusals.take() == [(Kind("billing", None, "-", "Encrypt", "Unauthorized"), 1000 - REFUSALS_OF_A_PRINCIPAL - 1)]
    clock.now += 2
    assert sum(refusals.is_first(one) for _ in range(1000)) == 2 * REFUSALS_OF_A_PRINCIPAL_PER_SECOND


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 20)), max_size=200))
def test_each_refusal_is_either_on_record_or_in_a_number(steps: list[tuple[int, bool, int]]) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    recorded = counted = asked = 0
    for who, is_principal, more in steps:
        for _ in range(more):
            asked += 1
            one = refused(who=f"p{who}") if is_principal else refused(uid=who)
            recorded += refusals.is_first(one)
        if more % 3 == 0:
            clock.now += 1
            counted += sum(count for _, count in refusals.take())
    counted += sum(count for _, count in refusals.take())
    assert recorded + counted == asked
