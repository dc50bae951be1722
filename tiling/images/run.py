"""Images that are tiles or fields of view already -> the slide files that `tile` writes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
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
    BoxReport,
    ImageObjects,
    box_folder,
    box_groups,
    clipped,
    coco_boxes,
    placed,
    stored_result,
    xml_boxes,
)
from tiling.images.fit import FITS, QUALITY, plain_jpeg
from tiling.images.listing import TIFF_EXTENSIONS, ImageItem, apply_manifest, box_file, find_images
from tiling.images.shards import NOMINAL_MPP, ShardSettings, import_shards
from tiling.jobs.outcome import ItemResult, Note, Outcome, describe_error, notes_of
from tiling.jobs.run import available_cpus, run_cohort
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import (
    FORMAT_VERSION,
    GroupContent,
    SlideMeta,
    check_ours,
    parameters_hash,
    replace_groups,
    source_stamp,
    write_slide_file,
)
from tiling.storage.csv_file import write_csv_file
from tiling.storage.locks import lock_file, lock_settings
from tiling.storage.paths import from_home
from tiling.storage.touched import was_touched
from tiling.tiles.resume import check_same_slide, has_boxes
from tiling.tiles.run import THUMBNAIL_SIDE_PX, _made, _overview
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
Work = tuple[ImageItem, ImageObjects | None]
LabelRow = tuple[ImageItem, str, int, int]  # image, slide_id, x, y


@dataclass(frozen=True)
class ImportSettings:
    """mpp: micrometres per pixel of every image, None to look further. size_px: side of a tile. coco: hash of the boxes.

    boxes: folder of XML files. nominal: the images have no scale, mpp is a stand-in. polygons: keep the outlines.
    """

    mpp: float | None
    size_px: int
    coco: str = ""
    boxes: Path | None = None
    nominal: bool = False
    polygons: bool = False


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
    folder = box_folder(items, Path(boxes)) if boxes is not None else None
    workers = workers or (1 if len(items) < POOL_FROM else available_cpus())
    settings: ImportSettings | ShardSettings
    if fit == "tiles":
        size = size or default_size_px([item.path for item in items])
        settings = ImportSettings(NOMINAL_MPP if no_mpp else mpp, size, digest, folder, no_mpp, polygons)
    else:
        settings = ShardSettings(fit, size or DEFAULT_SIZE_PX, folder, digest, mpp, no_mpp, polygons)
    made = _made(Path(out))
    labelled = any(item.label for item in items)
    asked = {"fit": fit, **asdict(settings), "manifest": manifest and _sha256(Path(manifest))}
    if labelled or fit != "tiles":  # labels.csv and the numbers of shards tell of all images of a run
        asked |= {"images": ", ".join(str(from_home(path).absolute()) for path in listed(images)), "shard": shard}
    how: dict[str, Any] = {"title": "import", "workers": workers, "scheduler": scheduler, "folder": made}
    with lock_settings(made, "import", asked):
        if isinstance(settings, ImportSettings):
            outcomes, rows = _import_each(items, drawn, made, settings, how)
        else:
            outcomes, rows = import_shards(items, drawn, made, settings, shard or DEFAULT_SHARD, how)
        if labelled:
            _write_labels(made / "labels.csv", rows)
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
    """Raises UserError for values that cannot be, alone or together."""
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
    items: Sequence[ImageItem], drawn: dict[Path, ImageObjects], out: Path, settings: ImportSettings, how: dict[str, Any]
) -> tuple[list[Outcome], list[LabelRow]]:
    """A slide file per image; outcomes and the place of every tile."""
    work = partial(import_image, out=out, settings=settings)
    pairs: list[Work] = [(item, drawn.get(item.path)) for item in items]
    outcomes = run_cohort(pairs, work, name=_name, wrote=partial(_file_of, out=out), **how)
    rows = []
    for item, outcome in zip(items, outcomes, strict=True):
        rows += [(item, item.slide_id, x, y) for x, y in outcome.info.pop("coords", ())]
    return outcomes, rows


def import_image(pair: Work, out: Path, settings: ImportSettings) -> ItemResult:
    """Import one image; info: tiles, boxes, coords (of an image with a class), result (of one with boxes)."""
    path = _file_of(pair, out)
    with lock_file(path):
        return _imported(*pair, path, settings)


def _imported(item: ImageItem, drawn: ImageObjects | None, path: Path, settings: ImportSettings) -> ItemResult:
    xml = box_file(settings.boxes, item) if settings.boxes is not None else None
    stamp = source_stamp(item.path)  # before the image is opened: it may be replaced meanwhile
    found = _known_mpp(item, settings)
    if found is not None and (done := _done(path, _parameters(settings, found.value, xml), item)) is not None:
        return done  # without decoding the image
    with _open_image(item.path) as slide:
        mpp = (found or _own_mpp(item.path, slide.info.stated_mpp)).value
        assert mpp is not None
        parameters = _parameters(settings, mpp, xml)
        if found is None and (done := _done(path, parameters, item)) is not None:
            return done
        info = slide.info
        if min(info.width_l0, info.height_l0) < settings.size_px:
            size = f"{info.width_l0} x {info.height_l0} pixels"
            raise UserError(f"{item.path}: {size} hold no tile of {settings.size_px}: ask for a smaller --size")
        plan = plan_grid(info.width_l0, info.height_l0, mpp, mpp, settings.size_px)
        thumb = slide.thumbnail(THUMBNAIL_SIDE_PX)
        groups: dict[str, GroupContent] = {"thumbnail": _overview(thumb, None, info.width_l0 / thumb.shape[1])}
        counts: dict[str, Any] = {"boxes": 0}
        box_notes: list[Note] = []
        drawn = xml_boxes(xml) if xml is not None else drawn
        if drawn is not None:
            table, scaled = placed(drawn, item.path, (info.width_l0, info.height_l0))
            boxes = clipped(table, plan.coords, settings.size_px, settings.polygons)
            added, counts, box_notes = box_groups(table, boxes, mpp, scaled)
            groups |= added
        had_boxes = has_boxes(path)
        meta = SlideMeta(
            slide_id=item.slide_id,
            source=item.path,
            width_l0=info.width_l0,
            height_l0=info.height_l0,
            mpp=mpp,
            mpp_level0=mpp,
            patch_px=settings.size_px,
            patient_id=item.patient_id,
            parameters=parameters,
            stamp=stamp,
        )
        write_slide_file(path, meta=meta, coords=plan.coords, pixels=_encoded(slide, plan.coords, settings), groups=groups)
    notes = notes_of(
        "" if item.listed else "not in the manifest",
        slide.info.mpp_note if found is None else "",
        slide.info.note,
        "not in the COCO file: no boxes" if settings.coco and drawn is None else "",
        "no box file" if settings.boxes is not None and drawn is None else "",
        "its boxes are gone with the old tiles: run annotate again" if had_boxes and drawn is None else "",
        *box_notes,
    )
    coords = {"coords": plan.coords.tolist()} if item.label else {}
    return ItemResult({"tiles": len(plan.coords), **counts, **coords}, notes)


def default_size_px(paths: Sequence[Path]) -> int:
    """The side of the images where all readable ones are one square of at most 1024 pixels, else 224. Reads headers."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in paths:
        if (size := _header_size(path)) is not None:
            sizes[size] += 1
            if len(sizes) > 1 or size[0] != size[1] or size[0] > LARGEST_TILE_PX:
                return DEFAULT_SIZE_PX
    return next(iter(sizes))[0] if sizes else DEFAULT_SIZE_PX


def _header_size(path: Path) -> tuple[int, int] | None:
    """Width and height from the header; None where it cannot be read (the import of that image says why)."""
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
    """A TIFF through the slide libraries (it may be large), PNG and JPEG decoded into memory."""
    if path.suffix.lower() in TIFF_EXTENSIONS:
        return Slide.open(path)
    try:
        reader = ImageReader(path)
    except Exception as error:  # pillow has many
        what = describe_error(error).replace(f" {str(path)!r}", "")
        raise UserError(f"{path}: not a readable image ({what}): copy it again or leave it out") from None
    return Slide(SlideInfo.of(path, reader), reader)


def _known_mpp(item: ImageItem, settings: ImportSettings) -> Mpp | None:
    if settings.mpp is not None:
        return Mpp(settings.mpp, "--mpp")
    return Mpp(item.mpp, "manifest") if item.mpp is not None else None


def _own_mpp(path: Path, found: Mpp) -> Mpp:
    if found.value is not None:
        return found
    because = f" ({found.note})" if found.note else ""
    ways = "give --mpp, column mpp in a --manifest, or set the resolution tags; --no-mpp for photographs"
    raise UserError(f"{path}: no mpp in its tags{because}: {ways}")


def _parameters(settings: ImportSettings, mpp: float | None, xml: Path | None) -> dict[str, Any]:
    """All that changes the result; the hash of it tells whether a file is up to date."""
    more: dict[str, Any] = {"mpp_nominal": True} if settings.nominal else {}
    if settings.polygons:
        more["polygons"] = True
    if xml is not None:
        more["box_file"] = list(source_stamp(xml))
    return more | {
        "format_version": FORMAT_VERSION,
        "import": 1,
        "mpp": mpp,
        "size_px": settings.size_px,
        "quality": QUALITY,
        "coco_sha256": settings.coco,
    }


def _done(path: Path, parameters: dict[str, Any], item: ImageItem) -> ItemResult | None:
    """The result of an up-to-date file (its patient_id is brought up to date), None where it must be made.

    Raises UserError where it is no slide file, or another image's that is still there, and is not to be replaced.
    """
    if not path.exists():
        return None
    try:
        with SlideFile(path) as file:
            if was_touched(path):
                file.check()
            attrs, patient_id, source = file.attrs, file.patient_id, file.source
            done = stored_result(file)
            if item.label:
                done.info["coords"] = file.coords.tolist()
        stamp = (int(attrs["source_size"]), int(attrs["source_mtime_ns"]))
        same = attrs["parameters_sha256"] == parameters_hash(parameters)[1]
    except (UserError, OSError, KeyError, RuntimeError):
        check_ours(path)
        return None  # damaged: made anew
    now = source_stamp(item.path)
    check_same_slide(path, source, stamp, item.path, now)
    if not same or stamp != now:
        return None
    if item.patient_id and item.patient_id != patient_id:
        replace_groups(path, {}, root_attrs={"patient_id": item.patient_id})
    return done


def _encoded(slide: Slide, coords: np.ndarray, settings: ImportSettings) -> Iterator[bytes]:
    """The tiles as JPEG: the image's own bytes where it is one tile and a plain JPEG, else quality 95."""
    info, size = slide.info, settings.size_px
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


def _file_of(pair: Work, out: Path) -> Path:
    return out / f"{pair[0].slide_id}.h5"


def _name(pair: Work) -> str:
    return pair[0].slide_id
