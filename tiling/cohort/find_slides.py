"""Find the slides of a cohort among files, folders, globs and URLs, and give each a name of its own."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from annotations.errors import UserError
from tiling.cohort.manifest import SlideItem, patient_of
from tiling.storage.paths import display_path, file_name, list_urls, parse_path, path_key, printable, url_of
from tiling.storage.slide_id import default_id, safe_id

SLIDE_EXTENSIONS = frozenset(  # looked for in folders
    [".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".qptiff", ".btf"]
)
IMAGE_EXTENSIONS = frozenset(  # slides only where they are named; odis-path import takes them for tiles
    [
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".avif", ".gif", ".tga"),
        *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm"),
    ]
)


def find_slides(inputs: Iterable[Path | str], known: Mapping[str, str] | None = None) -> list[SlideItem]:
    """Slides among files, folders (searched recursively by extension), globs and URLs, each once, in order of their paths.

    Of a DICOM series of many files one is taken, and a line on stderr says so. Slides of equal stems in different folders
    get their folder's name in front. known: `path_key` of a slide -> the slide_id it has already, and keeps.
    Raises UserError for a path that does not exist and for one that holds no slide.
    """
    files: dict[str, Path] = {}
    folders: dict[Path, str] = {}
    for value in inputs:
        path = parse_path(value)
        try:
            for file in _expanded(path):
                files.setdefault(_real_place(file, folders), file)
        except OSError as error:
            where = error.filename or path
            raise UserError(f"{where}: cannot be looked into: {error.strerror}: ask for the right to read it") from None
    if not files:
        raise UserError("no slides given: name files, folders or a manifest.csv")
    slides = one_per_series(files.values())
    if extra := len(files) - len(slides):
        note = f"{extra} of {len(files)} files left out: each belongs to the DICOM series of another and is read with it"
        print(note, file=sys.stderr, flush=True)
    items = [SlideItem(_in_utf8(path), default_id(path), patient_of(file_name(path))) for path in slides]
    return _with_unique_ids(items, known or {})


def _real_place(path: Path, folders: dict[Path, str]) -> str:
    """One text for one slide, whichever links lead to its folder. folders: their real paths, filled in here."""
    if url := url_of(path):
        return url
    if path.parent not in folders:
        folders[path.parent] = os.path.realpath(path.parent)
    return os.path.join(folders[path.parent], path.name)


def _in_utf8(path: Path) -> Path:
    """The path if it is UTF-8, else the name of no file, which says why: no manifest and no slide file can hold the path."""
    whole = path_key(path)
    if printable(whole) == whole:
        return path
    kind = "file" if printable(path.name) != path.name else "folder"
    return Path(f"{printable(whole)} ({kind} name is not UTF-8: rename it)")


def _expanded(path: Path) -> list[Path]:
    if url := url_of(path):
        named = Path(file_name(path)).suffix.lower() in SLIDE_EXTENSIONS and "*" not in url
        return [path] if named else list_urls(url, SLIDE_EXTENSIONS)
    if path.is_dir():
        return _slides_under(path)
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file or folder")
    return [slide for match in matches for slide in (_expanded(match) if match.is_dir() else [match])]


def _slides_under(folder: Path) -> list[Path]:
    files = sorted(_files_under(folder, SLIDE_EXTENSIONS | IMAGE_EXTENSIONS))
    slides = [path for path in files if path.suffix.lower() in SLIDE_EXTENSIONS]
    if slides:
        return slides
    problem = f"holds no slide (looked for {' '.join(sorted(SLIDE_EXTENSIONS))}, in its folders too)"
    if files:
        pattern = files[0].parent / f"*{files[0].suffix}"
        problem += f": images that are tiles go through odis-path import; where each is a slide, give them as '{pattern}'"
    raise UserError(f"{folder}: {problem}")


def _files_under(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Files and dead links with these suffixes, in folders below and those that links lead to, each folder once.

    What is hidden is left out. Links are followed last, so that a folder goes by its own name where it has one here.
    """
    top = os.path.realpath(folder)
    seen: set[str] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(here)
        if real in seen or (seen and Path(top).is_relative_to(real)):  # a link that leads up would bring all in again
            continue
        seen.add(real)
        for entry in _entries(here, needed=here == folder):
            path = here / entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and path.is_dir():
                links.append(path)
            elif path.suffix.lower() in suffixes and (entry.is_symlink() or entry.is_file()):
                yield path


def _entries(folder: Path, *, needed: bool) -> list[os.DirEntry[str]]:
    """List a folder without hidden files, by name. One that may not be read is reported, and left out unless needed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except PermissionError as error:
        if needed:
            raise
        print(f"{folder}: left out: cannot be looked into: {error.strerror}", file=sys.stderr, flush=True)
        return []


def _with_unique_ids(items: list[SlideItem], known: Mapping[str, str]) -> list[SlideItem]:
    """Make ids unique: one that occurs once stays, slides that share one get the first free names of `_longer_ids`.

    known: place -> an id that stays as it is, and that no other slide gets.
    """
    new_id = {item.path: known[key] for item in items if (key := path_key(item.path)) in known}
    taken = set(new_id.values())
    groups: dict[str, list[SlideItem]] = {}
    for item in items:
        groups.setdefault(item.slide_id, []).append(item)
    for name, group in sorted(groups.items(), key=lambda entry: len(entry[1]) > 1):  # ids that occur once come first
        for ids in _longer_ids(group) if len(group) > 1 or name in taken else [[name]]:
            proposed = {item.path: slide_id for item, slide_id in zip(group, ids, strict=True) if item.path not in new_id}
            if len(set(proposed.values())) == len(proposed) and taken.isdisjoint(proposed.values()):
                new_id |= proposed
                taken.update(proposed.values())
                break
        else:
            where = ", ".join(display_path(item.path) for item in group[:2])
            raise UserError(f"{where}: both would be named {name}: name them in a manifest")
    return [replace(item, slide_id=new_id[item.path]) for item in items]


def _longer_ids(group: list[SlideItem]) -> Iterator[list[str]]:
    """Ids for slides of one name: folders in front, as many as it takes; the extension behind; both; a hash of the path."""
    folders = [Path(path_key(item.path)).parts[1:-1] for item in group]
    extensions = ["_" + Path(file_name(item.path)).suffix[1:] for item in group]
    depths = range(1, max(len(parts) for parts in folders) + 1)
    for suffixes, tried_depths in (([""] * len(group), depths), (extensions, (0, *depths))):
        for depth in tried_depths:
            prefixes = [parts[max(0, len(parts) - depth) :] for parts in folders]
            names = zip(prefixes, group, suffixes, strict=True)
            yield [safe_id("_".join([*prefix, item.slide_id]) + suffix) for prefix, item, suffix in names]
    digests = [hashlib.sha256(path_key(item.path).encode()).hexdigest()[:8] for item in group]
    yield [safe_id(f"{item.slide_id}_{digest}") for item, digest in zip(group, digests, strict=True)]


# DICOM: tags, the transfer syntax without value representations, representations with a length of 4 bytes, delimiters.
SERIES_UID, TRANSFER_SYNTAX = 0x0020000E, 0x00020010
IMPLICIT = b"1.2.840.10008.1.2"
LONG_LENGTH = frozenset([b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"])
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED_LENGTH = 0xFFFFFFFF
MAX_HEADER_BYTES = 4 << 20  # no header is longer before the series; a file that is no DICOM is given up there


def one_per_series(paths: Iterable[Path]) -> list[Path]:
    """The paths without the .dcm files whose series is there already, by another file of the same folder."""
    paths = list(paths)
    dicoms = [path for path in paths if path.suffix.lower() == ".dcm" and not url_of(path)]
    in_folder = Counter(path.parent for path in dicoms)
    series = {path: (path.parent, series_uid(path)) for path in dicoms if in_folder[path.parent] > 1}
    first = {key: path for path, key in reversed(series.items())}
    return [path for path in paths if path not in series or not series[path][1] or first[series[path]] == path]


def series_uid(path: Path) -> str:
    """SeriesInstanceUID of a DICOM file; "" where it has none or is no such file."""
    try:
        with path.open("rb") as file:
            return _series_uid(file) if file.read(132)[128:] == b"DICM" else ""
    except (OSError, struct.error, ValueError):  # cut off, or no DICOM after all
        return ""


def _series_uid(file: BinaryIO) -> str:
    """Walk the elements, which are in the order of their tags, past the sequences before the series."""
    depth, implicit = 0, False
    while file.tell() < MAX_HEADER_BYTES:
        group, element = struct.unpack("<HH", file.read(4))
        tag = group << 16 | element
        if group == 0xFFFE or (implicit and group != 2):
            (length,) = struct.unpack("<I", file.read(4))
        elif (kind := file.read(2)) in LONG_LENGTH:
            _, length = struct.unpack("<HI", file.read(6))
        else:
            (length,) = struct.unpack("<H", file.read(2))
        if tag in (ITEM_END, SEQUENCE_END):
            depth -= 1
        elif length == UNDEFINED_LENGTH:
            implicit, depth = implicit or (tag != ITEM and kind == b"UN"), depth + 1
        elif depth == 0 and tag == SERIES_UID:
            return file.read(length).rstrip(b"\0 ").decode("ascii")
        elif depth == 0 and tag > SERIES_UID:
            return ""
        elif tag == TRANSFER_SYNTAX:
            implicit = file.read(length).rstrip(b"\0 ") == IMPLICIT
        else:
            file.seek(length, 1)
    return ""
