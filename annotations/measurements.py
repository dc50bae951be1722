"""Measurements of GeoJSON objects, read on demand: they are most of a file's text, and clipping has no use for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from annotations.classname import unpacked
from annotations.errors import UserError
from annotations.geojson import NOTHING, SURE_KEYS, Properties
from annotations.geojson import _members as members_of
from annotations.table import ObjectTable

# What detectors call how sure they are: StarDist and InstanSeg in QuPath, TIAToolbox, CellViT, others.
CONFIDENCE = ("detection probability", "probability", "confidence", "score", "prob", "type_prob")
TOGETHER = 10_000
MAX_CONFIDENCE = 1e30  # beyond it, it is damage, and no float32


def stated_confidences(several: Sequence[Properties | None]) -> np.ndarray | None:
    """How sure a detector says it is of each of n objects, float32 (n,), NaN where it does not; None where it never does."""
    if not any(_may_say(several[start : start + TOGETHER]) for start in range(0, len(several), TOGETHER)):
        return None
    found = [None if properties is None else _stated_confidence(properties) for properties in several]
    return None if found.count(None) == len(found) else np.array(found, dtype=np.float32)  # None becomes NaN


def _may_say(several: Sequence[Properties | None]) -> bool:
    """Whether any of some objects has what may be a confidence: of millions nearly none has, so they are looked at together."""
    known = [p for p in several if p is not None]
    if [p for p in known if not (p.probability is p.confidence is p.score is p.prob is p.type_prob is NOTHING)]:
        return True
    text = b"".join([p.measurements for p in known])
    return b"rob" in text or b"onfidence" in text or b"core" in text


def _stated_confidence(p: Properties) -> float | None:
    """The first of CONFIDENCE among measurements and plain properties; None where none is."""
    stated = {name: raw for name in SURE_KEYS if (raw := getattr(p, name)) is not NOTHING}
    try:
        numbers = numbers_of({name: msgspec.json.decode(raw) for name, raw in stated.items()})
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return confidence_of(numbers)


def confidence_of(numbers: dict[str, float]) -> float | None:
    """The first of CONFIDENCE among measurements; None where none is."""
    found = {name.lower(): value for name, value in numbers.items() if abs(value) < MAX_CONFIDENCE}  # NaN is not
    return next((found[name] for name in CONFIDENCE if name in found), None)


def with_measurements(table: ObjectTable, rows: np.ndarray, data: bytes, features: int, source: str) -> ObjectTable:
    """The table with measurements.

    rows: (n,) the feature of each object, counted as annotations.geojson.decode_features expands the document; features:
    how many it found. Raises UserError where the two ways of counting differ.
    """
    found = _per_feature(_document(data))
    if len(found) != features:
        raise UserError(f"{source}: damaged, so that measurements cannot be told apart: read it without them")
    mine = [found[row] for row in rows.tolist()]
    names = dict.fromkeys(name for one in mine for name in one)
    columns = {name: np.array([one.get(name, np.nan) for one in mine], dtype=np.float64) for name in names}
    return replace(table, measurements=columns)


def nuclei_as_geometry(data: bytes) -> bytes:
    """A GeoJSON document in which every cell that has a nucleusGeometry has it for its geometry; what cannot be read stays."""
    try:
        document = _document(data)
    except (ValueError, RecursionError):
        return data
    for item in _features(document):
        properties = item.get("properties")
        inside = properties.get("nucleusGeometry") if isinstance(properties, dict) else None  # where geopandas puts it
        if isinstance(nucleus := unpacked(item.get("nucleusGeometry") or inside), dict):
            item["geometry"] = nucleus
    return json.dumps(document).encode()


def _document(data: bytes) -> Any:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return json.loads(data.decode(errors="replace"))


def _features(document: Any) -> list[dict[str, Any]]:
    """The features of a document and their children, in file order."""
    if isinstance(document, dict) and isinstance(document.get("features"), list):
        document = document["features"]
    found: list[dict[str, Any]] = []
    for item in document if isinstance(document, list) else [document]:
        found.append(item if isinstance(item, dict) else {})  # what is no feature counts as one without geometry
        properties = found[-1].get("properties")
        children = unpacked(properties.get("childObjects")) if isinstance(properties, dict) else None
        if isinstance(children, list):
            found += _features(children)
    return found


def _per_feature(document: Any) -> list[dict[str, float]]:
    """Measurements of each feature, those of a geometry collection once a member."""
    found = []
    for item in _features(document):
        members = members_of(item.get("geometry", item))
        found += [numbers_of(item.get("properties"))] * len(members)
    return found


def numbers_of(properties: Any) -> dict[str, float]:
    """Name -> number: QuPath's mapping or its older list of name and value, as JSON text too, and plain numbers of others."""
    if not isinstance(properties, dict):
        return {}
    stated = unpacked(properties.get("measurements"))
    pairs: list[tuple[Any, Any]] = [(name, value) for name, value in properties.items() if name.lower() in CONFIDENCE]
    if isinstance(stated, dict):
        pairs += stated.items()
    elif isinstance(stated, list):
        pairs += [(one.get("name"), one.get("value")) for one in stated if isinstance(one, dict)]
    found = {}
    for name, value in pairs:
        try:
            found[str(name)] = float(value)  # takes "NaN" and "Infinity"
        except (TypeError, ValueError):
            continue
    return found
