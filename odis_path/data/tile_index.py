"""Index the tiles of a folder of slide files, hold patients out, and keep a bounded number of files open."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.slide_file.read import SlideFile, list_slide_files
from tiling.slide_file.window import TileWindows

_MOST_OPEN = 512


def open_files() -> int:
    """Return how many slide files a process may keep open: each may hold its slide open too, and others need descriptors."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 64
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if soft < 0 else max(8, min(_MOST_OPEN, soft // 4))


class OpenSlides:
    """Slide files kept open, the least recently used closed first; each process opens its own."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, SlideFile] = OrderedDict()
        self._groups: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[int, TileWindows] = {}
        self._pid = os.getpid()
        self._most = open_files()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict(), "_groups": {}, "_windows": {}, "_pid": -1, "_most": self._most}

    def __getitem__(self, slide: int) -> SlideFile:
        if self._pid != os.getpid():  # a forked worker must not read through its parent's handles
            self._open, self._windows, self._pid = OrderedDict(), {}, os.getpid()
        if slide in self._open:
            self._open.move_to_end(slide)
            return self._open[slide]
        if len(self._open) >= self._most:
            oldest, file = self._open.popitem(last=False)
            self._windows.pop(oldest, None)
            file.close()
        self._open[slide] = SlideFile(self.paths[slide])
        return self._open[slide]

    def close(self) -> None:
        """Close them all; the next look opens them again."""
        for file in self._open.values():
            file.close()
        self._open, self._windows = OrderedDict(), {}

    def windows(self, slide: int) -> TileWindows:
        """The windows of a slide file that is open."""
        file = self[slide]
        if slide not in self._windows:
            self._windows[slide] = TileWindows(file)
        return self._windows[slide]

    def box_groups(self, slide: int) -> tuple[np.ndarray, np.ndarray]:
        """Kind uint8 (M,) and label int16 (M,) of every box row of a slide file."""
        if slide not in self._groups:
            file = self[slide]
            objects, rows = file.objects_table(ids=False), file.boxes_table()["object"]
            self._groups[slide] = (objects["kind"][rows], objects["label"][rows])
        return self._groups[slide]


@dataclass(frozen=True)
class TileIndex:
    """The tiles of a cohort: paths of the slide files, slide and row of each tile, patient of each slide."""

    paths: list[Path]
    slide: np.ndarray  # int32 (n,)
    row: np.ndarray  # int32 (n,)
    slide_ids: list[str]
    patients: list[str]  # one a slide; the slide id where the patient is not known
    tile_px: int
    mpp: float

    def __len__(self) -> int:
        return len(self.slide)

    def of_patients(self, patients: set[str], *, inside: bool) -> TileIndex:
        """Return the tiles of these patients, or of all others."""
        chosen = np.array([(p in patients) == inside for p in self.patients], dtype=bool)
        return self.rows(np.flatnonzero(chosen[self.slide]))

    def rows(self, keep: np.ndarray) -> TileIndex:
        """Return the tiles `keep`, int (m,)."""
        return TileIndex(self.paths, self.slide[keep], self.row[keep], self.slide_ids, self.patients, self.tile_px, self.mpp)


def index_tiles(folder: str | Path, *, need_boxes: np.ndarray | None = None, need_polygons: bool = False) -> TileIndex:
    """Index all tiles of a folder of slide files.

    need_boxes: uint8 kinds; only tiles with a box of one of them. need_polygons: boxes have outlines. Raises UserError where
    sizes or mpp differ between files, none holds a tile, or outlines are missing.
    """
    if not str(folder):
        raise UserError("data.tiles is empty: give the folder that `odis-path tile` wrote, for example data.tiles=tiles")
    paths = list_slide_files(Path(folder))
    slides, rows = [], []
    ids: list[str] = []
    patients: list[str] = []
    sizes: dict[tuple[int, float], str] = {}
    for number, path in enumerate(paths):
        with SlideFile(path) as file:
            tiles = np.arange(len(file), dtype=np.int32)
            if need_boxes is not None and len(tiles):
                tiles = tiles[_has_kind(file, need_boxes)]
            if need_polygons and not file.has_polygons and len(file.boxes_table()["object"]):
                raise UserError(
                    f"{path}: holds no polygons, which target.geometry=polygon needs: annotate with --polygons (or import)"
                )
            tiles = np.setdiff1d(tiles, file.bad_tiles).astype(np.int32)
            slides.append(np.full(len(tiles), number, np.int32))
            rows.append(tiles)
            ids.append(file.slide_id)
            patients.append(file.patient_id or file.slide_id)
            if len(file) and not file.has_pixels:
                file.check_source()  # known before training starts, not by a worker in its middle
            if len(file):
                sizes.setdefault((file.patch_size, round(file.mpp, 4)), path.name)
    if len(sizes) > 1:
        listed = "; ".join(f"{name}: {size} px at {mpp} mpp" for (size, mpp), name in sizes.items())
        raise UserError(f"{folder}: tiles of several sizes or resolutions ({listed}); tile them alike into one folder")
    if not sizes or not sum(map(len, rows)):
        raise UserError(f"{folder}: no tile{' with a box' if need_boxes is not None else ''} in its {len(paths)} slide files")
    (tile_px, mpp), _ = sizes.popitem()
    return TileIndex(paths, np.concatenate(slides), np.concatenate(rows), ids, patients, tile_px, mpp)


def _has_kind(file: SlideFile, kinds: np.ndarray) -> np.ndarray:
    """Tell which tiles hold a box of one of these kinds: bool (N,)."""
    table = file.boxes_table()
    if not len(table["object"]):
        return np.zeros(len(file), bool)
    fitting = np.isin(file.objects_table(ids=False)["kind"][table["object"]], kinds)
    return np.bincount(file.box_tiles[fitting], minlength=len(file)) > 0


def held_out_patients(index: TileIndex, share: float, named: list[str], seed: int) -> set[str]:
    """Patients kept out of pretraining: the named ones, else a seeded share of all (at least one where share > 0)."""
    patients = sorted(set(index.patients))
    if named:
        unknown = sorted(set(named) - set(patients))
        if unknown:
            raise UserError(f"data.holdout_patients: {', '.join(unknown)}: not among the patients {', '.join(patients[:8])}")
        return set(named)
    if share == 0 or len(patients) < 2:
        return set()
    count = min(len(patients) - 1, max(1, round(share * len(patients))))
    return set(np.random.default_rng([seed, 77]).permutation(patients)[:count].tolist())
