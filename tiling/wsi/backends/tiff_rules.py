"""What each backend may show of a TIFF: a table of the pages that it would show otherwise than they are meant, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tiling.wsi.backends.base import DEPTHS_READ
from tiling.wsi.backends.tiff_pages import (
    UNSPECIFIED,
    colours_of,
    compression_of,
    extras_of,
    first_stored,
    main_page,
    orientation_of,
    size_of,
)
from tiling.wsi.jpeg_markers import is_taken_for_rgb

JPEG = 7  # TIFF compressions
J2K_YCBCR = 33003  # Aperio's, whose colours tifffile does not turn into RGB
JPEG_2000 = {J2K_YCBCR: "jpeg2000 ycc", 33005: "jpeg2000", 34712: "jpeg2000"}  # Aperio's two, and the one of other writers
BITS_PER_SAMPLE, COMPRESSION, PLANAR_CONFIG = 258, 259, 284  # TIFF tags
GREY = ("MINISBLACK", "MINISWHITE")
DIRECT_COLOURS = (("RGB", 3), ("YCBCR", 3), ("MINISBLACK", 1))  # and samples a pixel

Rules = Iterable[tuple[bool, str]]  # (it is such a page, the reason against it)


def _first(rules: Rules) -> str:
    return next((reason for applies, reason in rules if applies), "")


def direct_refusal(page: Any) -> str:
    """Say why a page's tiles are not decoded straight; empty where they are."""
    colours, samples = colours_of(page), page.samplesperpixel
    is_interleaved = page.bitspersample == 8 and int(page.planarconfig) == 1 and page.tiledepth == page.imagedepth == 1
    return _first(
        (
            (not page.is_tiled, "its pixels are not stored in tiles"),
            (
                int(page.compression) not in (JPEG, *JPEG_2000),
                f"its tiles are {compression_of(page)}, not JPEG or JPEG 2000",
            ),
            (not is_interleaved, "its samples are not interleaved bytes"),
            ((colours, samples) not in DIRECT_COLOURS, f"its colours are {colours} in {samples} samples"),
            (
                bool(page.tilewidth % 8 or page.tilelength % 8),
                f"its tiles of {page.tilewidth} x {page.tilelength} are no multiple of 8",
            ),
        )
    )


def openslide_refusal(pages: Sequence[Any], sizes: Sequence[tuple[int, int]], *, is_plain: bool) -> str:
    """Say what OpenSlide (libtiff in it) would show wrongly of a TIFF's pages; empty where nothing.

    sizes: width and height of its levels. is_plain: the TIFF is of no scanner's own format.
    """
    levels = [page for page in pages if size_of(page) in sizes]
    turned = next((orientation_of(page) for page in levels if orientation_of(page) != 1), 1)
    is_main_elsewhere = is_plain and bool(pages) and pages[0] is not main_page(pages)
    of_file = (
        (is_main_elsewhere, "it would show another page than the largest, or take the resolution of another"),
        (
            turned != 1,
            f"it would leave pages of orientation {turned} as they are stored, or turn each of their tiles in itself",
        ),
    )
    return _first((*of_file, *(rule for page in levels if page.is_tiled for rule in _openslide_rules(page))))


def _openslide_rules(page: Any) -> Rules:
    colours, samples = colours_of(page), page.samplesperpixel
    is_grey, is_apart = colours in GREY, samples > 1 and int(page.planarconfig) != 1
    bits = page.bitspersample * samples
    is_cut_grey = is_grey and bits > 8 and not is_apart and page.imagewidth % page.tilewidth
    has_extra = samples > 3 and extras_of(page)[:1] == (UNSPECIFIED,) and (colours == "RGB" or (is_grey and is_apart))
    return (
        (bool(is_cut_grey), f"it would mix up the last column of tiles, as of all grey in pixels of {bits} bits"),
        (has_extra, f"it would take one of {samples} channels for transparency, though the file says nothing of it"),
    )


def tiffslide_refusal(page: Any) -> str:
    """Say why tifffile does not turn the samples of a page into grey or RGB; empty where it does."""
    colours, samples, is_jpeg = colours_of(page), page.samplesperpixel, page.compression == JPEG
    no_colours = set(extras_of(page)) == {UNSPECIFIED} and not is_jpeg
    is_converted = colours in ("MINISBLACK", "RGB") and (samples in (1, 3) or no_colours) and page.compression != J2K_YCBCR
    is_contradicted = is_jpeg and (
        (colours == "RGB" and page.is_jfif) or (colours == "YCBCR" and is_taken_for_rgb(first_stored(page)))
    )
    return _first(
        (
            (
                not is_converted and not (colours == "YCBCR" and is_jpeg),
                f"its colours are {colours} in {samples} samples ({compression_of(page)}), which it does not convert",
            ),
            (page.bitspersample in range(2, 8), f"its pixels are of {page.bitspersample} bits: {DEPTHS_READ}"),
            (
                is_contradicted,
                f"its colours are {colours}, which markers in its JPEG tiles contradict, and it would believe those",
            ),
        )
    )


def pillow_refusal(image: Any, page: Any | None) -> str:
    """Say what Pillow would show wrongly of an image, at its main page; page: that page of a TIFF; empty where nothing."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    is_beneath = page is not None and len(page.treeindex) > 1
    is_apart = tags.get(PLANAR_CONFIG, 1) == 2 and tags.get(COMPRESSION) == 1
    return _first(
        (
            (is_beneath, "its largest page lies beneath another, and Pillow does not read those"),
            (
                is_apart and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8,
                f"Pillow mixes up channels of 16 bits stored apart and not compressed: {DEPTHS_READ}",
            ),
            # Pillow would cut these off at 255.
            (image.mode == "I", f"its pixels are signed or 32-bit integers: {DEPTHS_READ}"),
            (image.mode == "F", f"its pixels are floating-point numbers: {DEPTHS_READ}"),
        )
    )
