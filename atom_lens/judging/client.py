"""One judge behind an OpenAI-compatible server: what it answered is kept on disk, what it costs is capped."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai import APIError, OpenAI

from atom_lens._files import read_json, shown, write_json

DEFAULT_URL = "https://api.openai.com/v1"
_RETRIES = 6  # the library's own, with exponential backoff: connection errors, time-outs, 408, 409, 429, 5xx
_TIMEOUT = 120.0
_CHARACTERS = 4  # of English a token has, roughly


class BudgetSpentError(Exception):
    """The next question could cost more than is left."""


@dataclass
class Budget:
    """What the answers of a study cost, those from the cache included, and what they may cost.

    Attributes:
        dollars: at most.
        prices: dollars per million tokens read and written; the cap holds where they are not 0.
        read, written: tokens so far.
    """

    dollars: float
    prices: tuple[float, float]
    read: int = 0
    written: int = 0

    @property
    def spent(self) -> float:
        """Dollars so far."""
        return self.cost(self.read, self.written)

    def cost(self, read: int, written: int) -> float:
        """Dollars for that many tokens."""
        return (self.prices[0] * read + self.prices[1] * written) / 1e6


def estimated_tokens(text: str) -> int:
    """Tokens of a text, at 4 characters each."""
    return -(-len(text) // _CHARACTERS)


class Judge:
    """Asks one model, each question once.

    Args:
        model: as its server names it.
        base_url: of the server; None takes $OPENAI_BASE_URL, or else OpenAI.
        cache: folder of the answers, a file per question.
        budget: shared with other judges of the study.

    Raises:
        ValueError: no http(s) address, or no $OPENAI_API_KEY for a server on another machine.
    """

    def __init__(self, model: str, base_url: str | None, cache: Path, budget: Budget) -> None:
        url = base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"base_url is {shown(url)!r}, allowed is http:// or https:// and a host, e.g. {DEFAULT_URL}"
            )
        key = os.environ.get("OPENAI_API_KEY") or ("none" if _is_loopback(address.hostname) else None)
        if key is None:
            raise ValueError(
                f"OPENAI_API_KEY is not set, {address.hostname} needs one (any, if it does not look at it)"
            )
        self.model, self.cache, self.budget = model, cache, budget
        self.asked = 0
        self._host, self._key = address.hostname, key
        self._client = OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT)

    def ask(self, version: str, question: str, max_tokens: int) -> str:
        """The answer to `question`, from the cache where it was answered before.

        Args:
            version: of the prompt files the question was made with.
            question: the text of the one message.
            max_tokens: of the answer, at most.

        Raises:
            BudgetSpentError: the answer could cost more than the budget has left.
            ValueError: the server does not answer, after the retries, or not in the way of chat completions.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        name = hashlib.sha256(json.dumps([version, request], sort_keys=True).encode()).hexdigest()
        file = self.cache / f"{name}.json"
        # A cache that came with a folder is read with suspicion; one that is no longer whole is asked for again.
        kept = _kept(file)
        if kept is None:
            needed = self.budget.cost(estimated_tokens(question), max_tokens)
            if self.budget.spent + needed > self.budget.dollars:
                raise BudgetSpentError
            kept = self._answer(request, question)
            write_json(file, kept)
        self.budget.read += kept["read"]
        self.budget.written += kept["written"]
        return kept["answer"]

    def _answer(self, request: dict[str, Any], question: str) -> dict[str, Any]:
        self.asked += 1
        try:
            found = self._client.chat.completions.create(**request)
            answer, usage = str(found.choices[0].message.content or ""), found.usage
            read = int(usage.prompt_tokens) if usage else estimated_tokens(question)
            written = int(usage.completion_tokens) if usage else estimated_tokens(answer)
        except APIError as error:
            # Some servers repeat the key they were sent.
            said = shown(str(error).replace(self._key, "[key]"))
            raise ValueError(
                f"the judge {self.model!r} at {self._host} did not answer: {said}; the same command goes on from there"
            ) from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"the judge {self.model!r} at {self._host} does not speak chat completions ({type(error).__name__})"
            ) from None
        return {"answer": answer, "read": read, "written": written}


def _kept(file: Path) -> dict[str, Any] | None:
    try:
        found = read_json(file)
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(found.get("answer"), str) and all(type(found.get(key)) is int for key in ("read", "written"))
    return found if whole else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
