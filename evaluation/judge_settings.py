"""Which judge is asked, and how."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from vpt.errors import PromptError


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge is asked, and how.

    The key comes from an environment variable and is never kept. A server on this machine's
    loopback needs none.

    Attributes:
        model: name at the endpoint; the released scores are from ``gpt-4o``.
        base_url: of the endpoint, up to and with ``/v1``.
        key_variable: name of the environment variable that holds the key.
        max_concurrency: calls under way at once.
        max_retries: of one call, after 429, 5xx, a time-out or a broken connection.
        timeout_s: from the beginning of a try to the end of its reply; then it counts as failed.
        temperature: 0 for greedy.
        max_tokens: of the reply.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    max_concurrency: int = 8
    max_retries: int = 5
    timeout_s: float = 60.0
    temperature: float = 0.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise PromptError("model is empty; name the judge model as its endpoint does")
        parts = urlsplit(self.base_url)
        if "@" in self.base_url or parts.query or parts.fragment:
            # Not shown: what does not belong there may be a secret, and the URL is recorded.
            raise PromptError(
                "base_url must have no user, password, query or fragment; the key comes from the "
                "environment variable that key_variable names"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PromptError(
                f"base_url must be like http://localhost:8000/v1, not {self.base_url!r}"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # Not shown: it may be the key itself.
            raise PromptError("key_variable must be the name of an environment variable")
        for name, least in (("max_concurrency", 1), ("max_retries", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise PromptError(f"{name} must be a whole number from {least}, not {value!r}")
        if not 0 < self.timeout_s < math.inf:
            raise PromptError(f"timeout_s must be above 0 and finite, not {self.timeout_s!r}")
        if not 0 <= self.temperature < math.inf:
            raise PromptError(f"temperature must be from 0 and finite, not {self.temperature!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether the endpoint is on this machine's loopback."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:  # a name
            return False
