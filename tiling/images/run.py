"""Images that are tiles or fields of view already -> the slide files that `tile` writes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.boxes.summary import BoxOutcomes
from tiling.cohort.scan import listed
from tiling.grid import plan_grid
from tiling.images.boxes import (
    BoxGroups,
    BoxReport,
    ImageObjects,
    TileObjects,
    box_folder,
    box_groups,
    clip_objects,
    coco_boxes,
    place_objects,
    xml_boxes,
)
from tiling.images.fit import FITS, QUALITY, plain_jpeg, unreadable_image
from tiling.images.listing import TIFF_EXTENSIONS, ImageItem, apply_manifest, box_file, find_images
from tiling.images.settings import NOMINAL_MPP, ExistingImport, ImportSettings, read_import
from tiling.images.shards import import_shards
from tiling.jobs.outcome import ItemResult, Outcome, notes_of
from tiling.jobs.run import available_cpus, run_cohort
from tiling.slide_file.write import SlideMeta, replace_groups, source_stamp, write_slide_file
from tiling.storage.csv_file import write_csv_file
from tiling.storage.locks import lock_file, lock_settings
from tiling.storage.paths import expand_home
from tiling.tiles.resume import check_same_slide
from tiling.tiles.run import THUMBNAIL_SIDE_PX, output_folder, thumbnail_group
from tiling.wsi import codec
from tiling.wsi.backends.base import MAX_IMAGE_PIXELS
from tiling.wsi.backends.image import ImageReader
from tiling.wsi.level_view import SlideInfo
from tiling.wsi.mpp import Mpp, check_mpp
from tiling.wsi.patches import read_tiles
from tiling.wsi.slide import Slide

DEFAULT_SIZE_PX = 224
LARGEST_TILE_PX = 1024  # images of one square size up to this are taken to be tiles
DEFAULT_SHARD = 1000
POOL_FROM = 200  # an image takes milliseconds: fewer are not worth starting processes for, unless asked
SUB_IFDS = 330  # TIFF tag: pages beneath one
COUNTED = ("tiles", "boxes")  # keys of Outcome.info that are summed
LABEL_COLUMNS = ("slide_id", "x", "y", "label", "patient_id", "image")
LabelRow = tuple[ImageItem, str, int, int]  # image, slide_id, x, y


@dataclass(frozen=True)
class ImageTask:
    """An image to be imported, and its objects in a COCO file, if any."""

    item: ImageItem
    coco: ImageObjects | None

    def __str__(self) -> str:
        return self.item.slide_id

    def file(self, out: Path) -> Path:
        """The slide file in the output folder."""
        return out / f"{self.item.slide_id}.h5"

    def parameters(self, settings: ImportSettings, mpp: float) -> dict[str, Any]:
        """All that changes the slide file."""
        xml = box_file(settings.boxes, self.item)
        box_stamp = {} if xml is None else {"box_file": list(source_stamp(xml))}
        return settings.parameters(mpp, ({"mpp_nominal": True} if settings.nominal else {}) | box_stamp)


def import_images(
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    coco: Path | str | None = None,
    mpp: float | None = None,
    size: int | None = None,
    manifest: Path | str | None = None,
    workers: int | None = None,
    fit: str = "tiles",
    boxes: Path | str | None = None,
    no_mpp: bool = False,
    shard: int | None = None,
    scheduler: str | None = None,
    polygons: bool = False,
) -> BoxOutcomes:
    """Write slide files for images (IMAGE_EXTENSIONS); one outcome per slide file, and one per image that failed alone.

    images: a folder (searched recursively) or files. fit "tiles": each image is a slide file `<out>/<slide_id>.h5`, cut into
    whole tiles of `size` px from its top-left corner, at its own resolution; size None: the images' side where all are
    one square size up to 1024, else 224. fit "crop": each image is one tile, its centre square resized to `size` px (None:
    224); "squash": all of it resized to a square; the tiles of one folder go to files of up to `shard` images (None: 1000),
    `<out>/<folder>-<number>.h5`, and a manifest's slide_id is not used.
    mpp: micrometres per pixel of the images, before the manifest's and the files' own; the tiles of fit "crop" have it times
    the factor they are resized by. no_mpp: the images have no scale; the files say mpp 1 and that it is nominal.
    manifest: a CSV with the column image and any of patient_id, slide_id, mpp. coco: a COCO file, or boxes: a folder of
    PASCAL VOC style `<stem>.xml`; the objects go through the same map as the pixels and are clipped to the tiles. Where the
    COCO file states another size of an image, its objects are scaled, a box file is refused then. polygons: store the
    clipped outlines too (/boxes/polygon). Class folders one level below `images` are also written as labels,
    `<out>/labels.csv`. workers None: one per CPU, where there are many images. A file that is there with the same parameters
    and sources is skipped. Raises UserError for inputs that cannot be, and where another run imports there otherwise.
    """
    begun = perf_counter()
    _check_options(mpp, size, fit, coco, boxes, no_mpp, shard, polygons)
    items = [replace(item, path=item.path.absolute()) for item in find_images(images)]  # workers may run elsewhere
    items = items if manifest is None else apply_manifest(items, Path(manifest))
    report = BoxReport()
    drawn, digest = coco_boxes(items, Path(coco), report) if coco is not None else ({}, "")
    box_files = box_folder(items, Path(boxes)) if boxes is not None else None
    size = size or (default_size_px([item.path for item in items]) if fit == "tiles" else DEFAULT_SIZE_PX)
    settings = ImportSettings(fit, size, mpp, no_mpp, digest, box_files, polygons)
    folder = output_folder(Path(out))
    labelled = any(item.label for item in items)
    locked = {**asdict(settings), "manifest": manifest and _sha256(Path(manifest))}
    if labelled or fit != "tiles":  # labels.csv and the numbers of shards tell of all images of a run
        locked |= {"images": ", ".join(str(expand_home(path).absolute()) for path in listed(images)), "shard": shard}
    workers = workers or (1 if len(items) < POOL_FROM else available_cpus())
    run = partial(run_cohort, title="import", workers=workers, scheduler=scheduler, folder=folder)
    with lock_settings(folder, "import", locked):
        if fit == "tiles":
            outcomes, rows = _import_each(items, drawn, folder, settings, run)
        else:
            outcomes, rows = import_shards(items, drawn, folder, settings, shard or DEFAULT_SHARD, run)
        if labelled:
            _write_labels(folder / "labels.csv", rows)
    report.results += [outcome.info.pop("result") for outcome in outcomes if "result" in outcome.info]
    return BoxOutcomes(outcomes, "import", out, COUNTED, perf_counter() - begun, stored=report.results, notes=report.notes)


def _check_options(
    mpp: float | None,
    size_px: int | None,
    fit: str,
    coco: object,
    boxes: object,
    no_mpp: bool,
    shard: int | None,
    polygons: bool,
) -> None:
    """Raise UserError for values that cannot be, alone or together."""
    check_mpp(mpp, "--mpp")
    if size_px is not None and size_px < 1:
        raise UserError(f"--size {size_px}: a tile has at least 1 pixel")
    if fit not in FITS:
        raise UserError(f"--fit {fit}: is one of {', '.join(FITS)}")
    if shard is not None and (shard < 1 or fit == "tiles"):
        why = "is a number of images, at least 1" if shard < 1 else "goes with --fit crop or --fit squash"
        raise UserError(f"--shard {shard}: {why}")
    if no_mpp and mpp is not None:
        raise UserError(f"--no-mpp and --mpp {mpp:g}: the images have a scale or they have none: give one of the two")
    if coco is not None and boxes is not None:
        raise UserError(f"--coco {coco} and --boxes {boxes}: give one of the two")
    if polygons and coco is None and boxes is None:
        raise UserError("--polygons: needs the boxes whose outlines to store: give --coco or --boxes")


def _import_each(
    items: Sequence[ImageItem],
    drawn: dict[Path, ImageObjects],
    out: Path,
    settings: ImportSettings,
    run: Callable[..., list[Outcome]],
) -> tuple[list[Outcome], list[LabelRow]]:
    """Write a slide file per image; return outcomes and the place of every tile."""
    tasks = [ImageTask(item, drawn.get(item.path)) for item in items]
    outcomes = run(tasks, partial(import_image, out=out, settings=settings), wrote=partial(ImageTask.file, out=out))
    rows = []
    for item, outcome in zip(items, outcomes, strict=True):
        rows += [(item, item.slide_id, x, y) for x, y in outcome.info.pop("coords", ())]
    return outcomes, rows


def import_image(task: ImageTask, out: Path, settings: ImportSettings) -> ItemResult:
    """Import one image; info: tiles, boxes, coords (of an image with a class), result (of one with boxes)."""
    path, item = task.file(out), task.item
    with lock_file(path):
        stamp = source_stamp(item.path)  # before the image is opened: it may be replaced meanwhile
        existing = read_import(path)
        if existing is not None:
            check_same_slide(path, existing.source, existing.stamp, item.path, stamp)
        mpp = NOMINAL_MPP if settings.nominal else settings.mpp if settings.mpp is not None else item.mpp
        if mpp is not None and (result := _done(task, path, existing, task.parameters(settings, mpp), stamp)) is not None:
            return result  # without decoding the image
        with _open_image(item.path) as slide:
            note = ""
            if mpp is None:
                mpp, note = _stated_mpp(item.path, slide.info.stated_mpp), slide.info.mpp_note
                if (result := _done(task, path, existing, task.parameters(settings, mpp), stamp)) is not None:
                    return result
            result = _import(slide, task, path, settings, mpp, stamp)
    has_boxes, had_boxes = "objects" in result.info, existing is not None and existing.has_boxes
    result.notes = notes_of(
        "" if item.listed else "not in the manifest",
        note,
        slide.info.note,
        "not in the COCO file: no boxes" if settings.coco and not has_boxes else "",
        "no box file" if settings.boxes is not None and not has_boxes else "",
        "its boxes are gone with the old tiles: run annotate again" if had_boxes and not has_boxes else "",
        *result.notes,
    )
    return result


def _done(
    task: ImageTask, path: Path, existing: ExistingImport | None, parameters: dict[str, Any], stamp: tuple[int, int]
) -> ItemResult | None:
    """Return the result of a file that is up to date, None where it must be made. Its patient_id is brought up to date."""
    item = task.item
    if existing is None or not existing.has_parameters(parameters) or existing.stamp != stamp:
        return None
    if item.patient_id and item.patient_id != existing.patient_id:
        replace_groups(path, {}, root_attrs={"patient_id": item.patient_id})
    if item.label:
        existing.result.info["coords"] = existing.coords.tolist()
    return existing.result


def _import(
    slide: Slide, task: ImageTask, path: Path, settings: ImportSettings, mpp: float, stamp: tuple[int, int]
) -> ItemResult:
    """Cut the tiles of an image, place its objects, and write the slide file; the notes are those on the boxes."""
    item, size_px = task.item, settings.size_px
    width, height = slide.info.width_l0, slide.info.height_l0
    if min(width, height) < size_px:
        raise UserError(f"{item.path}: {width} x {height} pixels hold no tile of {size_px}: ask for a smaller --size")
    coords = plan_grid(width, height, mpp, mpp, size_px).coords
    thumb = slide.thumbnail(THUMBNAIL_SIDE_PX)
    xml = box_file(settings.boxes, item)
    drawn = task.coco if xml is None else xml_boxes(xml)
    boxes = BoxGroups(info={"boxes": 0})
    if drawn is not None:
        table, scaled = place_objects(drawn, item.path, (width, height))
        boxes = box_groups(TileObjects(table, clip_objects(table, coords, size_px, settings.polygons), scaled), mpp)
    meta = SlideMeta(
        slide_id=item.slide_id,
        source=item.path,
        width_l0=width,
        height_l0=height,
        mpp=mpp,
        mpp_level0=mpp,
        patch_px=size_px,
        patient_id=item.patient_id,
        parameters=task.parameters(settings, mpp),
        stamp=stamp,
    )
    groups = {"thumbnail": thumbnail_group(thumb, None, width / thumb.shape[1]), **boxes.groups}
    write_slide_file(path, meta=meta, coords=coords, pixels=_encode(slide, coords, size_px), groups=groups)
    labelled = {"coords": coords.tolist()} if item.label else {}
    return ItemResult({"tiles": len(coords), **boxes.info, **labelled}, boxes.notes)


def default_size_px(paths: Sequence[Path]) -> int:
    """Choose the side of tiles from headers: that of the images where all are one square of at most 1024 pixels, else 224."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in paths:
        if (size := _header_size(path)) is not None:
            sizes[size] += 1
            if len(sizes) > 1 or size[0] != size[1] or size[0] > LARGEST_TILE_PX:
                return DEFAULT_SIZE_PX
    return next(iter(sizes))[0] if sizes else DEFAULT_SIZE_PX


def _header_size(path: Path) -> tuple[int, int] | None:
    """Read width and height from the header; None where it cannot be read (the import of that image says why)."""
    from PIL import Image
    from PIL.TiffImagePlugin import TiffImageFile

    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    try:
        with Image.open(path) as image:
            if not isinstance(image, TiffImageFile) or (image.n_frames == 1 and SUB_IFDS not in image.tag_v2):
                return image.size
    except Exception:  # pillow does not read every TIFF that a slide library does
        if path.suffix.lower() not in TIFF_EXTENSIONS:
            return None
    try:
        with Slide.open(path) as slide:
            return slide.info.width_l0, slide.info.height_l0
    except UserError:
        return None


def _open_image(path: Path) -> Slide:
    """Open a TIFF through the slide libraries (it may be large), decode PNG and JPEG into memory."""
    if path.suffix.lower() in TIFF_EXTENSIONS:
        return Slide.open(path)
    try:
        reader = ImageReader(path)
    except Exception as error:  # pillow has many
        raise unreadable_image(path, error) from None
    return Slide(SlideInfo.of(path, reader), reader)


def _stated_mpp(path: Path, stated: Mpp) -> float:
    if stated.value is not None:
        return stated.value
    because = f" ({stated.note})" if stated.note else ""
    ways = "give --mpp, column mpp in a --manifest, or set the resolution tags; --no-mpp for photographs"
    raise UserError(f"{path}: no mpp in its tags{because}: {ways}")


def _encode(slide: Slide, coords: np.ndarray, size: int) -> Iterator[bytes]:
    """Encode the tiles as JPEG: the image's own bytes where it is one tile and a plain JPEG, else quality 95."""
    info = slide.info
    if (info.width_l0, info.height_l0) == (size, size) and (data := plain_jpeg(info.path)) is not None:
        yield data
        return
    for tile in read_tiles(slide, coords, size, size):
        yield codec.encode_jpeg(tile, QUALITY)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_labels(path: Path, rows: Sequence[LabelRow]) -> None:
    """Write a row per tile: its slide file, its place, its class folder; its side of the split where folders give one."""
    split = any(item.split for item, *_ in rows)
    columns = (*LABEL_COLUMNS, "split") if split else LABEL_COLUMNS
    values = [(slide_id, x, y, item.label, item.patient_id, item.key, item.split) for item, slide_id, x, y in rows]
    write_csv_file(path, [columns, *(row[: len(columns)] for row in values)])
