"""The settings of `annotate`, validated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from annotations.errors import UserError
from annotations.objects import KindOption

if TYPE_CHECKING:
    from annotations.class_map import ClassMap

POINT_SIZE = re.compile(r"^\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(um|µm|μm|px|)\s*$")

Origin = Literal["auto", "level0", "bounds"]


@dataclass(frozen=True)
class AnnotateSettings:
    """point_size: side of the square a point becomes, in point_unit ("um", or "px" of level 0); None skips points.

    polygons: store the clipped outlines too, as /boxes/polygon. classes: names of classes; None: those of the files.
    annotation_mpp: micrometres per unit of the annotations' coordinates; None: what their dialect says, level 0 for most.
    nuclei: take the nucleus of a QuPath cell for it. split_values: each connected piece of a value of a mask is an object.
    """

    origin: Origin = "auto"
    kind: KindOption = "auto"
    point_size: float | None = None
    point_unit: str = "um"
    polygons: bool = False
    classes: ClassMap | None = None
    annotation_mpp: float | None = None
    nuclei: bool = False
    split_values: bool = False

    def point_size_l0(self, mpp_level0: float) -> float | None:
        """The side in level-0 pixels."""
        if self.point_size is None or self.point_unit == "px":
            return self.point_size
        return self.point_size / mpp_level0


@dataclass(frozen=True)
class Reading:
    """Options of reading the files of a slide; only the settings change the result."""

    settings: AnnotateSettings
    stream: bool = False
    processes: int = 1


def checked_choices(origin: str, kind: str) -> tuple[Origin, KindOption]:
    """The two options, known to be among their choices."""
    if origin not in get_args(Origin):
        raise UserError(f"--origin {origin}: is one of {', '.join(get_args(Origin))}")
    if kind not in get_args(KindOption):
        raise UserError(f"--kind {kind}: is one of {', '.join(get_args(KindOption))}")
    return cast("Origin", origin), cast("KindOption", kind)


def named_classes(path: Path | str | None, strict: bool) -> ClassMap | None:
    from annotations.class_map import read_classmap

    if path is None and strict:
        raise UserError("--strict-classes: needs --classes, the YAML that names them")
    return None if path is None else read_classmap(Path(path), strict=strict)


def checked_mpp(mpp: float | None) -> float | None:
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise UserError(f"--annotation-mpp {mpp:g}: give micrometres a pixel above 0")
    return mpp


def parse_point_size(value: str | float | None) -> tuple[float | None, str]:
    """ "12um", "24px", a bare number (micrometres) or None -> (number or None, "um" or "px")."""
    if value is None:
        return None, "um"
    match = POINT_SIZE.match(str(value))
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not (math.isfinite(number) and number > 0):
        raise UserError(f"--point-size {value}: give a number above 0 with its unit, 12um or 24px (of level 0)")
    return number, "px" if match.group(2) == "px" else "um"
