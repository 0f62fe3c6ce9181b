"""Prompts made by rule, with known answers: arithmetic, facts in several steps, questions and opinions.

They are only as varied as their rules: results on them hold for this kind of text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

from pydantic import Field

from atom_lens.activations.prompts.cities import geonames
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source
from atom_lens.storage.schema import Seed


class Generated(Source):
    """Prompts made by rule: arithmetic, facts in two steps (multi_step), questions, opinions (sentiment)."""

    source: Literal["arithmetic", "multi_step", "questions", "sentiment"]
    limit: int = Field(2000, ge=1)
    seed: Seed = 0

    def read(self) -> list[Prompt]:
        return _RULES[self.source](self.limit, self.seed)


def arithmetic(limit: int, seed: int = 0) -> list[Prompt]:
    """Sums and differences in two steps, the first one worked out: ``17 + 25 = 42. 42 - 9 =``."""
    draw = random.Random(seed)

    def one() -> Prompt:
        a, b, c = draw.randrange(2, 500), draw.randrange(2, 500), draw.randrange(2, 500)
        first = a + b
        sign, result = ("-", first - c) if c < first and draw.random() < 0.5 else ("+", first + c)
        forms = (
            f"{a} + {b} = {first}. {first} {sign} {c} =",
            f"Start with {a}. Adding {b} gives {first}. "
            + (f"Taking away {c}" if sign == "-" else f"Adding {c}")
            + " gives",
            f"There are {a} apples and {b} pears, which makes {first} pieces of fruit. "
            + (f"{c} are eaten" if sign == "-" else f"{c} more are bought")
            + ". The number of pieces is now",
        )
        return Prompt(draw.choice(forms), answer=str(result))

    return _distinct(one, limit)


def multi_step(limit: int, seed: int = 0) -> list[Prompt]:
    """Facts about a city that follow from its country: its capital, continent, currency or a neighbour."""
    draw = random.Random(seed)
    cities, countries, continents = geonames()
    known = [
        (city, countries[code])
        for city, code in cities.items()
        if countries[code]["capital"] and countries[code]["currencyname"]
    ]
    draw.shuffle(known)

    def every() -> Iterator[Prompt]:
        for city, country in known:
            name, capital = country["name"], country["capital"]
            continent, currency = continents[country["continentcode"]], country["currencyname"]
            steps = (
                (f"The capital of {name} is {capital}. {city} is governed from", capital),
                (f"{name} is a country in {continent}. So {city} is in", continent),
                (f"{name} uses the {currency}. In {city} people pay with the", currency),
            )
            step, answer = draw.choice(steps)
            text = f"{city} is a city in {name}. {step}"
            yield Prompt(text, city, (0, len(city)), answer)

    return list(islice(every(), limit))


def questions(limit: int, seed: int = 0) -> list[Prompt]:
    """Questions with their answers, about cities and countries."""
    draw = random.Random(seed)
    cities, countries, continents = geonames()
    found = []
    for country in countries.values():
        name = country["name"]
        for what, answer in (
            ("What is the capital of", country["capital"]),
            ("What is the currency of", country["currencyname"]),
            ("On which continent is", continents[country["continentcode"]]),
        ):
            if answer:
                found.append(Prompt(f"Question: {what} {name}?\nAnswer: {answer}", answer=answer))
    for city, code in cities.items():
        answer = countries[code]["name"]
        found.append(Prompt(f"Question: In which country is {city}?\nAnswer: {answer}", city, answer=answer))
    draw.shuffle(found)
    return found[:limit]


def sentiment(limit: int, seed: int = 0) -> list[Prompt]:
    """Opinions in a sentence or two, half of them good; the answer says which."""
    draw = random.Random(seed)

    def one() -> Prompt:
        side = draw.choice(("positive", "negative"))
        verb, first, second = draw.choice(_VERBS[side]), *draw.sample(_WORDS[side], 2)
        thing, part = draw.choice(_THINGS)
        forms = (
            f"The {thing} was {first} and the {part} even more {second}.",
            f"I {verb} this {thing}: the {part} is {second}.",
            f"What {_article(first)} {thing}, with {_article(second)} {part}.",
            f"My friends {verb} the {part}, and I found the {thing} {first}.",
        )
        text = draw.choice(forms)
        return Prompt(text, answer=side)

    return _distinct(one, limit)


def _distinct(make: Callable[[], Prompt], limit: int) -> list[Prompt]:
    """`limit` different prompts, or fewer where the rule runs out of them."""
    found: dict[str, Prompt] = {}
    for _ in range(20 * limit):
        prompt: Any = make()
        found.setdefault(prompt.text, prompt)
        if len(found) == limit:
            break
    return list(found.values())


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


_WORDS = {
    "positive": (
        *("wonderful", "delightful", "brilliant", "charming", "superb", "excellent", "lovely", "moving", "fresh"),
        *("clever", "beautiful", "generous", "perfect", "warm", "gripping", "elegant", "witty", "satisfying"),
    ),
    "negative": (
        *("terrible", "dull", "awful", "clumsy", "boring", "poor", "ugly", "tedious", "stale"),
        *("stupid", "dreadful", "mean", "broken", "cold", "pointless", "crude", "lifeless", "disappointing"),
    ),
}
_VERBS = {
    "positive": ("loved", "enjoyed", "adored", "admired", "recommended", "praised"),
    "negative": ("hated", "regretted", "disliked", "endured", "resented", "complained about"),
}
_THINGS = (
    *(("film", "ending"), ("novel", "plot"), ("restaurant", "service"), ("hotel", "breakfast"), ("concert", "singer")),
    *(("play", "acting"), ("game", "story"), ("phone", "screen"), ("series", "cast"), ("museum", "exhibition")),
    *(("album", "sound"), ("course", "teacher"), ("meal", "dessert"), ("tour", "guide"), ("car", "engine")),
)
_RULES = {"arithmetic": arithmetic, "multi_step": multi_step, "questions": questions, "sentiment": sentiment}
