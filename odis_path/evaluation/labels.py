"""Labels of embeddings: those stored with them, or a CSV of the user's; which rows are judged, and at which level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.splits import Split, shorten
from odis_path.features.read import FeatureSet, levels_in
from odis_path.tables import alike, is_missing, numbered_rows, spell_alike
from tiling.storage.csv_file import parse_whole_number

ANNOTATIONS = "annotations"
LEVELS = ("tile", "object", "slide")


@dataclass
class Labels:
    """Label names by key. kind: what a key names, "slide" (slide_id,), "tile" (slide_id, x, y) or "object" (slide_id, row).
    patient and site: by slide_id, where the CSV tells them. kind "annotations": the stored labels."""

    where: str
    kind: str = ANNOTATIONS
    name_of: dict[tuple[str | int, ...], str] = field(default_factory=dict)
    patient: dict[str, str] = field(default_factory=dict)
    site: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_labels(labels: Path | str) -> Labels:
    """Read a CSV with columns label and slide_id, and x, y or object where single tiles or objects are labelled; patient_id and
    site of the slide may be beside them. "annotations": the labels stored in the feature files. Raises UserError.
    """
    if str(labels) == ANNOTATIONS:
        return Labels(ANNOTATIONS)
    path = Path(labels)
    rows = numbered_rows(path)
    columns = set(rows[0][1])
    for name in ("slide_id", "label"):
        if name not in columns:
            raise UserError(f"{path}: no column {name}; its columns are {', '.join(rows[0][1])}: slide_id and label are needed")
    if len(columns & {"x", "y"}) == 1:
        raise UserError(f"{path}: one of the columns x and y without the other: tile labels need both")
    kind = "object" if "object" in columns else "tile" if "x" in columns else "slide"
    labelled = Labels(str(path), kind)
    blank, words = 0, Counter[str]()
    for number, row in rows:
        if is_missing(row["label"]):
            blank += not row["label"]
            words.update([row["label"]] if row["label"] else [])
            continue
        key = _key(path, number, row, kind)
        if labelled.name_of.setdefault(key, row["label"]) != row["label"]:
            raise UserError(
                f"{path}: line {number}: {_spell(key)} is labelled {labelled.name_of[key]} and {row['label']}: keep one"
            )
        for column, of in (("patient_id", labelled.patient), ("site", labelled.site)):
            value = row.get(column, "")
            if not is_missing(value) and of.setdefault(row["slide_id"], value) != value:
                raise UserError(f"{path}: line {number}: slide {row['slide_id']} has two values of {column}: keep one")
    if blank:
        labelled.warnings.append(f"{blank} lines of {path.name} have no label and were left out")
    labelled.warnings += _missing_words(path.name, words)
    for column in ("patient_id", "site"):
        unknown = sorted({row["slide_id"] for _, row in rows if row.get(column) and is_missing(row[column])})
        if unknown:
            labelled.warnings.append(
                f"{path.name}: {column} of {len(unknown)} slides is a word for none (nan, NA and the like) and was taken as "
                f"not known: {shorten(unknown)}"
            )
    if not labelled.name_of:
        raise UserError(f"{path}: no line has a label")
    return labelled


def _missing_words(where: str, words: Counter[str]) -> list[str]:
    """Warn of labels that read as a missing value."""
    if not words:
        return []
    counted = ", ".join(f"{name} ({count})" for name, count in sorted(words.items()))
    return [f"{where}: labels that stand for none were left out: {counted}; give a class of that name another one"]


def _key(path: Path, number: int, row: dict[str, str], kind: str) -> tuple[str | int, ...]:
    if not row["slide_id"]:
        raise UserError(f"{path}: line {number}: slide_id is empty: name the slide of each label")
    names = {"slide": (), "tile": ("x", "y"), "object": ("object",)}[kind]
    numbers = []
    for name in names:
        try:
            numbers.append(parse_whole_number(row[name]))
        except (ValueError, OverflowError):
            raise UserError(f"{path}: line {number}: {name} {row[name]!r} is not a whole number") from None
    return (row["slide_id"], *numbers)


def _spell(key: tuple[str | int, ...]) -> str:
    names = {1: ("slide",), 2: ("slide", "object"), 3: ("slide", "x", "y")}[len(key)]
    return " ".join(f"{name} {value}" for name, value in zip(names, key, strict=True))


def choose_level(folder: Path, labels: Labels, level: str) -> tuple[str, list[str]]:
    """Return the level to judge ("auto": by the labels and the folder) and warnings of the choice. Raises UserError."""
    if level not in ("auto", *LEVELS):
        raise UserError(f"--level {level}: no such level; take auto, tile, object or slide")
    present = levels_in(folder)
    if level != "auto":
        wanted = [level]
    else:
        wanted = {"slide": ["slide", "tile", "object"], ANNOTATIONS: ["tile", "object"]}.get(labels.kind, [labels.kind])
    usable = [name for name in wanted if name in present]
    if not usable:
        if level == "auto" and present:
            raise UserError(
                f"{labels.where}: labels of {wanted[0]}s, but {folder} holds embeddings of {', '.join(present)}s only"
            )
        return wanted[0], []  # reading it tells what is wrong
    if level != "auto" or len(usable) == 1:
        return usable[0], []
    options = " or ".join(f"--level {name}" for name in usable[1:])
    return usable[0], [f"the folder holds several levels: {usable[0]}s were judged; {options} judges the others"]


@dataclass
class Chosen:
    """The rows to judge, ascending, with the label name of each, and the patient of each row of the whole index."""

    rows: np.ndarray
    name: np.ndarray
    warnings: list[str]


def label_rows(index: FeatureSet, labels: Labels, max_rows: int, seed: int) -> Chosen:
    """Choose the labelled rows of an index (a FeatureSet without embeddings): of each object the row where most of it is
    seen, and no more than max_rows, drawn at random in equal shares per class. Raises UserError where nothing matches.
    """
    names = _stored(index, labels) if labels.kind == ANNOTATIONS else _from_csv(index, labels)
    rows = np.flatnonzero(names != "")
    warnings = []
    near = alike(set(names[rows].tolist()))
    if near:
        warnings.append(f"classes that may be one, and were judged as several: {spell_alike(near)}")
    if index.level == "object":
        rows = _best_seen(index, rows)
    if len(rows) > max_rows:
        warnings.append(f"{max_rows} of {len(rows)} labelled rows were judged, drawn at random (--max-rows)")
        rows = _draw(names[rows], rows, max_rows, seed)
    return Chosen(rows, names[rows], warnings)


def _stored(index: FeatureSet, labels: Labels) -> np.ndarray:
    if index.level == "slide":
        raise UserError("--labels annotations: slides have no stored labels: give a CSV with slide_id and label")
    names: np.ndarray = np.array([*index.labels, ""], dtype=object)[index.label]
    missing = np.array([bool(name) and is_missing(name) for name in [*index.labels, ""]])[index.label]
    labels.warnings += _missing_words("annotations", Counter(names[missing].tolist()))
    names[missing] = ""
    if not (names != "").any():
        raise UserError(
            f"--labels annotations: no {index.level} has a stored label: annotate the slides and embed again, or give a CSV"
        )
    return names


def _from_csv(index: FeatureSet, labels: Labels) -> np.ndarray:
    if labels.kind != "slide" and labels.kind != index.level:
        raise UserError(
            f"{labels.where}: it labels {labels.kind}s, but {index.level} embeddings are judged: say --level {labels.kind}"
        )
    columns: list[list[str | int]] = [index.slide_id.tolist()]
    if labels.kind == "tile":
        columns += [index.coords[:, 0].tolist(), index.coords[:, 1].tolist()]
    elif labels.kind == "object":
        columns.append(index.object.tolist())
    keys = list(zip(*columns, strict=True))
    names = np.array([labels.name_of.get(key, "") for key in keys], dtype=object)
    missing = set(labels.name_of) - set(keys)
    if len(missing) == len(labels.name_of):
        embedded, labelled = sorted(set(index.slide_id.tolist())), sorted({str(key[0]) for key in labels.name_of})
        raise UserError(
            f"{labels.where}: none of its {labels.kind}s is among the embeddings: "
            f"slide_ids there {shorten(labelled, 3)}; here {shorten(embedded, 3)}"
        )
    if missing:
        examples = ", ".join(_spell(key) for key in sorted(missing, key=str)[:3])
        near = alike({str(key[0]) for key in missing} | set(index.slide_id.tolist()), ids=True)
        hint = f"; slide_ids that may be one: {spell_alike(near)}" if near else ""
        labels.warnings.append(f"{len(missing)} labelled {labels.kind}s have no embedding and were left out: {examples}{hint}")
    bare = sorted(set(index.slide_id[names == ""].tolist()) - {str(key[0]) for key in labels.name_of})
    if bare:
        labels.warnings.append(
            f"{len(bare)} slides have no label in {Path(labels.where).name} and were left out: {shorten(bare)}"
        )
    return names


def _best_seen(index: FeatureSet, rows: np.ndarray) -> np.ndarray:
    """Choose of the rows of one object the one with the largest share visible, the first of equals; ascending."""
    slide = np.unique(index.slide_id[rows], return_inverse=True)[1] if len(rows) else np.zeros(0, int)
    order = np.lexsort((rows, -index.visible[rows], index.object[rows], slide))
    first = np.ones(len(rows), dtype=bool)
    same = (np.diff(slide[order]) == 0) & (np.diff(index.object[rows][order]) == 0)
    first[1:] = ~same
    return np.sort(rows[order][first])


def _draw(names: np.ndarray, rows: np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """Draw max_rows rows, every class in proportion but none below what an equal share would leave it; ascending."""
    rng = np.random.default_rng(seed)
    classes, code = np.unique(names.astype(str), return_inverse=True)
    count = np.bincount(code)
    # A class smaller than an equal share is kept whole; the rest share what remains in proportion to their size.
    floor = np.minimum(count, max(1, max_rows // (4 * len(classes))))
    above = count - floor
    take = floor + np.floor(above * max(0, max_rows - floor.sum()) / max(1, above.sum())).astype(int)
    drawn = [rng.permutation(rows[code == c])[: take[c]] for c in range(len(classes))]
    return np.sort(np.concatenate(drawn))


def apply_patients(features: FeatureSet, labels: Labels, split: Split | None, warn: Callable[[str], None]) -> np.ndarray:
    """Return patient_id of each row: the label CSV's before the file's before the split's; warn where they differ."""
    slides = features.slide_id.tolist()
    stored = np.array(["" if is_missing(name) else name for name in features.patient_id.tolist()], dtype=object)
    words = sorted(set(features.slide_id[(stored == "") & (features.patient_id != "")].tolist()))
    if words:
        warn(f"the files of {len(words)} slides name a patient nan, NA or the like: taken as not known: {shorten(words)}")
    given = np.array([labels.patient.get(slide, "") for slide in slides], dtype=object)
    _warn_of_differences(features, given, stored, "in the label CSV than in their files; the CSV's was taken", warn)
    patients = np.where(given != "", given, stored)
    if split is not None:
        in_split = np.array([split.patient_of.get(slide, "") for slide in slides], dtype=object)
        _warn_of_differences(features, in_split, patients, f"in {split.where} than here; the split's was not taken", warn)
        patients = np.where(patients != "", patients, in_split)
    near = alike(set(patients.tolist()) - {""}, ids=True)
    if near:
        warn(
            f"patient_ids that may be one ({spell_alike(near)}): they count as several, so that one patient may be learned "
            "from and judged"
        )
    return patients


def _warn_of_differences(features: FeatureSet, a: np.ndarray, b: np.ndarray, where: str, warn: Callable[[str], None]) -> None:
    differ = sorted(set(features.slide_id[(a != "") & (b != "") & (a != b)].tolist()))
    if differ:
        warn(f"{len(differ)} slides have another patient_id {where}: {shorten(differ)}")


def sites_of(features: FeatureSet, labels: Labels, warn: Callable[[str], None]) -> np.ndarray | None:
    """Return the code of each row's site, int (n,); None, with a warning, where it is not known of all, or all are of one."""
    if not labels.site:
        return None
    site = [labels.site.get(slide, "") for slide in features.slide_id.tolist()]
    bare = sorted({slide for slide, name in zip(features.slide_id.tolist(), site, strict=True) if not name})
    if bare:
        warn(f"{len(bare)} slides have no site ({shorten(bare)}): answers from other sites are not measured")
        return None
    near = alike(set(site))
    if near:
        warn(f"sites that may be one, and were taken as several: {spell_alike(near)}")
    if len(set(site)) < 2:
        warn(f"all slides are of the site {site[0]}: answers from other sites are not measured")
        return None
    return np.unique(np.array(site), return_inverse=True)[1]
