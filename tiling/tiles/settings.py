"""The settings of `tile`, the same for every slide of a cohort."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from annotations.errors import UserError
from tiling.grid import plan_grid
from tiling.wsi.backends.registry import READERS
from tiling.wsi.mpp import check_mpp
from tiling.wsi.slide import RESAMPLE

PIXELS = ("none", "jpeg", "copy")


@dataclass(frozen=True)
class TileSettings:
    """Settings of `tile`, the same for every slide of a cohort.

    mpp: micrometres per target pixel. size: side of a tile, overlap: of neighbours, both in target pixels. min_tissue: least
    share of tissue in a tile. tissue: "auto", "none", or a folder of outlines named by slide. pixels: store encoded tiles
    ("jpeg"), the slide's own encoded tiles where they are the tiles wanted ("copy"), or coordinates alone ("none").
    assume_mpp: level-0 mpp for slides that have none. quality: of the JPEGs. reader, resample: see `Slide.open`. exclude: a
    folder of outlines or masks, named by slide, of what is not wanted. pen: "drop" or "keep" what has the colours of pen ink.
    tissue_out: a folder for the outlines of the tissue.
    """

    mpp: float
    size: int = 224
    overlap: int = 0
    min_tissue: float = 0.1
    tissue: str = "auto"
    pixels: str = "jpeg"
    assume_mpp: float | None = None
    quality: int = 90
    reader: str = "auto"
    resample: str = "fast"
    exclude: str = ""
    pen: str = "drop"
    tissue_out: str = ""

    @property
    def stores_pixels(self) -> bool:
        """Tell whether the slide files hold the tiles' pixels, or only their places."""
        return self.pixels != "none"

    def check(self) -> TileSettings:
        """Raises UserError for a value that cannot be."""
        check_mpp(self.mpp, "--mpp")
        check_mpp(self.assume_mpp, "--assume-mpp")
        if not 0 <= self.min_tissue <= 1:
            raise UserError(f"--min-tissue {self.min_tissue}: is a share between 0 and 1")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: JPEG quality lies between 1 and 100")
        if self.pixels not in PIXELS:
            raise UserError(f"--pixels {self.pixels}: is one of {', '.join(PIXELS)}")
        if self.tissue not in ("auto", "none") and not Path(self.tissue).is_dir():
            raise UserError(f"--tissue {self.tissue}: is neither auto, none nor a folder of GeoJSON outlines")
        if self.exclude and not Path(self.exclude).is_dir():
            raise UserError(f"--exclude {self.exclude}: is no folder of GeoJSON outlines or masks named by slide")
        for option, folder in (("--tissue", self.tissue), ("--exclude", self.exclude)):
            if self.tissue_out and folder and Path(folder).resolve() == Path(self.tissue_out).resolve():
                raise UserError(f"--tissue-out {self.tissue_out}: is the folder of {option}, whose outlines stay: give another")
        if self.pen not in ("drop", "keep"):
            raise UserError(f"--pen {self.pen}: is drop (ink is no tissue) or keep")
        if self.reader not in ("auto", *READERS):
            raise UserError(f"--reader {self.reader}: choose among auto, {', '.join(READERS)}")
        if self.resample not in RESAMPLE:
            raise UserError(f"--resample {self.resample}: choose among {', '.join(RESAMPLE)}")
        plan_grid(self.size, self.size, self.mpp, self.mpp, self.size, self.overlap)
        return self

    def anywhere(self) -> TileSettings:
        """The same with absolute folders: a cluster's workers run in folders of their own."""
        tissue = self.tissue if self.tissue in ("auto", "none") else str(Path(self.tissue).absolute())
        exclude, tissue_out = (folder and str(Path(folder).absolute()) for folder in (self.exclude, self.tissue_out))
        return replace(self, tissue=tissue, exclude=exclude, tissue_out=tissue_out)
