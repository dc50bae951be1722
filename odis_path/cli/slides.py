"""Commands from slides to slide files: scan, tile, import, annotate, propose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tiling.jobs.summary import Result


def _not_empty(value: str | None) -> str | None:
    from annotations.errors import UserError

    if value is not None and not value.strip():
        raise UserError("--scheduler: is empty, as of a variable that is not set: leave it out, or give tcp://host:8786")
    return value


# Options of several commands.
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one per CPU when left out.", show_default=False)]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDR", help="Dask scheduler, tcp://host:8786 or its scheduler file.", callback=_not_empty),
]
Timeout = Annotated[float | None, typer.Option(help="Seconds after which a slide is given up.", show_default=False)]
SlideDir = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that tile or import wrote.", show_default=False)]
AssumeMpp = Annotated[float | None, typer.Option(help="Level-0 mpp of slides that have none.")]
Polygons = Annotated[bool, typer.Option("--polygons", help="Store the clipped outlines too, for polygon masks.")]

# Options of tile.
TileInputs = Annotated[
    list[str], typer.Argument(metavar="MANIFEST|SLIDES...", help="A manifest.csv, or slides.", show_default=False)
]
Pixels = Annotated[
    str,
    typer.Option(
        metavar="none|jpeg|copy",
        help="none: coordinates alone, tiles are read from the slide each time. jpeg: stored, coded at --quality. copy: "
        "the slide's own bytes, not recoded, where its stored tiles are the tiles.",
    ),
]
Reader = Annotated[str, typer.Option(metavar="auto|direct|openslide|tiffslide|image", help="What reads the slides.")]
Resample = Annotated[
    str,
    typer.Option(
        metavar="fast|exact|pyramid",
        help="fast: within 2 grey levels of exact, the area average of level 0. pyramid: the scanner's levels as they are.",
    ),
]
Exclude = Annotated[
    str, typer.Option(metavar="DIR", help="GeoJSON or masks, named by slide, of what is not wanted.", show_default=False)
]
TissueOut = Annotated[str, typer.Option(metavar="DIR", help="Write the tissue as GeoJSON for QuPath.", show_default=False)]

# Options of import and annotate.
Fit = Annotated[
    str, typer.Option(metavar="tiles|crop|squash", help="Whole tiles of each image, or one tile an image, resized.")
]
AnnotationFiles = Annotated[
    list[Path], typer.Option(metavar="FILES|DIR", help="GeoJSON, XML, json, masks, or their folder.", show_default=False)
]
FurtherFiles = Annotated[list[Path] | None, typer.Argument(metavar="FILES", help="What a shell glob after --annotations adds.")]
PointSize = Annotated[str | None, typer.Option(metavar="TEXT", help="Give points an extent: 12um, or 24px at level 0.")]
AnnotationMpp = Annotated[
    float | None, typer.Option(help="Micrometres per pixel of the annotations, where not of level 0.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the application."""
    app.command("scan")(scan)
    app.command("tile")(tile)
    app.command("import")(import_)
    app.command("annotate")(annotate)
    app.command("propose")(propose)


def exit_with(result: Result) -> None:
    """Print the result of a command and exit, with 1 where something failed."""
    result.print()
    raise typer.Exit(1 if result.failed else 0)


def scan(
    slides: Annotated[list[str], typer.Argument(help="Slides, folders (searched in depth), globs, URLs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The manifest to write.")] = Path("manifest.csv"),
    mpp: Annotated[float | None, typer.Option(help="The --mpp meant for tile: slides too coarse for it fail.")] = None,
    assume_mpp: AssumeMpp = None,
    workers: Workers = None,
    timeout: Timeout = None,
) -> None:
    """List slides with size, levels, mpp and vendor, and which will fail and why: the work list of a cohort."""
    from tiling.cohort.scan import scan as run

    exit_with(run(slides, out, mpp=mpp, assume_mpp=assume_mpp, workers=workers, timeout=timeout))


def tile(
    inputs: TileInputs,
    out: Annotated[Path, typer.Option(help="Folder for one .h5 per slide.", show_default=False)],
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of the tiles.", show_default=False)] = None,
    mag: Annotated[float | None, typer.Option(help="Instead of --mpp: magnification, mpp = 10 / mag.")] = None,
    size: Annotated[int, typer.Option(help="Side of a tile in pixels.")] = 224,
    overlap: Annotated[int, typer.Option(help="Overlap of neighbours in pixels of the tiles.")] = 0,
    min_tissue: Annotated[float, typer.Option(help="Least share of tissue in a tile.")] = 0.1,
    tissue: Annotated[str, typer.Option(metavar="auto|none|GEOJSON_DIR", help="Where the tissue is.")] = "auto",
    pixels: Pixels = "jpeg",
    no_pixels: Annotated[bool, typer.Option("--no-pixels", help="The same as --pixels none.")] = False,
    assume_mpp: AssumeMpp = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of stored tiles.")] = 90,
    reader: Reader = "auto",
    resample: Resample = "fast",
    exclude: Exclude = "",
    pen: Annotated[str, typer.Option(metavar="drop|keep", help="Whether areas in the colours of pen ink are tissue.")] = "drop",
    tissue_out: TissueOut = "",
    workers: Workers = None,
    scheduler: Scheduler = None,
    timeout: Timeout = None,
) -> None:
    """Cut slides into tiles where there is tissue."""
    from tiling.tiles.run import tile as run

    outcomes = run(
        inputs,
        out,
        mpp=mpp,
        mag=mag,
        size=size,
        overlap=overlap,
        min_tissue=min_tissue,
        tissue=tissue,
        pixels="none" if no_pixels else pixels,
        assume_mpp=assume_mpp,
        quality=quality,
        reader=reader,
        resample=resample,
        exclude=exclude,
        pen=pen,
        tissue_out=tissue_out,
        workers=workers,
        scheduler=scheduler,
        timeout=timeout,
    )
    exit_with(outcomes)


def import_(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images or of class folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the slide files.", show_default=False)],
    coco: Annotated[Path | None, typer.Option(metavar="FILE", help="COCO-style JSON with boxes.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of the images.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of a tile in pixels; the images' own when left out.")] = None,
    manifest: Annotated[Path | None, typer.Option(metavar="CSV", help="Patients (and more) of the images.")] = None,
    fit: Fit = "tiles",
    boxes: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of VOC-style <stem>.xml with boxes.")] = None,
    no_mpp: Annotated[bool, typer.Option("--no-mpp", help="The images have no scale, such as photographs.")] = False,
    shard: Annotated[int | None, typer.Option(help="Images to a file, with --fit crop or squash; 1000.")] = None,
    polygons: Polygons = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Turn a class-folder tile set, or images with boxes, into the same files that tile writes."""
    from tiling.images.run import import_images

    outcomes = import_images(
        images,
        out,
        coco=coco,
        mpp=mpp,
        size=size,
        manifest=manifest,
        fit=fit,
        boxes=boxes,
        no_mpp=no_mpp,
        shard=shard,
        polygons=polygons,
        workers=workers,
        scheduler=scheduler,
    )
    exit_with(outcomes)


def annotate(
    folder: SlideDir,
    annotations: AnnotationFiles,
    further_files: FurtherFiles = None,
    origin: Annotated[str, typer.Option(metavar="auto|level0|bounds", help="Where coordinates count from.")] = "auto",
    kind: Annotated[str, typer.Option(metavar="auto|tissue|cell", help="What the objects are.")] = "auto",
    point_size: PointSize = None,
    polygons: Polygons = False,
    classes: Annotated[Path | None, typer.Option(metavar="YAML", help="What classes are called: Tumour: [tumor, TUM].")] = None,
    strict_classes: Annotated[bool, typer.Option("--strict-classes", help="Refuse classes that --classes lacks.")] = False,
    annotation_mpp: AnnotationMpp = None,
    nuclei: Annotated[bool, typer.Option("--nuclei", help="Take the nuclei of QuPath's cells.")] = False,
    split_values: Annotated[
        bool, typer.Option("--split-values", help="Masks: each connected piece of a value is an object.")
    ] = False,
    append: Annotated[bool, typer.Option("--append", help="Add to what is annotated already.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Little memory, for files of a million cells.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="List the outlines that were repaired.")] = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    timeout: Timeout = None,
) -> None:
    """Clip annotations to the tiles and store them as boxes."""
    from tiling.boxes.run import annotate as run

    outcomes = run(
        folder,
        [*annotations, *(further_files or [])],
        origin=origin,
        kind=kind,
        point_size=point_size,
        polygons=polygons,
        classes=classes,
        strict_classes=strict_classes,
        annotation_mpp=annotation_mpp,
        nuclei=nuclei,
        split_values=split_values,
        append=append,
        stream=stream,
        verbose=verbose,
        workers=workers,
        scheduler=scheduler,
        timeout=timeout,
    )
    exit_with(outcomes)


def propose(
    folder: SlideDir,
    workers: Workers = None,
    scheduler: Scheduler = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite boxes that come from annotations.")] = False,
    from_cells: Annotated[
        bool, typer.Option("--from-cells", help="Group annotated cells into clusters, regions into parts.")
    ] = False,
    timeout: Timeout = None,
) -> None:
    """Propose class-agnostic boxes (nuclei, glands) where there are no annotations."""
    from tiling.proposals.run import propose as run

    exit_with(run(folder, workers=workers, scheduler=scheduler, replace=replace, from_cells=from_cells, timeout=timeout))
