"""Errors in the shape of OpenAI's API, which its clients turn into exceptions."""

from typing import Any

MAX_CHARACTERS = 1000  # of a message, which may quote what was given


class APIError(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        message: One sentence for a person.
        param: The field of the request that is to blame.
        code: A word for programs, such as ``model_not_found``.
        retry_after: Seconds after which to try again; None: trying again will not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {
            "error": {
                "message": self.message[:MAX_CHARACTERS],
                "type": error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer; clients are told not to repeat what cannot succeed."""
        if self.status == 401:
            return {"www-authenticate": "Bearer", "x-should-retry": "false"}
        if self.retry_after is not None:
            return {"retry-after": str(self.retry_after)}
        return {"x-should-retry": "false"}


def error_type(status: int) -> str:
    """OpenAI's word for the kind of error with this HTTP status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
