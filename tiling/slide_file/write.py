"""Write the slide file: one HDF5 file per slide, laid out as DESIGN.md's table says."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from annotations.errors import UserError
from tiling.grid import side_l0
from tiling.storage.checked_file import CRC_ATTR, OWN_ATTRS, CheckedFile, attr_checksums, write_attr_checksums
from tiling.storage.checksums import DamagedError, crc32, value_crc32
from tiling.storage.hdf5 import new_h5
from tiling.storage.paths import absolute, display_path, url_of, url_stamp
from tiling.storage.touched import was_touched

FORMAT = "odis-path"
FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 20
REMEDY = "run odis-path tile again (import, for imported images): it is made anew"  # for a damaged slide file

# name -> array, list of str or mapping (a group within), and "attrs" -> dict: one group; an array or (array, attrs): a
# dataset at the root; None: the group goes away.
Columns = dict[str, Any]  # of one group: name -> array or list of str, "attrs" -> dict, and groups within
GroupContent = Mapping[str, Any] | np.ndarray | tuple[np.ndarray, Mapping[str, Any]] | None


@dataclass(frozen=True)
class SlideMeta:
    """Facts about the slide and its grid, for the attributes of a slide file.

    width_l0, height_l0: level-0 pixels. mpp: micrometres per target pixel; mpp_level0: per level-0 pixel.
    patch_px, overlap_px: target pixels. bounds_xy: the scanned area's offset in level-0 pixels (OpenSlide bounds-x/y).
    parameters: what determined the result, JSON-able; its hash decides whether a later run may skip the slide. stamp: the
    `source_stamp` from before the slide was opened: writing fails where it is another in the end; None: taken when writing.
    """

    slide_id: str
    source: Path
    width_l0: int
    height_l0: int
    mpp: float
    mpp_level0: float
    patch_px: int
    overlap_px: int = 0
    patient_id: str = ""
    bounds_xy: tuple[int, int] = (0, 0)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stamp: tuple[int, int] | None = None

    @property
    def size_l0(self) -> float:
        """Exact side of a tile in level-0 pixels."""
        return side_l0(self.patch_px, self.mpp, self.mpp_level0)


def software_version() -> str:
    """Version of the installed odis-path distribution, "0+source" when run from a bare checkout."""
    try:
        return metadata.version("odis-path")
    except metadata.PackageNotFoundError:
        return "0+source"


def parameters_hash(parameters: Mapping[str, Any]) -> tuple[str, str]:
    """Parameters as JSON with sorted keys, and the sha256 (hex) of that text."""
    text = json.dumps(dict(parameters), sort_keys=True)
    return text, hashlib.sha256(text.encode()).hexdigest()


def source_stamp(source: Path) -> tuple[int, int]:
    """Size in bytes and mtime in ns of a source (behind a URL: what tells its versions apart); (-1, -1) where it is not."""
    if url := url_of(source):
        return url_stamp(url)
    try:
        stat = source.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def check_ours(path: Path) -> None:
    """Raises UserError where `path` is an HDF5 file but no slide file that this odis-path reads: it is not to be replaced.

    One that is missing, or damaged so that HDF5 does not open it, may be.
    """
    try:
        file = CheckedFile(path, lambda _: "")
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}: ask for the right to read it") from None
    except OSError:
        return
    with file:
        try:
            attrs = file.attrs()
            ours, version = attrs.get("format") == FORMAT, int(attrs.get("format_version", 0))
        except DamagedError:
            return
        except (ValueError, TypeError):
            ours, version = False, 0
    if not ours or version > FORMAT_VERSION:
        by = f"made by a newer odis-path (format_version {version})" if ours else "not made by odis-path tile"
        raise UserError(f"{path}: {by}: give another --out")


class SlideFileWriter:
    """Write one slide file, tile by tile; it appears under its path only when the `with` block ends well.

    First the tiles (`add_tile`), then the groups (`add_group`); the writer itself stores which tiles are bad.
    """

    def __init__(
        self,
        path: Path,
        meta: SlideMeta,
        coords: np.ndarray,
        tissue_fraction: np.ndarray | None = None,
        *,
        has_pixels: bool,
    ) -> None:
        """Take the grid. coords: int64 (N, 2), top-left x, y in level-0 pixels, ordered by (y, x). tissue_fraction:
        float32 (N,), ones when None. has_pixels: N tiles will be added; False: the slide stays the pixel source.

        Raises ValueError where the shapes do not fit or the coords are not in order, UserError where another kind of file is in
        its place. At the end of the block, ValueError where another number of tiles was added, UserError where the slide is
        not what it was (see `SlideMeta.stamp`).
        """
        check_ours(path)
        self.path, self.meta = path, meta
        self._coords = np.asarray(coords, dtype=np.int64).reshape(-1, 2)
        count = len(self._coords)
        fraction = np.ones(count) if tissue_fraction is None else np.asarray(tissue_fraction)
        if fraction.shape != (count,):
            raise ValueError(f"tissue_fraction has shape {fraction.shape}, coords has {count} rows")
        if (np.lexsort((self._coords[:, 0], self._coords[:, 1])) != np.arange(count)).any():
            raise ValueError("coords are not in row-major order by (y, x)")
        self._tissue_fraction = fraction.astype(np.float32)
        self._has_pixels = has_pixels
        self._blur: list[float] = []
        self.problems: dict[int, str] = {}  # row of a tile that could not be decoded whole -> what of it

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._file = stack.enter_context(new_h5(self.path))
            _write_root(self._file, self.meta)
            _write_array(self._file, "coords", self._coords)
            self._file["coords"].attrs.update(coords_attrs(self.meta))
            _write_array(self._file, "tissue_fraction", self._tissue_fraction)
            self._pixels = _PixelWriter(self._file.create_group("pixels", track_order=True)) if self._has_pixels else None
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def blur(self) -> np.ndarray:
        """float32: the blur of each tile that was added."""
        return np.array(self._blur, np.float32)

    def add_tile(self, data: bytes, *, blur: float = math.nan, problem: str = "") -> None:
        """Add the next tile, JPEG or PNG. blur: 0 sharp to 1 blurred. problem: why it could not be decoded whole.

        Raises OSError where what was written before did not arrive on the disk.
        """
        if self._pixels is None:
            raise ValueError(f"{self.path}: takes no tiles, or none after its groups")
        self._file.check()
        self._pixels.add(data)
        if problem:
            self.problems[len(self._blur)] = problem
        self._blur.append(blur)

    def add_group(self, name: str, content: GroupContent) -> None:
        """Add a group, or a dataset at the root, as `replace_groups` takes them."""
        self._finish_pixels()
        write_group(self._file, name, content)

    def _finish_pixels(self) -> None:
        if self._pixels is not None:
            self._pixels.finish()
            self._pixels = None
            if len(self._blur) != len(self._coords):
                raise ValueError(f"{len(self._blur)} tiles of pixels for {len(self._coords)} coords")

    def _finish(self, error: type[BaseException] | None, *_: object) -> None:
        """Write what is left where the block ended well."""
        if error is not None:
            return
        self._finish_pixels()
        if self.problems:
            self.add_group("bad_tiles", np.array(list(self.problems), np.int64))
        if self.meta.stamp is not None and source_stamp(self.meta.source) != self.meta.stamp:
            raise UserError(
                f"{display_path(self.meta.source)}: changed while it was read: "
                "run the same command again when it stays as it is"
            )


def write_slide_file(
    path: Path,
    *,
    meta: SlideMeta,
    coords: np.ndarray,
    tissue_fraction: np.ndarray | None = None,
    pixels: Iterable[bytes] | None = None,
    groups: Mapping[str, GroupContent] | None = None,
) -> None:
    """Write one slide file from what is there as a whole; see `SlideFileWriter`.

    pixels: N encoded tiles (JPEG or PNG) in the order of coords, consumed as a stream; None: the slide stays the pixel source.
    groups: more groups, as `replace_groups` takes them. N = 0 is valid.
    """
    with SlideFileWriter(path, meta, coords, tissue_fraction, has_pixels=pixels is not None) as out:
        for tile in pixels or ():
            out.add_tile(tile)
        for name, content in (groups or {}).items():
            out.add_group(name, content)


def coords_attrs(meta: SlideMeta) -> dict[str, Any]:
    """The attributes of /coords: what TRIDENT reads, and mpp."""
    return {
        "patch_size": int(meta.patch_px),
        "patch_size_level0": round(meta.size_l0),
        "level0_magnification": 10.0 / meta.mpp_level0,
        "target_magnification": 10.0 / meta.mpp,
        "overlap": int(meta.overlap_px),
        "name": meta.slide_id,
        "level0_width": int(meta.width_l0),
        "level0_height": int(meta.height_l0),
        "mpp": float(meta.mpp),
        "mpp_level0": float(meta.mpp_level0),
    }


def replace_groups(
    path: Path, groups: Mapping[str, GroupContent], *, root_attrs: Mapping[str, Any] | None = None, remedy: str = REMEDY
) -> None:
    """Add, replace or (content None) remove top-level groups of an HDF5 file, crash-safe.

    groups: name -> {dataset name: array or list of str, group name: {...}, "attrs": {...}}. A root dataset is given as
    an array or as (array, attrs). Everything else is copied to a new file beside the old one, which then takes its name;
    the old file's space is not carried along. Copies keep their checksums: what was damaged stays told. Raises DamagedError,
    with the remedy, where HDF5 cannot read what is to be copied.
    """
    with new_h5(path, mark=not was_touched(path)) as new, CheckedFile(path, lambda _: remedy) as old:
        with old.reading("", "its attributes"):
            before, changed = dict(old.h5.attrs), dict(root_attrs or {})
            kept = {key: value for key, value in attr_checksums(old.h5, before).items() if key not in changed}
        new.attrs.update({key: value for key, value in (before | changed).items() if key not in OWN_ATTRS})
        write_attr_checksums(new, kept)
        with old.reading("", "its groups"):
            names = list(old.h5)
        for name in new.checked(names):
            if name not in groups:
                with old.reading(name, f"/{name}"):
                    old.h5.copy(name, new)
        for name, content in groups.items():
            write_group(new, name, content)


def write_group(file: h5py.Group, name: str, content: GroupContent) -> None:
    """Write one group (a mapping, which may hold others) or one dataset (an array, or one with attrs); None writes nothing."""
    if content is None:
        return
    if isinstance(content, Mapping):
        group = file.create_group(name, track_order=True)
        if name == "polygon":
            content = {**content, CRC_ATTR: outline_crc32s(content)}
        for key, value in content.items():
            if key == "attrs":
                _write_attrs(group, value)
            elif isinstance(value, Mapping):
                write_group(group, key, value)
            else:
                _write_array(group, key, value)
        return
    array, attrs = content if isinstance(content, tuple) else (content, {})
    _write_array(file, name, array)
    _write_attrs(file[name], attrs)


def outline_crc32s(outlines: Mapping[str, Any]) -> np.ndarray:
    """CRC-32 of each outline, uint32 (M,): they are read one by one. See `outline_crc32`."""
    xy, ring_offsets, offsets = (np.ascontiguousarray(outlines[name]) for name in ("xy", "ring_offsets", "offsets"))
    rows = pairwise(offsets.tolist())
    return np.array([outline_crc32(xy, ring_offsets[first : stop + 1]) for first, stop in rows], dtype=np.uint32)


def outline_crc32(xy: np.ndarray, ends: np.ndarray, start: int = 0) -> int:
    """CRC-32 of one outline. xy: float32 (k, 2), from position `start` on; ends: int64, of its rings in all of xy."""
    head = crc32(ends.view(np.uint8))
    if not len(ends):
        return head
    return crc32(xy[int(ends[0]) - start : int(ends[-1]) - start].reshape(-1).view(np.uint8), head)


def _write_root(file: h5py.File, meta: SlideMeta) -> None:
    parameters, digest = parameters_hash(meta.parameters)
    source = absolute(Path(meta.source))
    size, mtime_ns = source_stamp(source) if meta.stamp is None else meta.stamp
    file.attrs.update(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "slide_id": meta.slide_id,
            "patient_id": meta.patient_id,
            "source": display_path(source),
            "source_size": size,
            "source_mtime_ns": mtime_ns,
            "parameters": parameters,
            "parameters_sha256": digest,
            "software_version": software_version(),
            "bounds_x": int(meta.bounds_xy[0]),
            "bounds_y": int(meta.bounds_xy[1]),
        }
    )


def _write_attrs(node: h5py.Group | h5py.Dataset, attrs: Mapping[str, Any]) -> None:
    for key, value in attrs.items():
        is_names = isinstance(value, list | tuple) and (not value or isinstance(value[0], str))
        if is_names:
            node.attrs.create(key, np.array(list(value), dtype=object), shape=(len(value),), dtype=h5py.string_dtype())
        else:
            node.attrs[key] = value


def _write_array(group: h5py.Group, name: str, value: Any) -> None:
    """One dataset with its checksum: small ones in one piece, others in chunks of whole rows that hold about 1 MiB."""
    is_text = isinstance(value, list | tuple) and (not value or isinstance(value[0], str))
    array = np.asarray(value, dtype=object) if is_text else np.asarray(value)
    if array.dtype.kind in "OUS":
        array = array.astype(object)
        dtype, item_bytes = h5py.string_dtype(), 16  # HDF5 stores a pointer per string
    else:
        dtype, item_bytes = array.dtype, array.dtype.itemsize
    row_bytes = item_bytes * int(np.prod(array.shape[1:], dtype=np.int64))
    chunks = None
    if array.ndim and row_bytes and row_bytes * len(array) > CHUNK_BYTES:
        chunks = (min(len(array), max(2, CHUNK_BYTES // row_bytes)), *array.shape[1:])
    is_picture = array.dtype == np.uint8 and array.ndim == 2  # a mask: nothing else here is worth compressing
    packed = "gzip" if is_picture else None
    dataset = group.create_dataset(name, data=array, dtype=dtype, chunks=chunks, compression=packed, track_order=True)
    dataset.attrs[CRC_ATTR] = np.uint32(value_crc32(array))


class _PixelWriter:
    """The group /pixels: encoded tiles laid end to end, about 1 MiB of them held back; their offsets and checksums."""

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        self._lengths: list[int] = []
        self._crc32s: list[int] = []
        self._buffer = bytearray()
        self._data: h5py.Dataset | None = None

    def add(self, tile: bytes) -> None:
        self._lengths.append(len(tile))
        self._crc32s.append(crc32(tile))
        self._buffer += tile
        if len(self._buffer) >= CHUNK_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is held back, then offsets and checksums."""
        if self._buffer or self._data is None:
            self._flush()
        offsets = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        _write_array(self._group, "offsets", offsets)
        _write_array(self._group, CRC_ATTR, np.array(self._crc32s, dtype=np.uint32))

    def _flush(self) -> None:
        block = np.frombuffer(bytes(self._buffer), dtype=np.uint8)
        self._buffer.clear()
        if self._data is None:
            chunk = (min(max(len(block), 1), CHUNK_BYTES),)
            self._data = self._group.create_dataset("data", data=block, chunks=chunk, maxshape=(None,))
            return
        start = self._data.shape[0]
        self._data.resize((start + len(block),))
        self._data[start:] = block
