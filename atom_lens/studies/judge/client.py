"""A judge behind an OpenAI-compatible server: its answers are kept on disk, its costs are capped."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from httpx import InvalidURL
from openai import APIError, OpenAI

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import read_json, shown, without_secrets, write_json

DEFAULT_URL = "https://api.openai.com/v1"
_PORTS = {"http": 80, "https": 443}
_RETRIES = 6  # the library's own, with exponential backoff: connection errors, time-outs, 408, 409, 429, 5xx
_TIMEOUT = 120.0
_COUNTS = range(1 << 53)  # plausible numbers of tokens
_LONGEST = 1 << 16  # characters kept of an answer
_BYTES = 3  # bytes of UTF-8 per token, a cautious guess: English has more, other scripts about as many


class BudgetSpentError(Exception):
    """The next question could cost more than the budget has left."""


@dataclass
class Budget:
    """What the answers of a folder cost, including those of earlier calls, and what they may cost.

    Attributes:
        dollars: the cap; None for none.
        prices: dollars per million tokens read and written.
        read, written: tokens so far.
    """

    dollars: float | None
    prices: tuple[float, float]
    read: int = 0
    written: int = 0

    @property
    def spent(self) -> float:
        """Dollars so far."""
        return self.cost(self.read, self.written)

    def add(self, answer: Mapping[str, Any]) -> None:
        """Count the tokens of an answer."""
        self.read += answer["read"]
        self.written += answer["written"]

    def add_kept(self, cache: Path) -> None:
        """Count all answers in a folder, whatever the questions were: they were paid for."""
        for answer in filter(None, map(_kept, cache.glob("*.json"))):
            self.add(answer)

    def cost(self, read: int, written: int) -> float:
        """Dollars for that many tokens."""
        return (self.prices[0] * read + self.prices[1] * written) / 1e6


def estimated_tokens(text: str) -> int:
    """An estimate of the tokens of a text; only the server knows the number."""
    return -(-len(text.encode()) // _BYTES)


class Judge:
    """Asks one model, each question once.

    Args:
        model: its name on the server.
        base_url: of the server; None takes $OPENAI_BASE_URL, or else OpenAI.
        cache: folder of the answers, a file per question.
        budget: shared with other judges of the study.

    Raises:
        AtomLensError: not an http(s) address, a proxy that cannot be used, or no $OPENAI_API_KEY for a server on
            another machine.
    """

    def __init__(self, model: str, base_url: str | None, cache: Path, budget: Budget) -> None:
        url = base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
        host, self._server = _host_and_server(url)
        key = os.environ.get("OPENAI_API_KEY", "").strip() or ("none" if _is_loopback(host) else None)
        if key is None:
            raise AtomLensError(f"OPENAI_API_KEY is not set, {host} needs one (any value, if it does not check it)")
        if not (key.isascii() and key.isprintable()):
            raise AtomLensError(
                "OPENAI_API_KEY has line breaks or characters beyond ASCII, allowed is what an HTTP header can hold"
            )
        self.model, self.cache, self.budget = model, cache, budget
        self.asked = 0
        self._host, self._key, self._password = host, key, urlsplit(url).password
        try:
            self._client = OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT)
        except (ImportError, InvalidURL, ValueError) as error:
            said = shown(without_secrets(str(error), key, self._password))
            raise AtomLensError(
                f"{host} cannot be reached by this base_url or the proxy in the environment: {said}"
            ) from None

    def ask(self, version: str, question: str, max_tokens: int) -> str:
        """The answer to `question`, from the cache if it was answered before.

        Args:
            version: of the prompt files that the question was made from.
            question: the text of the only message.
            max_tokens: the longest answer allowed.

        Raises:
            BudgetSpentError: the answer could cost more than the budget has left.
            AtomLensError: the server does not answer after the retries, or its answer is not a chat completion.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        key = json.dumps([version, self._server, request], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        file = self.cache / f"{name}.json"
        # The cache may have come with somebody else's folder, so it is checked; damaged answers are asked for again.
        kept = _kept(file)
        if kept is None:
            needed = self.budget.cost(estimated_tokens(question), max_tokens)
            if self.budget.dollars is not None and self.budget.spent + needed > self.budget.dollars:
                raise BudgetSpentError
            kept = self._answer(request, question)
            write_json(file, kept)
            self.budget.add(kept)
        return kept["answer"]

    def _answer(self, request: dict[str, Any], question: str) -> dict[str, Any]:
        self.asked += 1
        try:
            found = self._client.chat.completions.create(**request)
            answer, usage = str(found.choices[0].message.content or "")[:_LONGEST], found.usage
            answer = answer.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
            read = int(usage.prompt_tokens) if usage else estimated_tokens(question)
            written = int(usage.completion_tokens) if usage else estimated_tokens(answer)
            if read not in _COUNTS or written not in _COUNTS:
                raise AtomLensError("no numbers of tokens")
        except APIError as error:
            # Some servers repeat the key they were sent.
            said = shown(without_secrets(str(error).replace(self._key, "[key]"), self._password))
            raise AtomLensError(
                f"the judge {self.model!r} at {self._host} did not answer: {said}; the same command resumes from there"
            ) from None
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise AtomLensError(
                f"the judge {self.model!r} at {self._host} does not speak chat completions ({type(error).__name__})"
            ) from None
        return {"answer": answer, "read": read, "written": written}


def _kept(file: Path) -> dict[str, Any] | None:
    try:
        found = read_json(file)
    except (FileNotFoundError, ValueError):
        return None
    tokens = [found.get("read"), found.get("written")]
    whole = isinstance(found.get("answer"), str) and all(type(count) is int and count in _COUNTS for count in tokens)
    return found if whole else None


def _host_and_server(url: str) -> tuple[str, str]:
    """The host of an address, and the address in a canonical form, without user name and password."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
        if parts.hostname:
            return parts.hostname, f"{parts.scheme}://{parts.hostname}:{port}{parts.path.rstrip('/')}"
    except (KeyError, ValueError):
        pass
    raise AtomLensError(
        f"base_url is {shown(url.rpartition('@')[2])!r}, allowed is http:// or https://, a host and perhaps a port, "
        f"e.g. {DEFAULT_URL}"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
