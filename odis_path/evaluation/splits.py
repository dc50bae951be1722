"""Split rows by whole patients: folds, and the rounds of training, choosing and testing made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from odis_path.tables import alike, is_missing, read_csv, spell_alike

GROUPS = ("patient_id", "slide_id", "none")
SIDES = ("train", "val", "test")
INNER_FOLDS = 4


@dataclass(frozen=True)
class OuterFold:
    """Numbers of folds: fit on `train`, judge `test`. inner: (validation folds, training folds) to choose k or C by."""

    test: tuple[int, ...]
    train: tuple[int, ...]
    inner: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class CrossValidation:
    """fold int (n,): the fold of each row, -1 for rows left out; no group is in two folds. `name` describes it."""

    fold: np.ndarray
    outer_folds: tuple[OuterFold, ...]
    name: str
    warnings: tuple[str, ...] = ()

    @property
    def n_folds(self) -> int:
        return int(self.fold.max(initial=-1)) + 1

    def rows(self, folds: tuple[int, ...]) -> np.ndarray:
        """Return the row numbers of these folds, int64."""
        return np.flatnonzero(np.isin(self.fold, folds))

    @property
    def tested(self) -> np.ndarray:
        """The row numbers that are judged, each once, in ascending order."""
        return self.rows(tuple(f for outer in self.outer_folds for f in outer.test))


def group_codes(groups: str, patient_id: np.ndarray, slide_id: np.ndarray, where: str) -> np.ndarray:
    """Return the number of each row's group, int64 (n,). Raises UserError where the grouping asked for is not known."""
    if groups not in GROUPS:
        raise UserError(f"--groups {groups}: no such grouping; take one of {', '.join(GROUPS)}")
    if groups == "none":
        return np.arange(len(slide_id))
    if groups == "patient_id":
        bare = sorted(set(slide_id[patient_id == ""].tolist()))
        if bare:
            raise UserError(
                f"{where}: no patient_id for {len(bare)} slides ({shorten(bare)}): add a column "
                "patient_id to the label CSV or the manifest, or say --groups slide_id (or none), which the result repeats"
            )
    return np.unique(patient_id if groups == "patient_id" else slide_id, return_inverse=True)[1].astype(np.int64)


def shorten(ids: list[str], limit: int = 5) -> str:
    """Write the first few ids, and the number of the rest."""
    rest = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + rest


def cross_validation(y: np.ndarray, group: np.ndarray, folds: int, seed: int, groups: str) -> CrossValidation:
    """Judge every row once, by a model that saw no row of its group; k or C chosen on the remaining folds in turn.

    y int (n,), group int (n,). Raises UserError for fewer than two groups.
    """
    if folds < 2:
        raise UserError(f"--folds {folds}: at least 2")
    count = len(np.unique(group))
    if count < 2:
        what = "row" if groups == "none" else groups.removesuffix("_id")
        raise UserError(f"labels: only one {what} has labels: two are needed, one to learn from and one to be judged")
    # A class of g groups can be spread over g folds at most; one of a single group can never be learned and judged.
    per_class = [len(np.unique(group[y == c])) for c in np.unique(y)]
    possible = min([count, *(max(2, groups_of) for groups_of in per_class)])
    warnings = []
    if possible < folds:
        why = f"only {count} groups" if possible == count else f"a class has only {min(per_class)} groups"
        warnings.append(f"{why}: {possible} folds in place of {folds}")
    fold = grouped_folds(y, group, min(folds, possible), seed)
    used = fold.max() + 1
    name = f"{used}-fold by {groups}" if groups != "none" else f"{used}-fold of single rows, patients not kept apart"
    if used == 2:
        fold, outer_folds = _two_folds(y, group, fold, seed)
    else:
        outer_folds = tuple(_outer_fold(f, tuple(g for g in range(used) if g != f)) for f in range(used))
    return CrossValidation(fold, outer_folds, name, tuple(warnings))


def _outer_fold(test: int, train: tuple[int, ...]) -> OuterFold:
    inner = tuple(((g,), tuple(h for h in train if h != g)) for g in train) if len(train) > 1 else ()
    return OuterFold((test,), train, inner)


def _two_folds(y: np.ndarray, group: np.ndarray, fold: np.ndarray, seed: int) -> tuple[np.ndarray, tuple[OuterFold, ...]]:
    """Halve both folds again, so that there is something to choose by."""
    fine = np.empty_like(fold)
    for f in range(2):
        rows = np.flatnonzero(fold == f)
        several = len(np.unique(group[rows])) > 1
        fine[rows] = 2 * f + (grouped_folds(y[rows], group[rows], 2, seed) if several else 0)
    # A half that could not be halved again leaves a gap in the numbers.
    numbers, fine = np.unique(fine, return_inverse=True)
    sides = [tuple(int(i) for i in np.flatnonzero(numbers // 2 == f)) for f in range(2)]
    outer_folds = tuple(
        OuterFold(
            sides[t],
            sides[1 - t],
            tuple(((g,), tuple(h for h in sides[1 - t] if h != g)) for g in sides[1 - t]) if len(sides[1 - t]) > 1 else (),
        )
        for t in range(2)
    )
    return fine.astype(np.int64), outer_folds


def grouped_folds(y: np.ndarray, group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Deal the rows out to folds, int64 (n,): whole groups, classes spread as evenly as they allow. Empty folds close up."""
    import warnings

    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    fold = np.zeros(len(y), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer rows than folds
        splitter: Any
        if np.bincount(y).max() < folds:
            # Classes smaller than the number of folds cannot be spread: groups are dealt out at random.
            names = np.unique(group)
            splitter = KFold(folds, shuffle=True, random_state=seed)
            parts = [np.flatnonzero(np.isin(group, names[test])) for _, test in splitter.split(names)]
        else:
            single = len(np.unique(group)) == len(group)
            splitter = (StratifiedKFold if single else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
            parts = [test for _, test in splitter.split(y, y, group)]
    for number, test in enumerate(parts):
        fold[test] = number
    return np.unique(fold, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class Split:
    """Sides (train, val, test) by id. where: the file, or what made it. key: which id, slide_id or patient_id.
    patient_of: slide_id -> patient_id, where it tells both."""

    where: str
    key: str
    side: Mapping[str, str]
    patient_of: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def read_split(path: Path) -> Split:
    """Read a CSV with columns `split` (train, val, test) and `patient_id` or `slide_id`.

    With both id columns, slide_id tells the side. Raises UserError that names it for an id on two sides, a patient whose
    slides are on two sides, and a slide of two patients.
    """
    rows = read_csv(path)
    columns = list(rows[0])
    key = "slide_id" if "slide_id" in columns else "patient_id"
    if "split" not in columns or key not in columns:
        raise UserError(f"{path}: needs a column split and one of slide_id, patient_id; its columns are {', '.join(columns)}")
    return split_of_rows(str(path), key, rows)


def split_of_rows(where: str, key: str, rows: Iterable[Mapping[str, str]]) -> Split:
    """Make the split of rows with `split`, `patient_id` and `slide_id`; see `read_split`."""
    side: dict[str, str] = {}
    patient_of: dict[str, str] = {}
    sides_of: dict[str, set[str]] = {}
    twice = set()
    for row in rows:
        name, value, patient = row[key], row["split"].lower(), row.get("patient_id", "")
        if value not in SIDES:
            raise UserError(f"{where}: split {row['split']!r} of {key} {name}: take one of {', '.join(SIDES)}")
        if not name:
            raise UserError(f"{where}: a line has no {key}: name what is on the side {value}")
        if side.setdefault(name, value) != value:
            twice.add(name)
        if key == "slide_id" and not is_missing(patient):
            if patient_of.setdefault(name, patient) != patient:
                raise UserError(f"{where}: slide {name} is of patients {patient_of[name]} and {patient}: keep one")
            sides_of.setdefault(patient, set()).add(value)
    if twice:
        raise UserError(f"{where}: {key} on two sides: {shorten(sorted(twice))}: give each one side")
    _refuse_leaks(where, sides_of)
    near = alike(sides_of or (side if key == "patient_id" else ()), ids=True)
    warnings = (f"{where}: patient_ids that may be one, and count as several: {spell_alike(near)}",) if near else ()
    return Split(where, key, side, patient_of, warnings)


def given_split(
    split: Split, y: np.ndarray, group: np.ndarray, patient_id: np.ndarray, slide_id: np.ndarray, seed: int
) -> CrossValidation:
    """Plan by the user's split. k or C is chosen on `val` where there is one, else on folds of whole groups within `train`.

    Rows whose id is not in the file are left out, and counted. A patient on two sides is a UserError that names the ids.
    """
    ids = patient_id if split.key == "patient_id" else slide_id
    side = np.array([split.side.get(name, "") for name in ids.tolist()], dtype=object)
    sides_of: dict[str, set[str]] = {}
    for patient, where in zip(patient_id.tolist(), side.tolist(), strict=True):
        if patient and where:
            sides_of.setdefault(patient, set()).add(where)
    _refuse_leaks(split.where, sides_of)
    train, val, test = (np.flatnonzero(side == name) for name in SIDES)
    for name, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise UserError(
                f"{split.where}: no labelled row is on the side {name}: its {split.key}s must be those of the feature files"
            )
    fold = np.full(len(y), -1, dtype=np.int64)
    if len(val):
        fold[train], fold[val], fold[test] = 0, 1, 2
        outer = OuterFold((2,), (0,), (((1,), (0,)),))
    else:
        count = len(np.unique(group[train]))
        fold[train] = grouped_folds(y[train], group[train], min(INNER_FOLDS, count), seed) if count > 1 else 0
        inner = int(fold.max()) + 1
        fold[test] = inner
        outer = _outer_fold(inner, tuple(range(inner)))
    missing = sorted(set(ids[side == ""].tolist()) - {""})
    file = Path(split.where).name
    warnings = (f"{len(missing)} {split.key}s are not in {file} and were left out: {shorten(missing)}",) if missing else ()
    return CrossValidation(fold, (outer,), split.where, (*split.warnings, *warnings))


def _refuse_leaks(where: str, sides_of: Mapping[str, set[str]]) -> None:
    leaks = sorted(patient for patient, sides in sides_of.items() if len(sides) > 1)
    if leaks:
        raise UserError(f"{where}: patients on two sides: {shorten(leaks, 10)}: put all slides of a patient on one side")


def check_cross_validation(cv: CrossValidation, group: np.ndarray) -> None:
    """Raise ValueError where a group is in two folds, or an outer fold trains on what it tests: a bug, not a user's mistake."""
    used = cv.fold >= 0
    pairs = np.unique(np.stack([group[used], cv.fold[used]], 1), axis=0)
    if len(np.unique(pairs[:, 0])) != len(pairs):
        raise ValueError("a group is in two folds")
    for outer in cv.outer_folds:
        seen = set(outer.train).union(*(set(val) | set(train) for val, train in outer.inner))
        if seen & set(outer.test) or any(set(val) & set(train) for val, train in outer.inner):
            raise ValueError("a round trains on rows it tests")
