"""The work list of an import: images, the names of their slide files, their patients, classes and resolution."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import inf
from pathlib import Path

from annotations.errors import UserError
from tiling.cohort import find_slides as find
from tiling.cohort.manifest import manifest_rows, mpp_in, patient_of
from tiling.storage.paths import expand_home, printable
from tiling.storage.slide_id import checked_id, default_id, safe_id

TIFF_EXTENSIONS = frozenset([".tif", ".tiff", ".btf"])
IMAGE_EXTENSIONS = find.IMAGE_EXTENSIONS | TIFF_EXTENSIONS
# What lies beside images without being one: boxes, tables, notes, what systems leave. It is left out without a word.
BESIDE = frozenset(
    ["", ".xml", ".json", ".geojson", ".csv", ".tsv", ".txt", ".md", ".yaml", ".yml", ".html", ".h5", ".db", ".ini"]
)
JOINT = "__"  # between folder and name where the name alone is not unique
SPLITS = ("train", "val", "test")  # a folder of this name around the class folders tells the side of a given split


@dataclass(frozen=True)
class ImageItem:
    """One image to import.

    key: its path below the folder that was given, with slashes; root: the name of that folder. label: its class folder,
    empty where there are none. split: train, val or test where a folder of that name holds the class folders, else empty.
    patient_id may be empty. mpp: the manifest's, if any. listed: False where there is a manifest without this image.
    """

    path: Path
    key: str
    slide_id: str
    patient_id: str = ""
    label: str = ""
    mpp: float | None = None
    listed: bool = True
    root: str = ""
    split: str = ""

    @property
    def folder(self) -> str:
        """The folders of the image joined to one name: what its shard is called after."""
        parts = self.key.split("/")[:-1]
        if self.split and parts[:1] != [self.split]:
            parts = [self.split, *parts]
        return JOINT.join(parts) or self.root

    def __str__(self) -> str:
        return self.slide_id


def find_images(images: Path | str | Sequence[Path | str]) -> list[ImageItem]:
    """Find images (IMAGE_EXTENSIONS) in folders, searched recursively, and among single files, in order of their paths.

    A line on stderr counts other pictures and slides that are left out.

    Images exactly one level below one given folder, in at least two folders, get their folder as `label`; so do those in
    class folders below `train`, `val` and `test`, which become their `split` (as does the given folder of such a name).
    Equal stems get their folder in front (`AC__name`). Raises UserError for what does not exist or holds no image.
    """
    inputs = [Path(images)] if isinstance(images, str | Path) else [Path(path) for path in images]
    keys: dict[Path, str] = {}
    root: dict[Path, str] = {}
    for given in inputs:
        for path, key in _expanded(expand_home(given)):
            if keys.setdefault(path, key) is key:
                root[path] = (given.absolute() if given.is_dir() else path.absolute().parent).name
    if not keys:
        raise UserError("no images given: name a folder of images")
    stems = _unique_stems(keys)
    items = [ImageItem(path, key, stems[path], patient_of(path.name), root=root[path]) for path, key in keys.items()]
    return _classified(items) if len(inputs) == 1 else items


def _classified(items: list[ImageItem]) -> list[ImageItem]:
    """Give the images of one folder their labels and splits, where its folders are classes."""
    folders = [tuple(item.key.split("/")[:-1]) for item in items]
    names = set(folders)
    if all(len(parts) == 1 for parts in names) and len(names) > 1 and not {parts[0] for parts in names} <= set(SPLITS):
        split = items[0].root if items[0].root in SPLITS else ""
        return [replace(item, label=parts[0], split=split) for item, parts in zip(items, folders, strict=True)]
    if all(len(parts) == 2 and parts[0] in SPLITS for parts in names) and len({parts[1] for parts in names}) > 1:
        return [replace(item, label=parts[1], split=parts[0]) for item, parts in zip(items, folders, strict=True)]
    return items


def apply_manifest(items: Sequence[ImageItem], manifest: Path) -> list[ImageItem]:
    """Take patients, and where given slide_id and mpp, from a CSV with the column `image`; other columns are ignored.

    An image is found by its path below the image folder or by its file name. Raises UserError for a missing file or
    column, a bad value, a name that means two images, or a manifest that lists none of the images.
    """
    rows = _manifest_rows(manifest)
    row_of = match_names(items, rows, manifest)
    if not row_of:
        raise UserError(f"{manifest}: lists none of the images (first row: {next(iter(rows))}): write their file names")
    new = []
    for item in items:
        if item.path not in row_of:
            new.append(replace(item, listed=False))
            continue
        line, row = rows[row_of[item.path]]
        slide_id = row.get("slide_id") or item.slide_id
        checked_id(slide_id, manifest)
        patient_id = row.get("patient_id") or item.patient_id
        new.append(replace(item, slide_id=slide_id, patient_id=patient_id, mpp=mpp_in(manifest, line, row)))
    owner: dict[str, ImageItem] = {}
    for item in new:
        first = owner.setdefault(item.slide_id, item)
        if first is not item:
            raise UserError(f"{manifest}: slide_id {item.slide_id} stands for both {first.path} and {item.path}: rename one")
    return new


def match_names(items: Sequence[ImageItem], names: Iterable[str], where: object) -> dict[Path, str]:
    """Match names, as a manifest or a COCO file writes them, to images: image path -> name.

    A name is a path that ends like the image's, or the bare file name, with or without its extension; of several that could
    mean an image, the one with most folders in common does. Raises UserError naming `where` for a name that means two
    images, and for two names that mean one image equally well.
    """
    by_key = {item.key: item for item in items}
    by_name: dict[str, list[ImageItem]] = {}
    for item in items:
        for name in {item.path.name, item.path.stem}:
            by_name.setdefault(name, []).append(item)
    best: dict[Path, tuple[float, str]] = {}
    for name in names:
        clean = name.replace("\\", "/").removeprefix("./")
        candidates = [by_key[clean]] if clean in by_key else by_name.get(clean.rsplit("/", 1)[-1], [])
        if len(candidates) > 1:
            exact = [item for item in candidates if f"/{item.path.absolute().as_posix()}".endswith(f"/{clean}")]
            if len(exact) != 1:
                first, second = candidates[:2]
                raise UserError(f"{where}: {name} means both {first.path} and {second.path}: write the folder in front")
            candidates = exact
        for item in candidates:
            common = inf if clean in by_key else _common_folders(clean, item.path)
            shared, rival = best.get(item.path, (-1, ""))
            if common == shared:
                raise UserError(f"{where}: {rival} and {name} both mean {item.path}: write its folders in front, or keep one")
            if common > shared:
                best[item.path] = (common, name)
    return {path: name for path, (_, name) in best.items()}


def _common_folders(name: str, path: Path) -> int:
    """Count the folders before the file name that a name shares with a path."""
    pairs = zip(reversed(name.split("/")[:-1]), reversed(path.absolute().parts[:-1]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _expanded(path: Path) -> list[tuple[Path, str]]:
    """List the images of a folder with their paths below it, sorted; or the one image that is given."""
    if path.is_file():
        if path.suffix.lower() not in IMAGE_EXTENSIONS:
            raise UserError(
                f"{path}: not a PNG, JPEG, TIFF or other image that is read ({_looked_for()}): give images, or a folder of them"
            )
        return [(path, path.name)]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    images = []
    skipped: Counter[str] = Counter()
    for folder, below, names in os.walk(path):  # scandir behind it: a million files in seconds
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in IMAGE_EXTENSIONS:
                image = Path(folder, name)
                images.append((image, image.relative_to(path).as_posix()))
            elif not name.startswith(".") and suffix not in BESIDE:
                skipped[suffix] += 1
    images = sorted((image, key) for image, key in images if image.is_file())
    left_out = f"left out: {', '.join(f'{count} {suffix}' for suffix, count in sorted(skipped.items()))}"
    if skipped.keys() & find.SLIDE_EXTENSIONS:
        left_out += " (slides are cut by odis-path tile)"
    if not images:
        what = f"; {left_out}" if skipped else ""
        raise UserError(f"{path}: holds no image (looked for {_looked_for()}, in its folders too){what}")
    if skipped:
        print(f"{path}: {left_out}", file=sys.stderr, flush=True)
    return images


def _looked_for() -> str:
    return " ".join(sorted(IMAGE_EXTENSIONS))


def _unique_stems(keys: Mapping[Path, str]) -> dict[Path, str]:
    """Name each image by its stem, as far as a file may be called so.

    Where it occurs more than once with folders in front, then with the extension behind.
    """

    def clashing(names: Mapping[Path, str]) -> list[Path]:
        times = Counter(names.values())
        return [path for path, name in names.items() if times[name] > 1]

    names = {path: default_id(path) for path in keys}
    for path in clashing(names):
        names[path] = safe_id(printable(JOINT.join([*keys[path].split("/")[:-1], default_id(path)])))
    for path in clashing(names):
        names[path] = safe_id(f"{names[path]}_{path.suffix[1:].lower()}")
    for path in clashing(names):
        names[path] = safe_id(printable(JOINT.join([path.absolute().parent.name, names[path]])))
    if alike := clashing(names):
        twice = [path for path in alike if names[path] == names[alike[0]]]
        raise UserError(f"{twice[0]}, {twice[1]}: both would be named {names[alike[0]]}: rename one, or use a manifest")
    return names


def _manifest_rows(manifest: Path) -> dict[str, tuple[int, dict[str, str]]]:
    """Read the line and row, stripped, of each value of column `image`."""
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    for line, values in manifest_rows(manifest, "image", "a CSV with the columns image and patient_id").rows:
        row = {name: text.strip() for name, text in values.items()}
        if not row["image"]:
            raise UserError(f"{manifest}: line {line}: column image is empty")
        if rows.setdefault(row["image"], (line, row))[1] != row:
            raise UserError(f"{manifest}: line {line}: {row['image']} is listed twice, differently: keep one")
    if not rows:
        raise UserError(f"{manifest}: lists no image")
    return rows


def box_file(folder: Path | None, item: ImageItem) -> Path | None:
    """Find the XML file of an image in a folder of box files: under the image's own folders, or flat; None: there is none."""
    if folder is None:
        return None
    key = Path(item.key).with_suffix(".xml")
    for path in (folder / key, folder / key.parent.name / key.name, folder / key.name):
        if path.is_file():
            return path
    return None
