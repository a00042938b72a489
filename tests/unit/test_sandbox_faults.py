from __future__ import annotations

import pytest

from sandbox.faults import Clock, FaultError, Faults, InjectedFault, parse


def test_a_fault_that_is_bounded_ends_after_so_many_requests() -> None:
    faults = Faults()
    faults.put("msdicom", "store", InjectedFault(status=503), times=2)
    assert [faults.take("msdicom", "store").status for _ in range(3)] == [503, 503, None]


def test_a_bounded_fault_of_all_operations_counts_every_request_once() -> None:
    faults = Faults()
    faults.put("msdicom", "*", InjectedFault(hang=True), times=2)
    taken = [faults.take("msdicom", name).hang for name in ("store", "*", "query")]
    assert taken == [True, True, False]


def test_looking_at_a_fault_uses_nothing_up() -> None:
    faults = Faults()
    faults.put("msdicom", "store", InjectedFault(hang=True), times=1)
    assert faults.read_current("msdicom", "store").hang
    assert faults.take("msdicom", "store").hang


def test_an_operations_own_fields_are_laid_over_those_of_all_and_the_usual_ones() -> None:
    faults = Faults(usual=InjectedFault(latency_ms=(1, 2), refuse=True))
    faults.put("dcm4chee", "*", InjectedFault(latency_ms=50, status=500))
    faults.put("dcm4chee", "query", InjectedFault(status=429))
    assert faults.read_current("dcm4chee", "query") == InjectedFault(latency_ms=50, status=429, refuse=True)
    assert faults.read_current("dcm4chee", "store").status == 500
    faults.clear()
    assert faults.read_current("dcm4chee", "query") == InjectedFault(latency_ms=(1, 2), refuse=True)


def test_latency_stays_within_its_bounds() -> None:
    drawn = [InjectedFault(latency_ms=(10, 20)).latency_s() for _ in range(100)]
    assert 0.010 <= min(drawn) < max(drawn) <= 0.020
    assert InjectedFault(latency_ms=30).latency_s() == 0.030
    assert InjectedFault().latency_s() == 0


def test_every_field_of_a_fault_can_be_wished_for_and_is_shown_again() -> None:
    order = {
        "latency_ms": 5,
        "refuse": True,
        "hang": True,
        "drip_bytes_per_s": 1,
        "status": 503,
        "retry_after_s": 1.5,
        "reset_after_bytes": 0,
        "truncate": "cleanly",
        "commit_then_drop": True,
        "disk_full": "A700",
        "transient_272": True,
        "fail_image": "1.2.3",
        "failure_reason": 43264,
        "reset_answer": True,
        "pending_45071": "never",
        "crash_in_delete": True,
        "crash_in_reject": True,
        "lose_last_part": True,
        "charset": True,
        "unauthorized": True,
        "database_down": True,
        "storage_down": True,
        "bearer": True,
        "token_lifetime_s": 3,
    }
    assert set(order) == set(InjectedFault.__dataclass_fields__)
    fault, times = parse({**order, "times": 4})
    assert fault.as_json() == order
    assert times == 4


@pytest.mark.parametrize(
    "wish",
    [
        {"times": True},
        {"times": 1.5},
        {"drip_bytes_per_s": 0},
        {"truncate": "dirty"},
        {"status": 99},
        {"latency_ms": [1]},
        {"latency_ms": -1},
        {"hang": 1},
        {"pending_45071": "soon"},
        {"humour": "dry"},
    ],
)
def test_what_cannot_be_meant_is_refused(wish: dict[str, object]) -> None:
    with pytest.raises(FaultError):
        parse(wish)


def test_a_token_issued_after_the_fault_is_new() -> None:
    clock = Clock()
    faults = Faults(clock)
    faults.put("msdicom", "*", InjectedFault(unauthorized=True))
    assert faults.is_old_token("msdicom", "query", "Bearer a", clock.now_s() - 1)
    assert not faults.is_old_token("msdicom", "query", "Bearer a", clock.now_s() + 1)
    assert faults.is_old_token("msdicom", "query", None, None)


def test_the_clock_runs_ahead_by_what_it_was_moved() -> None:
    clock = Clock()
    before_s = clock.now_s()
    clock.ahead_s = 1000
    assert clock.now_s() - before_s >= 1000
