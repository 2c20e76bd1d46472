"""Errors as OpenAI's clients expect them."""

import pytest

from openmythos.serve.error import APIError, error_type


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_kinds(status: int, kind: str) -> None:
    assert error_type(status) == kind
    body = APIError(status, "why", param="p", code="c").body
    assert body == {"error": {"message": "why", "type": kind, "param": "p", "code": "c"}}


def test_clients_are_told_whether_to_try_again() -> None:
    assert APIError(400, "no").headers == {"x-should-retry": "false"}
    assert APIError(429, "later", retry_after=3).headers == {"retry-after": "3"}
    assert APIError(401, "who").headers["www-authenticate"] == "Bearer"
