"""Read the slide file, and list a folder of them. The writing half lives in tiling.slidewrite."""

from __future__ import annotations

import errno
import json
import os
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from annotations.errors import UserError
from tiling import codec
from tiling.grid import side_l0
from tiling.slideid import checked_id
from tiling.slidewrite import FORMAT, FORMAT_VERSION, SlideMeta, replace_groups, source_stamp, write_slide_file
from tiling.storedbytes import StoredBytes

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "SlideFile",
    "SlideMeta",
    "list_slide_files",
    "replace_groups",
    "source_stamp",
    "tile_labels",
    "write_slide_file",
]

TISSUE_KIND = 0  # annotations.table.TISSUE, kept apart so that reading a file imports no geometry


class SlideFile:
    """One slide file, open for reading; a context manager. Arrays are read on first use and kept.

    Raises UserError where the file is missing, is not HDF5 or was not written by odis-path. Not picklable: open it by
    path in the process that reads it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._slide: Any = None
        try:
            # Files are replaced by renaming, never written in place, so no lock is needed (and none works on some
            # network mounts). A chunk cache of zero makes HDF5 read just the bytes of one tile, not its whole chunk.
            self._file = h5py.File(self.path, "r", locking=False, rdcc_nbytes=0)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such slide file: make it with odis-path tile") from None
        except PermissionError as error:
            why = os.strerror(error.errno or errno.EACCES)
            raise UserError(f"{self.path}: cannot be read: {why}: ask for the right to read it") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            way_out = "tile the slide again, or take the file away"
            raise UserError(f"{self.path}: not a readable HDF5 file ({why}): {way_out}") from None
        found = self._file.attrs.get("format")
        version = int(self._file.attrs.get("format_version", 0))
        if found != FORMAT or version > FORMAT_VERSION:
            self._file.close()
            newer = f"format_version {version} (this software reads {FORMAT_VERSION})"
            what = f"format {found!r}" if found != FORMAT else newer
            raise UserError(f"{self.path}: {what}: not a slide file this odis-path reads; make it with odis-path tile")

    def close(self) -> None:
        self._file.close()
        if self._slide is not None:
            self._slide.close()

    def __enter__(self) -> SlideFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.coords)

    # --- what the file says about itself

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Root attributes."""
        return dict(self._file.attrs)

    @cached_property
    def coords_attrs(self) -> dict[str, Any]:
        """Attributes of /coords, ready to be copied to a feature file."""
        return dict(self._file["coords"].attrs)

    @property
    def slide_id(self) -> str:
        """Names files: one that is a path, or no file name, is a UserError."""
        return checked_id(str(self.attrs["slide_id"]), self.path)

    @property
    def patient_id(self) -> str:
        """May be empty."""
        return str(self.attrs.get("patient_id", ""))

    @property
    def parameters(self) -> dict[str, Any]:
        return json.loads(self.attrs["parameters"])

    @property
    def source(self) -> Path:
        """The slide (or image) the tiles came from."""
        return Path(str(self.attrs["source"]))

    @property
    def bounds_xy(self) -> tuple[int, int]:
        """Offset of the scanned area in level-0 pixels (OpenSlide bounds-x, bounds-y)."""
        return int(self.attrs.get("bounds_x", 0)), int(self.attrs.get("bounds_y", 0))

    @property
    def dimensions_l0(self) -> tuple[int, int]:
        """Width and height of the slide in level-0 pixels."""
        return int(self.coords_attrs["level0_width"]), int(self.coords_attrs["level0_height"])

    @property
    def mpp(self) -> float:
        """Micrometres per target pixel."""
        return float(self.coords_attrs["mpp"])

    @property
    def mpp_level0(self) -> float:
        """Micrometres per level-0 pixel."""
        return float(self.coords_attrs["mpp_level0"])

    @property
    def patch_size(self) -> int:
        """Side of a tile in target pixels."""
        return int(self.coords_attrs["patch_size"])

    @property
    def patch_size_level0(self) -> int:
        """Side of a tile in level-0 pixels, rounded; `size_l0` is the exact one."""
        return int(self.coords_attrs["patch_size_level0"])

    @property
    def size_l0(self) -> float:
        """Exact side of a tile in level-0 pixels."""
        return side_l0(self.patch_size, self.mpp, self.mpp_level0)

    @property
    def overlap(self) -> int:
        """Overlap of neighbouring tiles in target pixels."""
        return int(self.coords_attrs["overlap"])

    # --- tiles

    @cached_property
    def coords(self) -> np.ndarray:
        """int64 (N, 2): top-left x, y of each tile in level-0 pixels."""
        return self._file["coords"][...]

    @cached_property
    def tissue_fraction(self) -> np.ndarray:
        """float32 (N,)"""
        return self._file["tissue_fraction"][...]

    @cached_property
    def pen_share(self) -> np.ndarray | None:
        """float32 (N,): share of each tile under pen ink; None where it was not looked for."""
        return self._quality("pen")

    @cached_property
    def blur(self) -> np.ndarray | None:
        """float32 (N,): 0 (sharp) to 1 (blurred), nan for a tile too plain to tell; None where it was not looked for."""
        return self._quality("blur")

    def _quality(self, name: str) -> np.ndarray | None:
        return self._file[f"quality/{name}"][...] if f"quality/{name}" in self._file else None

    @cached_property
    def has_pixels(self) -> bool:
        return "pixels" in self._file

    @cached_property
    def _pixel_offsets(self) -> np.ndarray:
        return self._file["pixels/offsets"][...]

    @cached_property
    def _pixels(self) -> StoredBytes:
        return StoredBytes(self._file, "pixels/data")

    def tile_bytes(self, i: int) -> bytes:
        """Tile i as JPEG or PNG; from /pixels, or read from the slide and encoded as JPEG."""
        i = self._checked(i)
        if not self.has_pixels:
            return codec.encode_jpeg(self.tile(i))
        start, stop = self._pixel_offsets[i : i + 2].tolist()
        return self._pixels.read(start, stop)

    def tile(self, i: int) -> np.ndarray:
        """Tile i as uint8 (S, S, 3); from /pixels, or read from the slide named in `source`."""
        i = self._checked(i)
        if self.has_pixels:
            return codec.decode(self.tile_bytes(i))
        x, y = self.coords[i].tolist()
        side_l0, side_px = self._sides
        return self._open_source().read_region(x, y, side_l0, side_l0, side_px, side_px)

    def tiles(self, numbers: np.ndarray) -> np.ndarray:
        """Tiles `numbers`, int (n,), as uint8 (n, S, S, 3). Neighbours in ascending order are quicker than one by one."""
        numbers = np.array([self._checked(int(i)) for i in numbers], dtype=np.int64)
        side = self.patch_size
        found = np.empty((len(numbers), side, side, 3), np.uint8)
        if self.has_pixels or (np.diff(numbers) < 0).any():
            each = (self.tile(int(i)) for i in numbers)
        else:
            each = self._open_source().read_tiles(self.coords[numbers], *self._sides)
        for at, tile in enumerate(each):
            found[at] = tile
        return found

    @cached_property
    def _sides(self) -> tuple[float, int]:
        """Side of a tile in level-0 pixels and in its own."""
        return self.size_l0, self.patch_size

    def _checked(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"tile {i} of {len(self)} in {self.path}")
        return i % len(self)

    def check_source(self) -> None:
        """Raises UserError where the slide named in `source` is gone or is not the one that was tiled."""
        from tiling.urls import url_of

        if url_of(self.source):
            return
        if not self.source.exists():
            raise UserError(
                f"{self.path}: holds no pixels and its slide {self.source} is gone: "
                "bring the slide back or tile again with --pixels"
            )
        size, found = int(self.attrs.get("source_size", -1)), source_stamp(self.source)[0]
        if size not in (-1, found):
            raise UserError(
                f"{self.path}: its slide {self.source} has {found} bytes, {size} when it was tiled: run odis-path tile again"
            )

    def _open_source(self) -> Any:
        """The slide, for pixels as `tile` would have stored them; its mpp was settled then."""
        if self._slide is None:
            from tiling.sourceslide import open_source

            self._slide = open_source(self)
        return self._slide

    @cached_property
    def bad_tiles(self) -> np.ndarray:
        """Rows of tiles that could not be decoded whole when the slide was tiled: int64 (K,), usually none."""
        return self._file["bad_tiles"][...] if "bad_tiles" in self._file else np.zeros(0, np.int64)

    # --- boxes and objects

    @cached_property
    def has_boxes(self) -> bool:
        return "boxes" in self._file

    @cached_property
    def _box_offsets(self) -> np.ndarray:
        return self._file["boxes/offsets"][...]

    @cached_property
    def _box_xyxy(self) -> np.ndarray:
        return self._file["boxes/xyxy"][...]

    def box_rows(self, i: int) -> slice:
        """Rows of /boxes that belong to tile i; empty where the file has no boxes."""
        i = self._checked(i)
        if not self.has_boxes:
            return slice(0, 0)
        return slice(int(self._box_offsets[i]), int(self._box_offsets[i + 1]))

    def boxes(self, i: int) -> np.ndarray:
        """float32 (k, 4): x0, y0, x1, y1 of tile i's boxes in target pixels; (0, 4) where there are none."""
        if not self.has_boxes:
            return np.zeros((0, 4), np.float32)
        return self._box_xyxy[self.box_rows(i)]

    def boxes_table(self) -> dict[str, np.ndarray]:
        """xyxy float32 (M, 4), offsets int64 (N+1,), object int32 (M,), visible float32 (M,); empty where none."""
        if not self.has_boxes:
            return {
                "xyxy": np.zeros((0, 4), np.float32),
                "offsets": np.zeros(len(self) + 1, np.int64),
                "object": np.zeros(0, np.int32),
                "visible": np.zeros(0, np.float32),
            }
        return {name: self._file["boxes"][name][...] for name in ("xyxy", "offsets", "object", "visible")}

    @cached_property
    def has_polygons(self) -> bool:
        """Whether annotate stored the clipped outlines too."""
        return self.has_boxes and "polygon" in self._file["boxes"]

    @cached_property
    def _polygon(self) -> tuple[h5py.Dataset, h5py.Dataset, h5py.Dataset]:
        if not self.has_polygons:
            raise UserError(f"{self.path}: holds no polygons: run odis-path annotate with --polygons (or import)")
        group = self._file["boxes/polygon"]
        return group["offsets"], group["ring_offsets"], group["xy"]

    def polygon(self, row: int) -> list[np.ndarray]:
        """The clipped outline behind row `row` of /boxes: rings float64 (k, 2), x, y in target pixels of the tile.

        Outlines, holes and parts alike, filled by the even-odd rule; a ring does not repeat its first position. Raises
        UserError where the file has no polygons, IndexError where it has no such row.
        """
        offsets, ring_offsets, xy = self._polygon
        row = int(row)
        if not 0 <= row < len(offsets) - 1:
            raise IndexError(f"box {row} of {len(offsets) - 1} in {self.path}")
        first, stop = offsets[row : row + 2].tolist()
        if first == stop:
            return []
        ends = ring_offsets[first : stop + 1]
        start = int(ends[0])
        points = xy[start : int(ends[-1])].astype(np.float64)
        return [points[a:b] for a, b in pairwise((ends - start).tolist())]

    def objects_table(self, *, ids: bool = True) -> dict[str, Any]:
        """id object (str) (K,), label int16, kind uint8, area_um2 float32 (K,), labels list[str]; empty where none.

        ids: read id too, which takes most of the time. confidence float32 (K,), NaN where a detector did not say, is there only
        where the file has it.
        """
        if "objects" not in self._file:
            empty = {"label": np.zeros(0, np.int16), "kind": np.zeros(0, np.uint8), "area_um2": np.zeros(0, np.float32)}
            return {**empty, "id": np.zeros(0, object), "labels": []}
        group = self._file["objects"]
        stored = [name for name in ("label", "kind", "area_um2", "confidence") if name != "confidence" or name in group]
        table: dict[str, Any] = {name: group[name][...] for name in stored}
        if ids:
            table["id"] = group["id"].asstr()[...]
        table["labels"] = [str(name) for name in group.attrs["labels"]]
        return table

    def group_attrs(self, name: str) -> dict[str, Any]:
        """Attributes of a top-level group or dataset; empty where there is none."""
        return dict(self._file[name].attrs) if name in self._file else {}

    # --- the overview

    def thumbnail(self) -> tuple[np.ndarray, float] | None:
        """uint8 (h, w, 3) overview and its downsample (level-0 pixels per pixel); None where the file has none."""
        if "thumbnail" not in self._file or "jpeg" not in self._file["thumbnail"]:
            return None
        group = self._file["thumbnail"]
        return codec.decode(group["jpeg"][...].tobytes()), float(group.attrs["downsample"])

    def tissue_mask(self) -> np.ndarray | None:
        """bool (h, w) on the thumbnail's grid; None where the file has none."""
        if "thumbnail" not in self._file or "tissue" not in self._file["thumbnail"]:
            return None
        return self._file["thumbnail/tissue"][...].astype(bool)


def list_slide_files(folder: Path | str) -> list[Path]:
    """The .h5 files of a folder of slide files, sorted by name; those that are none or damaged too: who opens one is told.

    Raises UserError where it is missing or holds no slide file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file, not a folder" if folder.is_file() else "no such folder"
        raise UserError(f"{folder}: {what}: give the folder that odis-path tile or import wrote")
    paths = h5_files(folder)
    if not any(is_slide_file(path) for path in paths):
        raise UserError(f"{folder}: holds no slide file: give the folder that odis-path tile or import wrote")
    return paths


def h5_files(folder: Path) -> list[Path]:
    """The files of a folder named *.h5, sorted by name; hidden ones, which others leave beside them, are none."""
    return [path for path in sorted(folder.glob("*.h5")) if not path.name.startswith(".")]


def is_slide_file(path: Path) -> bool:
    """True where the file is HDF5 and says format odis-path, and where it cannot be read: it may have been one."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return file.attrs.get("format") == FORMAT
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        return True


def tile_labels(file: SlideFile, min_share: float = 0.5) -> tuple[np.ndarray, list[str]]:
    """The tissue class of each tile: the label with the largest clipped area, where it covers `min_share` of the tile.

    Only tissue objects (kind 0) with a class count. Returns int16 (N,), -1 where no class reaches the share, and the
    label names. The area of an object in a tile is visible * area_um2.
    """
    objects, boxes = file.objects_table(), file.boxes_table()
    names: list[str] = objects["labels"]
    labels = np.full(len(file), -1, np.int16)
    if not names or not len(file) or not len(boxes["object"]):
        return labels, names
    tile = np.repeat(np.arange(len(file)), np.diff(boxes["offsets"]))
    row = boxes["object"]
    counts = (objects["kind"][row] == TISSUE_KIND) & (objects["label"][row] >= 0)
    tile, row = tile[counts], row[counts]
    area = boxes["visible"][counts].astype(float) * objects["area_um2"][row]
    table = np.zeros((len(file), len(names)))
    np.add.at(table, (tile, objects["label"][row]), area)
    best = table.argmax(axis=1)
    tile_area_um2 = (file.patch_size * file.mpp) ** 2
    enough = table[np.arange(len(file)), best] >= (min_share - 1e-4) * tile_area_um2
    labels[enough & (table.max(axis=1) > 0)] = best[enough & (table.max(axis=1) > 0)]
    return labels, names
