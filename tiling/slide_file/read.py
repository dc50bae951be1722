"""Read the slide file, and list a folder of them. The writing half lives in tiling.slide_file.write."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import numpy as np

from annotations.errors import UserError
from tiling.slide_file.header import SlideHeader
from tiling.slide_file.stored_bytes import StoredBytes
from tiling.slide_file.write import (
    FORMAT,
    FORMAT_VERSION,
    SlideMeta,
    outline_crc32,
    replace_groups,
    source_stamp,
    write_slide_file,
)
from tiling.storage.checked_file import CRC_ATTR, CheckedFile
from tiling.storage.checksums import DamagedError, crc32
from tiling.storage.touched import was_touched
from tiling.wsi import codec

if TYPE_CHECKING:
    from tiling.wsi.slide import Slide

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "SlideFile",
    "SlideMeta",
    "list_slide_files",
    "replace_groups",
    "source_stamp",
    "write_slide_file",
]


class BoxTable(TypedDict):
    """Columns of /boxes: xyxy float32 (M, 4), offsets int64 (N+1,), object int32 (M,), visible float32 (M,)."""

    xyxy: np.ndarray
    offsets: np.ndarray
    object: np.ndarray
    visible: np.ndarray


class ObjectColumns(TypedDict):
    """Columns of /objects: label int16 (K,), kind uint8 (K,), area_um2 float32 (K,), id object (str) (K,); and class names.

    confidence float32 (K,), NaN where a detector did not say, is there only where the file has it.
    """

    label: np.ndarray
    kind: np.ndarray
    area_um2: np.ndarray
    labels: list[str]
    id: NotRequired[np.ndarray]
    confidence: NotRequired[np.ndarray]


class SlideFile(SlideHeader):
    """One slide file, open for reading; a context manager. Arrays are read on first use and kept.

    What is read is compared with its checksum (see `checked_file`). Raises UserError where the file is missing, is not
    HDF5 or was not written by odis-path, DamagedError where it is damaged. Not picklable: open it by path in the process that
    reads it.
    """

    # --- tiles

    @cached_property
    def tissue_fraction(self) -> np.ndarray:
        """float32 (N,)"""
        return self._checked.array("tissue_fraction")

    @cached_property
    def pen_share(self) -> np.ndarray | None:
        """float32 (N,): share of each tile under pen ink; None where it was not looked for."""
        return self._quality("pen")

    @cached_property
    def blur(self) -> np.ndarray | None:
        """float32 (N,): 0 (sharp) to 1 (blurred), nan for a tile too plain to tell; None where it was not looked for."""
        return self._quality("blur")

    def _quality(self, name: str) -> np.ndarray | None:
        return self._checked.array(f"quality/{name}") if f"quality/{name}" in self._checked else None

    @cached_property
    def has_pixels(self) -> bool:
        return "pixels" in self._checked

    @cached_property
    def _pixel_offsets(self) -> np.ndarray:
        return self._offsets("pixels/offsets", len(self._pixels))

    @cached_property
    def _pixel_crc32s(self) -> np.ndarray | None:
        """uint32 (N,); None where the file is of a version without."""
        if "pixels/crc32" not in self._checked:
            return None
        sums = self._checked.array("pixels/crc32")
        self._expect("pixels/crc32", sums.shape == (len(self),))
        return sums

    @cached_property
    def _pixels(self) -> StoredBytes:
        with self._checked.reading("pixels/data", "/pixels/data"):
            return StoredBytes(self._file, "pixels/data")

    def tile_bytes(self, i: int) -> bytes:
        """Read tile i as JPEG or PNG; from /pixels, or read from the slide and encoded as JPEG.

        Raises DamagedError where its bytes are not those that were stored.
        """
        i = self._number(i)
        if not self.has_pixels:
            return codec.encode_jpeg(self.tile(i))
        start, stop = self._pixel_offsets[i : i + 2].tolist()
        data = self._pixels.read(start, stop)
        if self._pixel_crc32s is not None and crc32(data) != self._pixel_crc32s[i]:
            raise self._checked.damaged("pixels", f"tile {i} does not match its checksum")
        return data

    def tile(self, i: int) -> np.ndarray:
        """Read tile i as uint8 (S, S, 3); from /pixels, or read from the slide named in `source`."""
        i = self._number(i)
        if self.has_pixels:
            return codec.decode(self.tile_bytes(i))
        return self.region(i, 0, 0, self.patch_size)

    def region(self, i: int, x: int, y: int, side_px: int) -> np.ndarray:
        """A square of the slide itself, seen as its tiles are: uint8 (side_px, side_px, 3).

        x, y: its corner in pixels of tile i, from that tile's. Raises UserError where the slide is gone or cannot be decoded.
        """
        tile_l0, tile_px = self._sides
        scale = tile_l0 / tile_px
        side_l0 = tile_l0 if side_px == tile_px else side_px * scale
        x_l0, y_l0 = (self.coords[i] + np.array([x, y]) * scale).tolist()
        return self._open_source().read_region(x_l0, y_l0, side_l0, side_l0, side_px, side_px)

    def tiles(self, numbers: np.ndarray) -> np.ndarray:
        """Read tiles `numbers`, int (n,), as uint8 (n, S, S, 3): quicker than one by one, where neighbours ascend."""
        numbers = np.array([self._number(int(i)) for i in numbers], dtype=np.int64)
        side = self.patch_size
        stack = np.empty((len(numbers), side, side, 3), np.uint8)
        if self.has_pixels or (np.diff(numbers) < 0).any():
            tiles: Iterator[np.ndarray] = (self.tile(int(i)) for i in numbers)
        else:
            from tiling.wsi.patches import read_tiles

            tiles = read_tiles(self._open_source(), self.coords[numbers], *self._sides)
        for at, tile in enumerate(tiles):
            stack[at] = tile
        return stack

    @cached_property
    def _sides(self) -> tuple[float, int]:
        """Side of a tile in level-0 pixels and in its own."""
        return self.size_l0, self.patch_size

    def _number(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"tile {i} of {len(self)} in {self.path}")
        return i % len(self)

    def check_source(self) -> None:
        """Raise UserError where the slide named in `source` is gone or is not the one that was tiled."""
        from tiling.storage.paths import url_of

        if url_of(self.source):
            return
        if not self.source.exists():
            raise UserError(
                f"{self.path}: holds no pixels and its slide {self.source} is gone: "
                "bring the slide back or tile again with --pixels"
            )
        tiled_size, size = int(self.attrs.get("source_size", -1)), source_stamp(self.source)[0]
        if tiled_size not in (-1, size):
            raise UserError(
                f"{self.path}: its slide {self.source} has {size} bytes, {tiled_size} when it was tiled: "
                "run odis-path tile again"
            )

    def _open_source(self) -> Slide:
        """Open the slide, for pixels as `tile` would have stored them; its mpp was settled then."""
        if self._slide is None:
            from tiling.slide_file.source_slide import open_source

            self._slide = open_source(self)
        return self._slide

    @cached_property
    def bad_tiles(self) -> np.ndarray:
        """Rows of tiles that could not be decoded whole when the slide was tiled: int64 (K,), usually none."""
        return self._checked.array("bad_tiles") if "bad_tiles" in self._checked else np.zeros(0, np.int64)

    # --- boxes and objects

    @cached_property
    def has_boxes(self) -> bool:
        return "boxes" in self._checked

    @cached_property
    def _box_offsets(self) -> np.ndarray:
        return self._offsets("boxes/offsets", len(self._box_xyxy))

    @cached_property
    def _box_xyxy(self) -> np.ndarray:
        return self._checked.array("boxes/xyxy")

    def box_rows(self, i: int) -> slice:
        """Rows of /boxes that belong to tile i; empty where the file has no boxes."""
        i = self._number(i)
        if not self.has_boxes:
            return slice(0, 0)
        return slice(int(self._box_offsets[i]), int(self._box_offsets[i + 1]))

    def boxes(self, i: int) -> np.ndarray:
        """float32 (k, 4): x0, y0, x1, y1 of tile i's boxes in target pixels; (0, 4) where there are none."""
        if not self.has_boxes:
            return np.zeros((0, 4), np.float32)
        return self._box_xyxy[self.box_rows(i)]

    def boxes_table(self) -> BoxTable:
        """Read the columns of /boxes; empty where there are none."""
        if not self.has_boxes:
            return {
                "xyxy": np.zeros((0, 4), np.float32),
                "offsets": np.zeros(len(self) + 1, np.int64),
                "object": np.zeros(0, np.int32),
                "visible": np.zeros(0, np.float32),
            }
        row, visible = self._checked.array("boxes/object"), self._checked.array("boxes/visible")
        for name, column in (("object", row), ("visible", visible)):
            self._expect(f"boxes/{name}", column.shape == (len(self._box_xyxy),))
        return {"xyxy": self._box_xyxy, "offsets": self._box_offsets, "object": row, "visible": visible}

    @cached_property
    def box_tiles(self) -> np.ndarray:
        """int64 (M,): the tile of each row of /boxes."""
        return np.repeat(np.arange(len(self)), np.diff(self.boxes_table()["offsets"]))

    @cached_property
    def box_bounds_l0(self) -> np.ndarray:
        """float64 (M, 4): x0, y0, x1, y1 of each row of /boxes in level-0 pixels."""
        bounds = self.boxes_table()["xyxy"].astype(float) * (self.size_l0 / self.patch_size)
        return np.asarray(bounds + np.tile(self.coords[self.box_tiles], 2))

    @cached_property
    def has_polygons(self) -> bool:
        """Tell whether annotate stored the clipped outlines too."""
        return self.has_boxes and "boxes/polygon" in self._checked

    @cached_property
    def _polygon(self) -> tuple[Any, Any, Any, np.ndarray | None]:
        """The datasets offsets, ring_offsets and xy, and the checksums of the outlines, uint32 (M,)."""
        if not self.has_polygons:
            raise UserError(f"{self.path}: holds no polygons: run odis-path annotate with --polygons (or import)")
        name = "boxes/polygon/crc32"
        sums = self._checked.array(name) if name in self._checked else None
        with self._checked.reading("boxes/polygon", "/boxes/polygon"):
            group = self._file["boxes/polygon"]
            return group["offsets"], group["ring_offsets"], group["xy"], sums

    def polygon(self, row: int) -> list[np.ndarray]:
        """Read the clipped outline behind row `row` of /boxes: rings float64 (k, 2), x, y in target pixels of the tile.

        Outlines, holes and parts alike, filled by the even-odd rule; a ring does not repeat its first position. Raises
        UserError where the file has no polygons, IndexError where it has no such row, DamagedError where it does not match.
        """
        offsets, ring_offsets, xy, sums = self._polygon
        row = int(row)
        if not 0 <= row < len(offsets) - 1:
            raise IndexError(f"box {row} of {len(offsets) - 1} in {self.path}")
        with self._checked.reading("boxes/polygon", f"outline {row}"):
            first, stop = offsets[row : row + 2].tolist()
            ends = ring_offsets[first : stop + 1]
            start = int(ends[0])
            points = xy[start : int(ends[-1])] if first != stop else xy[:0]
            if sums is not None and outline_crc32(points, ends, start) != sums[row]:
                raise self._checked.damaged("boxes/polygon", f"outline {row} does not match its checksum")
        points = points.astype(np.float64)
        return [points[a:b] for a, b in pairwise((ends - start).tolist())]

    def objects_table(self, *, ids: bool = True) -> ObjectColumns:
        """Read the columns of /objects; empty where there are none. ids: read id too, which takes most of the time."""
        if "objects" not in self._checked:
            label, kind, area_um2, ids_ = (np.zeros(0, dtype) for dtype in (np.int16, np.uint8, np.float32, object))
            return {"label": label, "kind": kind, "area_um2": area_um2, "id": ids_, "labels": []}
        table = {name: self._checked.array(f"objects/{name}") for name in ("label", "kind", "area_um2")}
        if "objects/confidence" in self._checked:
            table["confidence"] = self._checked.array("objects/confidence")
        if ids:
            table["id"] = self._checked.texts("objects/id")
        for name, column in table.items():
            self._expect(f"objects/{name}", column.shape == table["label"].shape)
        labels = [str(name) for name in self.group_attrs("objects").get("labels", ())]
        self._expect("objects/label", bool(((table["label"] >= -1) & (table["label"] < len(labels))).all()))
        return cast(ObjectColumns, {**table, "labels": labels})

    def object_classes(self, unclassified: str | None = None) -> np.ndarray:
        """object (str) (K,): the class name of each object; `unclassified` where its label is -1."""
        objects = self.objects_table(ids=False)
        return np.asarray(np.array([*objects["labels"], unclassified], dtype=object)[objects["label"]])

    def group_attrs(self, name: str) -> dict[str, Any]:
        """Attributes of a top-level group or dataset; empty where there is none."""
        return self._checked.attrs(name) if name in self._checked else {}

    # --- the overview

    def thumbnail(self) -> tuple[np.ndarray, float] | None:
        """uint8 (h, w, 3) overview and its downsample (level-0 pixels per pixel); None where the file has none."""
        if "thumbnail/jpeg" not in self._checked:
            return None
        data, attrs = self._checked.array("thumbnail/jpeg").tobytes(), self.group_attrs("thumbnail")
        with self._checked.reading("thumbnail", "/thumbnail"):
            return codec.decode(data), float(attrs["downsample"])

    def tissue_mask(self) -> np.ndarray | None:
        """bool (h, w) on the thumbnail's grid; None where the file has none."""
        return self._checked.array("thumbnail/tissue").astype(bool) if "thumbnail/tissue" in self._checked else None

    # --- damage

    def check(self, *, boxes: bool = True, tiles: bool = True, pixels: bool = True) -> None:
        """Compare with its checksum what annotate and propose wrote (`boxes`), what tile wrote, and every stored tile.

        Raises DamagedError for the first object that does not match, or does not fit the rest.
        """
        self._checked.check(
            lambda name: name != "pixels/data" and (boxes if name.partition("/")[0] in ("boxes", "objects") else tiles)
        )
        if boxes:
            objects, row = self.objects_table(ids=False), self.boxes_table()["object"]
            self._expect("boxes/object", bool(((row >= 0) & (row < len(objects["label"]))).all()))
        if tiles:
            self._expect("tissue_fraction", self.tissue_fraction.shape == (len(self),))
            _ = (self.mpp, self.mpp_level0, self.patch_size, self.dimensions_l0, self.slide_id, self.parameters)
        if tiles and self.has_pixels:
            _ = self._pixel_offsets
            for i in range(len(self) if pixels and self._pixel_crc32s is not None else 0):
                self.tile_bytes(i)

    def has_attr(self, name: str, key: str) -> bool:
        """Tell whether an object of the file has an attribute, damaged or not."""
        return name in self._checked and key in self._file[name].attrs

    @property
    def boxes_damaged(self) -> bool:
        """Tell whether objects or boxes do not match their checksums; compared only where something touched the file."""
        if not was_touched(self.path):
            return False
        try:
            self.check(tiles=False, pixels=False)
        except DamagedError:
            return True
        return False

    @property
    def has_checksums(self) -> bool:
        """Tell whether the file is of a version with checksums."""
        return CRC_ATTR in self._file["coords"].attrs


def list_slide_files(folder: Path | str) -> list[Path]:
    """List the .h5 files of a folder, sorted by name, also those that turn out damaged or no slide files when opened.

    Raises UserError where the folder is missing or holds no slide file.
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
    """List the files of a folder named *.h5, sorted by name; not the hidden ones that other systems leave beside them."""
    return [path for path in sorted(folder.glob("*.h5")) if not path.name.startswith(".")]


def is_slide_file(path: Path) -> bool:
    """Tell whether a file is HDF5 of the format odis-path; also true where it cannot be read: it may have been one."""
    try:
        with CheckedFile(path, lambda _: "") as file:
            return file.h5.attrs.get("format") == FORMAT or file.attrs().get("format") == FORMAT
    except (OSError, UserError, RuntimeError, KeyError, ValueError, TypeError):
        return True
