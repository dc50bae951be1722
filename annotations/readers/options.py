"""Options of reading an annotation file, the same for every format."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from annotations.errors import UserError
from annotations.objects import Kind, KindOption
from annotations.readers.slide_context import SlideContext


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading an annotation file.

    kind: "auto" takes detections, cells and what cell detectors write as cells, all else as tissue; "tissue" and "cell"
        decide for all objects.
    point_size_l0: side of the square, level-0 pixels, that a Point or MultiPoint position becomes; None skips points.
    scale: level-0 pixels per unit of the file's coordinates; None: what the format says, which is 1 for most.
    slide: the slide, for formats that do not count level-0 pixels or hold several slides.
    measurements: read those of GeoJSON too (GeoParquet's always are). nuclei: take the nucleus of a QuPath cell for it.
    split_values: each connected part of a value of a label image is an object, not the value.

    Raises ValueError for another kind, UserError for a size or scale that is not above 0.
    """

    kind: KindOption = "auto"
    point_size_l0: float | None = None
    scale: float | None = None
    slide: SlideContext = field(default_factory=SlideContext)
    measurements: bool = False
    nuclei: bool = False
    split_values: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "tissue", "cell"):
            raise ValueError(f"kind {self.kind!r}: one of auto, tissue, cell")
        for name, value in (("point size", self.point_size_l0), ("scale", self.scale)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise UserError(f"{name} {value}: give a number of level-0 pixels above 0")

    def kind_of(self, default: Kind) -> Kind:
        """Return the kind that the option decides for all objects; for "auto" the default, what the reader takes one for."""
        return default if self.kind == "auto" else Kind[self.kind.upper()]
