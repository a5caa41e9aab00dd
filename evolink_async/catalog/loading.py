"""Reading models.json, once and on first use; models are built one by one when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

from .model import Kind, Model, build_model
from .names import closest


class Catalogue(NamedTuple):
    """The data file, indexed."""

    rows: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, str]
    wrong_names: Mapping[str, str]
    media: frozenset[str]
    common: Mapping[str, Any]


@cache
def catalogue() -> Catalogue:
    """The whole data file; a few milliseconds on the first call, nothing afterwards."""
    data = json.loads(files(__package__).joinpath("models.json").read_bytes())
    rows = {row["id"]: row for row in data["models"]}
    return Catalogue(
        rows=MappingProxyType(rows),
        aliases=MappingProxyType({alias: row["id"] for row in rows.values() for alias in row.get("aliases", ())}),
        wrong_names=MappingProxyType({wrong["id"]: wrong["text"] for wrong in data["wrong_names"]}),
        media=frozenset(data["media"]),
        common=MappingProxyType(data["common"]),
    )


@lru_cache(maxsize=512)
def get_model(id: str) -> Model | None:
    """The model with this id or alias, None where the catalogue doesn't know it. Since 0.1.0.

    The aliases (Suno's ids without `-beta`) are documented for v4 to v5 and, by the same rule, our guess for
    later ones.
    """
    known = catalogue()
    resolved = known.aliases.get(id, id)
    return _built(resolved) if resolved in known.rows else None


def all_models() -> tuple[Model, ...]:
    """Every model of the catalogue, in the order of the data file (images, videos, audios). Since 0.1.0."""
    return tuple(_built(id) for id in catalogue().rows)


def kind_of(model_id: str) -> Kind | None:
    """What the model makes, None where the catalogue doesn't know it. Since 0.1.0."""
    model = get_model(model_id)
    return None if model is None else model.kind


@lru_cache(maxsize=512)
def nearest(id: str) -> tuple[str, ...]:
    """Up to three known ids that a mistyped or shortened id may stand for, best first. Since 0.1.0.

    Empty where nothing is near. The measure is our own: letters and digits compared, version numbers read as
    numbers.
    """
    known = catalogue()
    if id in known.rows or id in known.aliases:
        return (known.aliases.get(id, id),)
    guesses = (known.aliases.get(name, name) for name in closest(id, (*known.rows, *known.aliases)))
    return tuple(dict.fromkeys(guesses))


@cache
def _built(id: str) -> Model:
    known = catalogue()
    return build_model(known.rows[id], known.common)
