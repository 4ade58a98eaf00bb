"""Errors in the form OpenAI's clients expect."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer with an HTTP status other than 200.

    Attributes:
        status: HTTP status.
        message: one sentence for the user.
        kind: OpenAI's error type.
        param: the field at fault.
        code: OpenAI's error code.
        headers: further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }
