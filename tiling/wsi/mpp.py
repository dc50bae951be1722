"""Micrometres per pixel at level 0: read from the slide, assumed if the user says so, else an error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from annotations.errors import UserError

PLAUSIBLE_MPP = (0.05, 10.0)
PRINT_MPP = 40.0  # a resolution tag coarser than this (635 dpi) describes a screen or a printer, not a scanner
SQUARE = 1.02  # sides of a pixel that differ by more have no one mpp: scanners' own differ by a thousandth
KEYS = "openslide.mpp-x, aperio.MPP, DICOM PixelSpacing, OME PhysicalSizeX, TIFF XResolution with ResolutionUnit"
WAYS_OUT = "give it in the manifest column mpp, pass --assume-mpp, or set the TIFF resolution tags with their unit"
UM_PER_UNIT = {"inch": 25400.0, "centimeter": 10000.0, "millimeter": 1000.0, "micrometer": 1.0}
OME_UNITS = {"µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "": 1.0}

Value = tuple[float | None, float]  # mpp where there is one, and the longer side of a pixel over the shorter one


@dataclass(frozen=True)
class Mpp:
    """value: micrometres per level-0 pixel, None where there is none. source: the key it came from. note: a doubt."""

    value: float | None
    source: str = ""
    note: str = ""


def mpp_of(properties: Mapping[str, Any], *, tags_only: bool = False) -> Mpp:
    """Find mpp among a slide's properties (OpenSlide's names, or tiffslide's).

    Pixels that are not square have none: tiles are square in level-0 pixels, and with the mean of the sides for an mpp all
    tissue would be stretched in them. tags_only: the reader derives its mpp from TIFF resolution tags (generic TIFF, plain
    images), where any image editor writes 72 or 300 dpi; such values are turned down with a note.
    """
    texts = {key: str(value) for key, value in properties.items() if value is not None}
    rejected = ""
    for source, (value, stretch), is_tag in _candidates(texts, tags_only):
        if value is None:
            continue
        if is_tag and value > PRINT_MPP:
            rejected = f"{source} says {value:.4g} um ({25400 / value:.0f} dpi), a screen or print resolution"
            continue
        if stretch > SQUARE:
            return Mpp(None, "", f"{source} and its Y: pixels are not square, one side is {stretch:.4g} times the other")
        low, high = PLAUSIBLE_MPP
        note = "" if low <= value <= high else f"mpp {value:.4g} from {source} is outside {low}..{high}: is it right?"
        return Mpp(value, source, note)
    return Mpp(None, "", rejected)


def settle_mpp(path: object, stated: Mpp, *, manifest_mpp: float | None = None, assume_mpp: float | None = None) -> Mpp:
    """Choose the mpp to work with: the manifest's, else the file's own, else the assumed one. Raises UserError without any."""
    if manifest_mpp is not None:
        return Mpp(manifest_mpp, "manifest")
    if stated.value is not None:
        return stated
    if assume_mpp is not None:
        return Mpp(assume_mpp, "--assume-mpp")
    raise UserError(f"{path}: {missing_mpp(stated)}")


def missing_mpp(stated: Mpp) -> str:
    """Say that an mpp is missing: the reason and the three ways out, in one line."""
    reason = f" ({stated.note})" if stated.note else ""
    return f"no mpp: looked at {KEYS}{reason}: {WAYS_OUT}"


def check_mpp(value: float | None, where: str) -> float | None:
    """Return a value a user gave, which is finite and above 0. Raises UserError naming `where`."""
    if value is None or (math.isfinite(value) and value > 0):
        return value
    raise UserError(f"{where}: {value}: mpp is micrometres per pixel, a number above 0, for instance 0.5")


def _candidates(texts: Mapping[str, str], tags_only: bool) -> list[tuple[str, Value, bool]]:
    """List (key, its value, whether it is a bare resolution tag), best first."""
    candidates: list[tuple[str, Value, bool]] = [("OME PhysicalSizeX", _ome(texts), False)]
    for x, y in (("openslide.mpp-x", "openslide.mpp-y"), ("tiffslide.mpp-x", "tiffslide.mpp-y")):
        sides = _number(texts.get(x)), _number(texts.get(y))
        candidates.append((x, (_mean(*sides), _stretch(*sides)), tags_only))
    candidates.append(("aperio.MPP", (_number(texts.get("aperio.MPP")), 1.0), False))
    candidates.append(("DICOM PixelSpacing", _pixel_spacing(texts), False))
    candidates.append(("TIFF XResolution", _resolution_tags(texts), True))
    return candidates


def _number(text: str | None) -> float | None:
    """A finite number above 0, also with a decimal comma; else None."""
    try:
        value = float((text or "").strip().replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _mean(x: float | None, y: float | None) -> float | None:
    return (x + y) / 2 if x is not None and y is not None else x if x is not None else y


def _stretch(x: float | None, y: float | None) -> float:
    return 1.0 if x is None or y is None else max(x, y) / min(x, y)


def _ome(texts: Mapping[str, str]) -> Value:
    for key in ("tiff.ImageDescription", "openslide.comment", "tiffslide.comment"):
        x, y = (_physical_size(texts.get(key, ""), axis) for axis in "XY")
        if x is not None:
            return x, _stretch(x, y)
    return None, 1.0


def pixels_of(text: str, size: tuple[int, int]) -> str:
    """Return the element Pixels of the image of this width and height in an OME description; empty where there is none."""
    of_size = [rf'Size{axis}\s*=\s*"{side}"' for axis, side in zip("XY", size, strict=True)]
    elements = re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", text)
    return next((element for element in elements if all(re.search(side, element) for side in of_size)), "")


def _physical_size(text: str, axis: str) -> float | None:
    size = re.search(rf'PhysicalSize{axis}\s*=\s*"([^"]+)"', text)
    unit = re.search(rf'PhysicalSize{axis}Unit\s*=\s*"([^"]*)"', text)
    value = _number(size.group(1)) if size else None
    factor = OME_UNITS.get(unit.group(1).replace("&#181;", "µ") if unit else "")
    return None if value is None or factor is None else value * factor


def _pixel_spacing(texts: Mapping[str, str]) -> Value:
    spacing = [_number(value) for key, value in sorted(texts.items()) if "PixelSpacing" in key]
    x, y = (*spacing[:2], None, None)[:2]
    millimetres = _mean(x, y)
    return None if millimetres is None else millimetres * 1000, _stretch(x, y)


def _resolution_tags(texts: Mapping[str, str]) -> Value:
    factor = UM_PER_UNIT.get(texts.get("tiff.ResolutionUnit", "").lower())
    x, y = _number(texts.get("tiff.XResolution")), _number(texts.get("tiff.YResolution"))
    per_unit = _mean(x, y)
    return None if factor is None or per_unit is None else factor / per_unit, _stretch(x, y)
