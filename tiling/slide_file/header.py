"""The header of a slide file: its attributes and its grid; base class of tiling.slide_file.read.SlideFile."""

from __future__ import annotations

import errno
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from annotations.errors import UserError
from tiling.grid import side_l0
from tiling.slide_file.write import FORMAT, FORMAT_VERSION, REMEDY
from tiling.storage.checked_file import CheckedFile
from tiling.storage.checksums import DamagedError
from tiling.storage.slide_id import checked_id

if TYPE_CHECKING:
    from tiling.wsi.slide import Slide


class SlideHeader:
    """A slide file, open for reading, with what it says about itself. See `tiling.slide_file.read.SlideFile`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._slide: Slide | None = None
        try:
            # A chunk cache of zero makes HDF5 read just the bytes of one tile, not its whole chunk.
            self._checked = CheckedFile(self.path, self._remedy, rdcc_nbytes=0)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such slide file: make it with odis-path tile") from None
        except PermissionError as error:
            why = os.strerror(error.errno or errno.EACCES)
            raise UserError(f"{self.path}: cannot be read: {why}: ask for the right to read it") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else "damaged or cut off"
            raise DamagedError(f"{self.path}: not a readable HDF5 file ({why}): {REMEDY}, or take the file away") from None
        self._file = self._checked.h5
        try:
            self._check_format()
        except BaseException:
            self.close()
            raise

    def _check_format(self) -> None:
        """Raise UserError for a file of another format, DamagedError where damage makes it look like one."""
        with self._checked.reading("", "its format"):
            kind, version = self._file.attrs.get("format"), int(self._file.attrs.get("format_version", 0))
        if kind != FORMAT or version > FORMAT_VERSION:
            self._checked.attrs()
            newer = f"format_version {version} (this software reads {FORMAT_VERSION})"
            stated = f"format {kind!r}" if kind != FORMAT else newer
            raise UserError(f"{self.path}: {stated}: not a slide file this odis-path reads; make it with odis-path tile")

    def _remedy(self, name: str) -> str:
        """Say what to do where the object `name` is damaged."""
        if name.partition("/")[0] in ("boxes", "objects"):
            return "run odis-path annotate (or propose) again: its objects and boxes are made anew"
        return REMEDY

    def close(self) -> None:
        self._file.close()
        if self._slide is not None:
            self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.coords)

    # --- what the file says about itself

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Root attributes."""
        return self._checked.attrs()

    @cached_property
    def coords_attrs(self) -> dict[str, Any]:
        """Attributes of /coords, ready to be copied to a feature file."""
        return self._checked.attrs("coords")

    def _coords_attr(self, key: str) -> Any:
        with self._checked.reading("coords", f"the attribute {key} of /coords"):
            return self.coords_attrs[key]

    @property
    def slide_id(self) -> str:
        """The slide's name, of which file names are made: UserError for one that is a path or cannot be a file name."""
        with self._checked.reading("", "its slide_id"):
            return checked_id(str(self.attrs["slide_id"]), self.path)

    @property
    def patient_id(self) -> str:
        """May be empty."""
        return str(self.attrs.get("patient_id", ""))

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that the tiles were made with."""
        with self._checked.reading("", "its parameters"):
            parameters: dict[str, Any] = json.loads(self.attrs["parameters"])
        return parameters

    @property
    def source(self) -> Path:
        """The slide (or image) the tiles came from."""
        with self._checked.reading("", "its source"):
            return Path(str(self.attrs["source"]))

    @property
    def bounds_xy(self) -> tuple[int, int]:
        """Offset of the scanned area in level-0 pixels (OpenSlide bounds-x, bounds-y)."""
        return int(self.attrs.get("bounds_x", 0)), int(self.attrs.get("bounds_y", 0))

    @property
    def dimensions_l0(self) -> tuple[int, int]:
        """Width and height of the slide in level-0 pixels."""
        return int(self._coords_attr("level0_width")), int(self._coords_attr("level0_height"))

    @property
    def mpp(self) -> float:
        """Micrometres per target pixel."""
        return float(self._coords_attr("mpp"))

    @property
    def mpp_level0(self) -> float:
        """Micrometres per level-0 pixel."""
        return float(self._coords_attr("mpp_level0"))

    @property
    def patch_size(self) -> int:
        """Side of a tile in target pixels."""
        return int(self._coords_attr("patch_size"))

    @property
    def patch_size_level0(self) -> int:
        """Side of a tile in level-0 pixels, rounded; `size_l0` is the exact one."""
        return int(self._coords_attr("patch_size_level0"))

    @property
    def size_l0(self) -> float:
        """Exact side of a tile in level-0 pixels."""
        return side_l0(self.patch_size, self.mpp, self.mpp_level0)

    @property
    def overlap(self) -> int:
        """Overlap of neighbouring tiles in target pixels."""
        return int(self._coords_attr("overlap"))

    @cached_property
    def coords(self) -> np.ndarray:
        """int64 (N, 2): top-left x, y of each tile in level-0 pixels."""
        coords = self._checked.array("coords")
        self._expect("coords", coords.ndim == 2 and coords.shape[1] == 2)
        return coords

    def _offsets(self, name: str, rows: int) -> np.ndarray:
        """Read offsets, int64 (N+1,): tile i has rows offsets[i]:offsets[i + 1] of `rows`."""
        offsets = self._checked.array(name)
        fits = (
            offsets.shape == (len(self) + 1,)
            and offsets[0] == 0
            and offsets[-1] == rows
            and bool((np.diff(offsets) >= 0).all())
        )
        self._expect(name, fits)
        return offsets

    def _expect(self, name: str, fits: bool) -> None:
        """Raise DamagedError where a dataset does not fit the rest of the file."""
        if not fits:
            raise self._checked.damaged(name, f"/{name} does not fit the rest of the file")
