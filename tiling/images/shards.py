"""Whole images as tiles, many to a slide file: `import --fit crop` and `--fit squash`.

Image i of a shard is tile i of a grid laid out row by row in level-0 pixels that exist nowhere else. The group /images of
the file tells where each tile comes from: `name` (N,) str, the image's path below the folder that was given, and `size`
(N, 2) int32, its width and height; attrs `fit`, `mpp_nominal` (True: micrometres mean nothing here) and `failed`, how many
images of the shard could not be read.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.images.boxes import (
    BoxGroups,
    ImageObjects,
    TileObjects,
    box_groups,
    clip_objects,
    join_tiles,
    place_objects,
    xml_boxes,
)
from tiling.images.fit import FittedImage, fit_map, probe_image, read_as_tile
from tiling.images.listing import ImageItem, box_file
from tiling.images.settings import NOMINAL_MPP, ImportSettings, read_import
from tiling.jobs.outcome import ItemResult, Note, Outcome, describe_error, notes_of
from tiling.slide_file.write import Columns, SlideMeta, source_stamp, write_slide_file
from tiling.storage.locks import lock_file
from tiling.storage.paths import printable
from tiling.storage.slide_id import safe_id
from tiling.tiles.run import THUMBNAIL_SIDE_PX, thumbnail_group


@dataclass(frozen=True)
class Shard:
    """Images of one slide file. mpp: of its tiles, None where there is no scale. coco: objects of each image, if any."""

    slide_id: str
    source: Path
    mpp: float | None
    items: tuple[ImageItem, ...]
    coco: tuple[ImageObjects | None, ...]

    def __str__(self) -> str:
        return self.slide_id

    @property
    def patient_id(self) -> str:
        """The patient of all its images; may be empty."""
        return self.items[0].patient_id

    @property
    def columns(self) -> int:
        """The number of tiles in a row of the grid."""
        return ceil(sqrt(len(self.items)))

    @property
    def rows(self) -> int:
        """The number of rows of the grid."""
        return ceil(len(self.items) / self.columns)

    def coords(self, size_px: int) -> np.ndarray:
        """int64 (n, 2): the place of each image, row by row."""
        at = np.arange(len(self.items), dtype=np.int64)
        return np.stack([at % self.columns, at // self.columns], axis=1) * size_px

    def file(self, out: Path) -> Path:
        """The slide file in the output folder."""
        return out / f"{self.slide_id}.h5"

    def parameters(self, settings: ImportSettings) -> dict[str, Any]:
        """All that changes the slide file, with size and time of each image and box file."""
        digest = hashlib.sha256()
        for item in self.items:
            xml = box_file(settings.boxes, item)
            stamps = (*source_stamp(item.path), *(source_stamp(xml) if xml is not None else ()))
            digest.update(f"{item.key}\0{stamps}\n".encode())
        source = {"fit": settings.fit, "mpp_nominal": self.mpp is None, "boxes": settings.boxes is not None}
        source |= {"patient_id": self.patient_id, "images_sha256": digest.hexdigest()}
        return settings.parameters(NOMINAL_MPP if self.mpp is None else self.mpp, source)


@dataclass(frozen=True)
class ShardTile:
    """One image of a shard that could be read. row: its number in the shard; objects: None where it has no boxes."""

    row: int
    key: str
    fitted: FittedImage
    objects: TileObjects | None


def import_shards(
    items: Sequence[ImageItem],
    coco: Mapping[Path, ImageObjects],
    out: Path,
    settings: ImportSettings,
    per_shard: int,
    run: Callable[..., list[Outcome]],
) -> tuple[list[Outcome], list[tuple[ImageItem, str, int, int]]]:
    """Write a slide file per shard; return outcomes (shards, then failed images), and image, slide_id, x, y of every tile.

    run: `run_cohort` with its options.
    """
    mpps, failed = (None, []) if settings.nominal else fitted_mpps(items, settings)
    shards = plan_shards(items, coco, mpps, per_shard)
    refuse_leftovers(out, shards)
    outcomes = run(shards, partial(import_shard, out=out, settings=settings), wrote=partial(Shard.file, out=out))
    rows = []
    for shard, outcome in zip(shards, outcomes, strict=True):
        coords = shard.coords(settings.size_px).tolist()
        rows += [(shard.items[i], shard.slide_id, *coords[i]) for i in outcome.info.pop("present", ())]
    unreadable = [image for outcome in outcomes for image in outcome.info.pop("bad", ())]
    return [*outcomes, *failed, *(Outcome(key, ok=False, error=error) for key, error in unreadable)], rows


def plan_shards(
    items: Sequence[ImageItem], coco: Mapping[Path, ImageObjects], mpps: Mapping[Path, float] | None, per_shard: int
) -> list[Shard]:
    """Divide images into shards of at most `per_shard` of one folder, one patient and one mpp, named `<folder>-<number>`.

    mpps: mpp of the tile of each image (images without are left out); None where there is no scale.
    """
    groups: dict[tuple[str, str, float | None], list[ImageItem]] = {}
    for item in items:
        if mpps is None or item.path in mpps:
            mpp = None if mpps is None else round(mpps[item.path], 4)
            groups.setdefault((item.folder, item.patient_id, mpp), []).append(item)
    count: dict[str, int] = {}
    shards = []
    for (folder, _, mpp), members in groups.items():
        for start in range(0, len(members), per_shard):
            part = tuple(members[start : start + per_shard])
            number = count[folder] = count.get(folder, -1) + 1
            boxes = tuple(coco.get(item.path) for item in part)
            shards.append(Shard(safe_id(printable(f"{folder}-{number:04d}")), part[0].path.parent, mpp, part, boxes))
    return shards


class NoMppError(UserError):
    """An image states no resolution."""


def fitted_mpps(items: Sequence[ImageItem], settings: ImportSettings) -> tuple[dict[Path, float], list[Outcome]]:
    """Compute the mpp of each image's tile: the image's (given, the manifest's, its tags') times the factor of its resizing.

    Images without one are failed outcomes. Raises UserError where no image has any.
    """
    mpps: dict[Path, float] = {}
    errors: list[tuple[str, UserError]] = []
    for item in items:
        try:
            (width, height), stated = probe_image(item.path)
            mpp = next((value for value in (settings.mpp, item.mpp, stated.value) if value is not None), None)
            if mpp is None:
                because = f" ({stated.note})" if stated.note else ""
                ways = "give --mpp, column mpp in a --manifest, or --no-mpp for photographs"
                raise NoMppError(f"{item.path}: no mpp in its tags{because}: {ways}")
            if settings.fit == "squash" and width != height:
                raise UserError(f"{item.path}: {width} x {height} squashed has two mpp: take --fit crop, or --no-mpp")
            mpps[item.path] = mpp * min(width, height) / settings.size_px
        except UserError as error:
            errors.append((item.key, error))
    if not mpps:
        first = min((error for _, error in errors), key=lambda error: not isinstance(error, NoMppError))
        raise UserError(f"none of the {len(items)} images can be imported with a scale; for instance {first}")
    return mpps, [Outcome(key, ok=False, error=str(error)) for key, error in errors]


def refuse_leftovers(out: Path, shards: Sequence[Shard]) -> None:
    """Raise UserError where `out` holds shards of the same folders that this import would not write: images twice."""
    wanted = {shard.slide_id for shard in shards}
    folders = {shard.slide_id.rpartition("-")[0] for shard in shards}
    for path in sorted(out.glob("*.h5")):
        folder, _, number = path.stem.rpartition("-")
        if folder in folders and path.stem not in wanted and re.fullmatch(r"\d{4,}", number):
            raise UserError(
                f"{path}: of an earlier import with other images or another --shard: delete it, or choose another --out"
            )


def import_shard(shard: Shard, out: Path, settings: ImportSettings) -> ItemResult:
    """Write one slide file; info: tiles, objects, boxes, outside, result, present (rows of its images), bad (image, error).

    A shard is done when its file has the same parameters, images and boxes (by size and time) and no image failed.
    """
    path = shard.file(out)
    with lock_file(path):
        parameters, existing = shard.parameters(settings), read_import(path)
        if existing is not None and existing.has_parameters(parameters) and not existing.failed:
            existing.result.info["present"] = list(range(len(shard.items)))
            return existing.result
        tiles, bad = _read_tiles(shard, settings)
        stored = BoxGroups()
        if tiles and settings.has_boxes:
            scaled_images = sum(tile.objects is not None and bool(tile.objects.scaled) for tile in tiles)
            stored = box_groups(join_tiles([tile.objects for tile in tiles]), parameters["mpp"], scaled_images)
        if tiles:
            _write(path, shard, settings, parameters, tiles, stored.groups)
    had_boxes = existing is not None and existing.has_boxes and not settings.has_boxes
    gone = "its boxes are gone with the old tiles: run annotate or propose again" if had_boxes else ""
    info = {"tiles": len(tiles), "boxes": 0, "objects": 0, "outside": 0} | stored.info
    info |= {"present": [tile.row for tile in tiles], "bad": bad}
    return ItemResult(info, [*_notes(shard, settings, tiles), *notes_of(gone), *stored.notes])


def _read_tiles(shard: Shard, settings: ImportSettings) -> tuple[list[ShardTile], list[tuple[str, str]]]:
    """Make a tile of each image, with its objects; return the tiles, and key and error of images that cannot be read."""
    tiles, bad = [], []
    for row, (item, drawn) in enumerate(zip(shard.items, shard.coco, strict=True)):
        try:
            fitted = read_as_tile(item.path, settings.fit, settings.size_px)
            xml = box_file(settings.boxes, item) if drawn is None else None
            drawn = drawn if xml is None else xml_boxes(xml)
            objects = None if drawn is None else _objects_in_tile(drawn, item, fitted, settings)
            tiles.append(ShardTile(row, item.key, fitted, objects))
        except Exception as error:  # one bad image must not stop its shard
            bad.append((item.key, describe_error(error)))
    return tiles, bad


def _objects_in_tile(drawn: ImageObjects, item: ImageItem, fitted: FittedImage, settings: ImportSettings) -> TileObjects:
    """Move the objects of an image, whole, to pixels of its tile, and clip their boxes."""
    table, scaled = place_objects(drawn, item.path, fitted.size)
    table = table.moved(fit_map(fitted.size, settings.fit, settings.size_px).to_tile)
    return TileObjects(table, clip_objects(table, np.zeros((1, 2)), settings.size_px, settings.polygons), scaled)


def _write(
    path: Path,
    shard: Shard,
    settings: ImportSettings,
    parameters: dict[str, Any],
    tiles: Sequence[ShardTile],
    boxes: Mapping[str, Columns],
) -> None:
    size, mpp = settings.size_px, float(parameters["mpp"])
    meta = SlideMeta(
        slide_id=shard.slide_id,
        source=shard.source,
        width_l0=shard.columns * size,
        height_l0=shard.rows * size,
        mpp=mpp,
        mpp_level0=mpp,
        patch_px=size,
        patient_id=shard.patient_id,
        parameters=parameters,
    )
    failed = len(shard.items) - len(tiles)
    images: Columns = {
        "name": [tile.key for tile in tiles],
        "size": np.array([tile.fitted.size for tile in tiles], dtype=np.int32),
        "attrs": {"fit": settings.fit, "mpp_nominal": shard.mpp is None, "failed": failed},
    }
    write_slide_file(
        path,
        meta=meta,
        coords=shard.coords(size)[[tile.row for tile in tiles]],
        pixels=(tile.fitted.jpeg for tile in tiles),
        groups={"thumbnail": _mosaic(shard, size, tiles), "images": images, **boxes},
    )


def _mosaic(shard: Shard, size_px: int, tiles: Sequence[ShardTile]) -> Columns:
    """Draw the grid of tiles, small: the group /thumbnail."""
    import simplejpeg
    from PIL import Image

    cell = max(1, min(size_px, THUMBNAIL_SIDE_PX // shard.columns))
    picture = np.full((shard.rows * cell, shard.columns * cell, 3), 255, np.uint8)
    for tile in tiles:
        y, x = (side * cell for side in divmod(tile.row, shard.columns))
        small = simplejpeg.decode_jpeg(tile.fitted.jpeg, colorspace="RGB", min_width=cell, min_height=cell, min_factor=2)
        picture[y : y + cell, x : x + cell] = np.asarray(Image.fromarray(small).resize((cell, cell), Image.Resampling.BOX))
    return thumbnail_group(picture, None, size_px / cell)


def _notes(shard: Shard, settings: ImportSettings, tiles: Sequence[ShardTile]) -> list[Note]:
    """Count images that are in no manifest, have no boxes, or are shown in part only."""
    notes = []
    if unlisted := sum(not item.listed for item in shard.items):
        notes.append(Note("images are not in the manifest", unlisted))
    if settings.has_boxes and (bare := sum(tile.objects is None for tile in tiles)):
        notes.append(Note(f"images have no {'boxes in the COCO file' if settings.coco else 'box file'}", bare))
    parts = Counter(tile.fitted.note for tile in tiles if tile.fitted.note)
    return notes + [Note(f"{note} ({count} images)" if count > 1 else note) for note, count in parts.items()]
