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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annotations.errors import UserError
from tiling.images.boxes import ImageObjects, box_groups, clipped, joined, placed, stored_result, xml_boxes
from tiling.images.fit import QUALITY, FitMap, FittedImage, fit_map, probe_image, read_as_tile
from tiling.images.listing import ImageItem, box_file
from tiling.jobs.outcome import ItemResult, Note, Outcome, describe_error, notes_of
from tiling.jobs.run import run_cohort
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import FORMAT_VERSION, GroupContent, SlideMeta, parameters_hash, source_stamp, write_slide_file
from tiling.storage.locks import lock_file
from tiling.storage.paths import printable
from tiling.storage.slide_id import safe_id
from tiling.storage.touched import was_touched
from tiling.tiles.resume import has_boxes
from tiling.tiles.run import THUMBNAIL_SIDE_PX, _overview

if TYPE_CHECKING:
    from annotations.geometry.clip import TileBoxes
    from annotations.objects import ObjectTable

NOMINAL_MPP = 1.0  # what a file says where there is no scale; its parameters and /images say so too


@dataclass(frozen=True)
class ShardSettings:
    """fit: crop or squash. boxes: folder of XML files. coco: sha256 of the COCO file, empty without one.

    mpp: micrometres per pixel of every image, None to look further. nominal: the images have no scale. polygons: keep the
    outlines of the boxes.
    """

    fit: str
    size_px: int
    boxes: Path | None = None
    coco: str = ""
    mpp: float | None = None
    nominal: bool = False
    polygons: bool = False

    @property
    def boxed(self) -> bool:
        return self.boxes is not None or bool(self.coco)


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
        return self.items[0].patient_id

    def coords(self, size_px: int) -> np.ndarray:
        """int64 (n, 2): the place of each image, row by row."""
        columns = self.columns
        at = np.arange(len(self.items), dtype=np.int64)
        return np.stack([at % columns, at // columns], axis=1) * size_px

    @property
    def columns(self) -> int:
        return ceil(sqrt(len(self.items)))


def import_shards(
    items: Sequence[ImageItem],
    coco: Mapping[Path, ImageObjects],
    out: Path,
    settings: ShardSettings,
    per_shard: int,
    how: dict[str, Any],
) -> tuple[list[Outcome], list[tuple[ImageItem, str, int, int]]]:
    """A slide file per shard; outcomes (shards, then failed images), and image, slide_id, x, y of every tile.

    how: of `run_cohort`.
    """
    mpps, failed = (None, []) if settings.nominal else fitted_mpps(items, settings)
    shards = plan_shards(items, coco, mpps, per_shard)
    refuse_leftovers(out, shards)
    work = partial(import_shard, out=out, settings=settings)
    outcomes = run_cohort(shards, work, name=Shard.__str__, wrote=partial(_file_of, out=out), **how)
    rows = []
    for shard, outcome in zip(shards, outcomes, strict=True):
        coords = shard.coords(settings.size_px).tolist()
        rows += [(shard.items[i], shard.slide_id, *coords[i]) for i in outcome.info.pop("present", ())]
    return [*outcomes, *failed, *failed_images(outcomes)], rows


def plan_shards(
    items: Sequence[ImageItem], coco: Mapping[Path, ImageObjects], mpps: Mapping[Path, float] | None, per_shard: int
) -> list[Shard]:
    """Shards of at most `per_shard` images of one folder, one patient and one mpp, named `<folder>-<number>`.

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


def fitted_mpps(items: Sequence[ImageItem], settings: ShardSettings) -> tuple[dict[Path, float], list[Outcome]]:
    """mpp of the tile of each image: the image's (given, the manifest's, its tags') times the factor it is resized by.

    Images without one are failed outcomes. Raises UserError where no image has any.
    """
    mpps: dict[Path, float] = {}
    errors: list[tuple[str, UserError]] = []
    for item in items:
        try:
            (width, height), found = probe_image(item.path)
            mpp = next((value for value in (settings.mpp, item.mpp, found.value) if value is not None), None)
            if mpp is None:
                because = f" ({found.note})" if found.note else ""
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
    """Raises UserError where `out` holds shards of the same folders that this import would not write: images twice."""
    wanted = {shard.slide_id for shard in shards}
    folders = {shard.slide_id.rpartition("-")[0] for shard in shards}
    for path in sorted(out.glob("*.h5")):
        folder, _, number = path.stem.rpartition("-")
        if folder in folders and path.stem not in wanted and re.fullmatch(r"\d{4,}", number):
            raise UserError(
                f"{path}: of an earlier import with other images or another --shard: delete it, or choose another --out"
            )


def import_shard(shard: Shard, out: Path, settings: ShardSettings) -> ItemResult:
    """Write one slide file; info: tiles, objects, boxes, outside, result, present (rows of its images), bad (image, error).

    A shard is done when its file has the same parameters, images and boxes (by size and time) and no image failed.
    """
    path = _file_of(shard, out)
    with lock_file(path):
        return _imported(shard, path, settings)


def _file_of(shard: Shard, out: Path) -> Path:
    return out / f"{shard.slide_id}.h5"


def _imported(shard: Shard, path: Path, settings: ShardSettings) -> ItemResult:
    parameters = _parameters(shard, settings)
    if (done := _done(path, parameters)) is not None:
        done.info["present"] = list(range(len(shard.items)))
        return done
    tiles: list[FittedImage] = []
    objects: list[tuple[ObjectTable, TileBoxes] | None] = []
    present, bad, scaled = [], [], 0
    for i, item in enumerate(shard.items):
        try:
            tile = read_as_tile(item.path, settings.fit, settings.size_px)
            drawn = shard.coco[i] or _box_file(item, settings)
            table, boxes, remark = (None, None, "") if drawn is None else _placed(drawn, item, tile, settings)
            objects.append(None if table is None or boxes is None else (table, boxes))
            scaled += bool(remark)
        except Exception as error:  # one bad image must not stop its shard
            bad.append((item.key, describe_error(error)))
            continue
        tiles.append(tile)
        present.append(i)
    counts: dict[str, Any] = {"tiles": len(tiles), "boxes": 0, "objects": 0, "outside": 0}
    notes = [*_notes(shard, settings, objects), *notes_of(*_left_out(tiles))]
    if not settings.boxed and has_boxes(path):
        notes.append(Note("its boxes are gone with the old tiles: run annotate or propose again"))
    if tiles:
        box_counts, box_notes = _write(path, shard, settings, parameters, present, tiles, objects, len(bad), scaled)
        counts |= box_counts
        notes += box_notes
    return ItemResult({**counts, "present": present, "bad": bad}, notes)


def failed_images(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """A failed outcome for each image that a shard left out."""
    bad = [pair for outcome in outcomes for pair in outcome.info.pop("bad", ())]
    return [Outcome(key, ok=False, error=error) for key, error in bad]


def _parameters(shard: Shard, settings: ShardSettings) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether a file is up to date."""
    digest = hashlib.sha256()
    for item in shard.items:
        xml = box_file(settings.boxes, item) if settings.boxes is not None else None
        stamps = (*source_stamp(item.path), *(source_stamp(xml) if xml is not None else ()))
        digest.update(f"{item.key}\0{stamps}\n".encode())
    more = {"polygons": True} if settings.polygons else {}
    return more | {
        "format_version": FORMAT_VERSION,
        "import": 1,
        "fit": settings.fit,
        "mpp": shard.mpp if shard.mpp is not None else NOMINAL_MPP,
        "mpp_nominal": shard.mpp is None,
        "size_px": settings.size_px,
        "quality": QUALITY,
        "coco_sha256": settings.coco,
        "boxes": settings.boxes is not None,
        "patient_id": shard.patient_id,
        "images_sha256": digest.hexdigest(),
    }


def _done(path: Path, parameters: dict[str, Any]) -> ItemResult | None:
    if not path.exists():
        return None
    try:
        with SlideFile(path) as file:
            if was_touched(path):
                file.check()
            if file.attrs["parameters_sha256"] != parameters_hash(parameters)[1] or int(file.group_attrs("images")["failed"]):
                return None
            return stored_result(file)
    except (UserError, OSError, KeyError, RuntimeError):
        return None  # damaged, or not ours: made anew


def _box_file(item: ImageItem, settings: ShardSettings) -> ImageObjects | None:
    path = box_file(settings.boxes, item) if settings.boxes is not None else None
    return None if path is None else xml_boxes(path)


def _placed(
    drawn: ImageObjects, item: ImageItem, tile: FittedImage, settings: ShardSettings
) -> tuple[ObjectTable, TileBoxes, str]:
    """The objects of an image in pixels of its tile, whole; their boxes, clipped; and a remark where they were scaled."""
    table, scaled = placed(drawn, item.path, tile.size)
    part: FitMap = fit_map(tile.size, settings.fit, settings.size_px)
    table = table.moved(part.to_tile)
    return table, clipped(table, np.zeros((1, 2)), settings.size_px, settings.polygons), scaled


def _write(
    path: Path,
    shard: Shard,
    settings: ShardSettings,
    parameters: dict[str, Any],
    present: list[int],
    tiles: list[FittedImage],
    objects: list[tuple[ObjectTable, TileBoxes] | None],
    failed: int,
    scaled: int,
) -> tuple[dict[str, Any], list[Note]]:
    """Write the slide file; return the numbers and notes of `box_groups`."""
    size, mpp = settings.size_px, float(parameters["mpp"])
    groups: dict[str, GroupContent] = {
        "thumbnail": _mosaic(shard, settings, present, tiles),
        "images": {
            "name": [shard.items[i].key for i in present],
            "size": np.array([tile.size for tile in tiles], dtype=np.int32),
            "attrs": {"fit": settings.fit, "mpp_nominal": shard.mpp is None, "failed": failed},
        },
    }
    counts: dict[str, Any] = {}
    notes: list[Note] = []
    if settings.boxed:
        boxes, counts, notes = box_groups(*joined(objects), mpp, scaled_images=scaled)
        groups |= boxes
    meta = SlideMeta(
        slide_id=shard.slide_id,
        source=shard.source,
        width_l0=shard.columns * size,
        height_l0=ceil(len(shard.items) / shard.columns) * size,
        mpp=mpp,
        mpp_level0=mpp,
        patch_px=size,
        patient_id=shard.patient_id,
        parameters=parameters,
    )
    write_slide_file(path, meta=meta, coords=shard.coords(size)[present], pixels=(tile.jpeg for tile in tiles), groups=groups)
    return counts, notes


def _mosaic(shard: Shard, settings: ShardSettings, present: list[int], tiles: list[FittedImage]) -> dict[str, GroupContent]:
    """The group /thumbnail: the grid of tiles, small."""
    import simplejpeg
    from PIL import Image

    cell = max(1, min(settings.size_px, THUMBNAIL_SIDE_PX // shard.columns))
    rows = ceil(len(shard.items) / shard.columns)
    picture = np.full((rows * cell, shard.columns * cell, 3), 255, np.uint8)
    for i, tile in zip(present, tiles, strict=True):
        y, x = (side * cell for side in divmod(i, shard.columns))
        small = simplejpeg.decode_jpeg(tile.jpeg, colorspace="RGB", min_width=cell, min_height=cell, min_factor=2)
        picture[y : y + cell, x : x + cell] = np.asarray(Image.fromarray(small).resize((cell, cell), Image.Resampling.BOX))
    return dict(_overview(picture, None, settings.size_px / cell))


def _left_out(tiles: Sequence[FittedImage]) -> list[str]:
    """Remarks on parts of images that are left out, each with the number of images."""
    notes = Counter(tile.note for tile in tiles if tile.note)
    return [f"{note} ({count} images)" if count > 1 else note for note, count in notes.items()]


def _notes(shard: Shard, settings: ShardSettings, objects: Sequence[object]) -> list[Note]:
    notes = []
    if unlisted := sum(not item.listed for item in shard.items):
        notes.append(Note("images are not in the manifest", unlisted))
    if settings.boxed and (without := sum(boxes is None for boxes in objects)):
        notes.append(Note(f"images have no {'boxes in the COCO file' if settings.coco else 'box file'}", without))
    return notes
