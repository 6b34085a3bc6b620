"""What a request asks of admission, read from its body and headers."""

from typing import Any

import pytest

from loradock_serve.asks import ANONYMOUS, ask_of, check_n, priority_of, seats_of, tenant_of, timeout_of
from loradock_serve.errors import BadRequestError


def test_ask_holds_what_the_request_says() -> None:
    ask = ask_of({"user": "me", "priority": -3, "n": 2, "prompt": "x"}, 400, "sha256:0", 7.5)
    assert (ask.tenant, ask.adapter, ask.prompt_tokens) == ("me", "sha256:0", 100)
    assert (ask.seats, ask.priority, ask.deadline_at) == (2, -3, 7.5)


@pytest.mark.parametrize("user", [None, 7, ["x"], ""])
def test_request_without_a_user_is_the_anonymous_tenants(user: Any) -> None:
    assert tenant_of({"user": user}) == ANONYMOUS


def test_long_user_is_hashed_and_still_one_tenant() -> None:
    long = "ü" * 10**6 + "\ud83d"
    assert tenant_of({"user": long}) == tenant_of({"user": long})
    assert len(tenant_of({"user": long})) == 32
    assert tenant_of({"user": long}) != tenant_of({"user": long + "x"})
    assert tenant_of({"user": "x" * 64}) == "x" * 64


@pytest.mark.parametrize(
    ("payload", "seats"),
    [
        ({"prompt": "x"}, 1),
        ({"prompt": ["x", "y", "z"]}, 3),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]], "n": 4}, 8),
        ({"input": ["x", "y"]}, 2),
        ({"messages": [], "n": 3}, 3),
        ({"n": "3"}, 3),
        ({"n": 3.0, "prompt": ["x", "y"]}, 6),
        ({"n": "three"}, 1),
        ({"n": 2.5}, 1),
        ({"n": float("inf")}, 1),
        ({"n": ["3"]}, 1),
        ({"n": -2, "prompt": []}, 1),
        ({"n": True}, 1),
    ],
)
def test_seats_are_n_times_the_prompts(payload: dict[str, Any], seats: int) -> None:
    assert seats_of(payload) == seats


@pytest.mark.parametrize("n", [129, "129", 129.0, "1e3", " 129 "])
def test_n_over_the_limit_is_refused_however_an_engine_may_be_told_it(n: Any) -> None:
    with pytest.raises(BadRequestError, match="over this server's limit of 128"):
        check_n({"n": n}, 128)
    check_n({"n": "128"}, 128)


@pytest.mark.parametrize("priority", ["1", 1.5, True, 2**31])
def test_priority_that_is_no_number_is_refused(priority: Any) -> None:
    with pytest.raises(BadRequestError, match="lower is earlier"):
        priority_of({"priority": priority})


def test_timeout_is_the_requests_own_up_to_the_servers() -> None:
    assert timeout_of("", 60) == (60, "request_timeout_s")
    assert timeout_of("2.5", 60) == (2.5, "x-request-timeout")
    assert timeout_of("600", 60) == (60, "request_timeout_s")
