"""Who is judged by whom: folds of whole patients, and the rounds of training, choosing and testing made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from tiling.csvfile import read_csv_file

GROUPS = ("patient_id", "slide_id", "none")
SIDES = ("train", "val", "test")
INNER_FOLDS = 4


@dataclass(frozen=True)
class Round:
    """Fold numbers: fit on `train`, judge `test`. inner: (validation folds, training folds) to choose k or C by."""

    test: tuple[int, ...]
    train: tuple[int, ...]
    inner: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class Plan:
    """fold int (n,): the fold of each row, -1 for rows left out; no group is in two folds. `name` tells what was done."""

    fold: np.ndarray
    rounds: tuple[Round, ...]
    name: str
    warnings: tuple[str, ...] = ()

    @property
    def n_folds(self) -> int:
        return int(self.fold.max(initial=-1)) + 1

    def rows(self, folds: tuple[int, ...]) -> np.ndarray:
        """Row numbers of some folds, int64."""
        return np.flatnonzero(np.isin(self.fold, folds))

    @property
    def tested(self) -> np.ndarray:
        """Row numbers that are judged, each once, in ascending order."""
        return self.rows(tuple(f for r in self.rounds for f in r.test))


def group_codes(groups: str, patient_id: np.ndarray, slide_id: np.ndarray, where: str) -> np.ndarray:
    """Number of the group of each row, int64 (n,). Raises UserError where the grouping asked for is not known."""
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
    """The first few ids, and how many more."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def cross_validation(y: np.ndarray, group: np.ndarray, folds: int, seed: int, groups: str) -> Plan:
    """Every row is judged once, by a model that saw no row of its group; k or C chosen on the remaining folds in turn.

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
        fold, rounds = _two_folds(y, group, fold, seed)
    else:
        rounds = tuple(_leave_out(f, tuple(g for g in range(used) if g != f)) for f in range(used))
    return Plan(fold, rounds, name, tuple(warnings))


def _leave_out(test: int, train: tuple[int, ...]) -> Round:
    inner = tuple(((g,), tuple(h for h in train if h != g)) for g in train) if len(train) > 1 else ()
    return Round((test,), train, inner)


def _two_folds(y: np.ndarray, group: np.ndarray, fold: np.ndarray, seed: int) -> tuple[np.ndarray, tuple[Round, ...]]:
    """Halve both folds again, so that there is something to choose by."""
    fine = np.empty_like(fold)
    for f in range(2):
        rows = np.flatnonzero(fold == f)
        several = len(np.unique(group[rows])) > 1
        fine[rows] = 2 * f + (grouped_folds(y[rows], group[rows], 2, seed) if several else 0)
    # A half that could not be halved again leaves a gap in the numbers.
    numbers, fine = np.unique(fine, return_inverse=True)
    sides = [tuple(int(i) for i in np.flatnonzero(numbers // 2 == f)) for f in range(2)]
    rounds = tuple(
        Round(sides[t], sides[1 - t], tuple(((g,), tuple(h for h in sides[1 - t] if h != g)) for g in sides[1 - t])
              if len(sides[1 - t]) > 1 else ())
        for t in range(2)
    )  # fmt: skip
    return fine.astype(np.int64), rounds


def grouped_folds(y: np.ndarray, group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each row, int64 (n,): whole groups, classes spread as evenly as they allow. Empty folds are closed up."""
    import warnings

    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    fold = np.zeros(len(y), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer rows than folds: the result tells it
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


def read_split(path: Path) -> tuple[str, dict[str, str]]:
    """A CSV with columns `split` (train, val, test) and `patient_id` or `slide_id` -> the id column, and side by id.

    With both id columns, slide_id tells the side. An id on two sides is a UserError that names it.
    """
    rows = read_csv(path)
    columns = list(rows[0])
    key = "slide_id" if "slide_id" in columns else "patient_id"
    if "split" not in columns or key not in columns:
        raise UserError(f"{path}: needs a column split and one of slide_id, patient_id; its columns are {', '.join(columns)}")
    side: dict[str, str] = {}
    twice = set()
    for row in rows:
        name, value = row[key], row["split"].lower()
        if value not in SIDES:
            raise UserError(f"{path}: split {row['split']!r} of {key} {name}: take one of {', '.join(SIDES)}")
        if not name:
            raise UserError(f"{path}: a line has no {key}: name what is on the side {value}")
        if side.setdefault(name, value) != value:
            twice.add(name)
    if twice:
        raise UserError(f"{path}: {key} on two sides: {shorten(sorted(twice))}: give each one side")
    return key, side


def patients_in_split(path: Path) -> dict[str, str]:
    """slide_id -> patient_id, of a split CSV that has both columns; empty for others. UserError for a slide of two patients."""
    patient_of: dict[str, str] = {}
    for row in read_csv(path):
        slide, patient = row.get("slide_id", ""), row.get("patient_id", "")
        if slide and patient and patient_of.setdefault(slide, patient) != patient:
            raise UserError(f"{path}: slide {slide} is of patients {patient_of[slide]} and {patient}: keep one")
    return patient_of


def given_split(path: Path, y: np.ndarray, group: np.ndarray, patient_id: np.ndarray, slide_id: np.ndarray, seed: int) -> Plan:
    """The user's split. k or C is chosen on `val` where there is one, else on folds of whole groups within `train`.

    Rows whose id is not in the file are left out, and counted. A patient on two sides is a UserError that names the ids.
    """
    key, side_of = read_split(path)
    ids = patient_id if key == "patient_id" else slide_id
    side = np.array([side_of.get(name, "") for name in ids.tolist()], dtype=object)
    _refuse_leaks(path, side, patient_id)
    train, val, test = (np.flatnonzero(side == name) for name in SIDES)
    for name, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise UserError(f"{path}: no labelled row is on the side {name}: its {key}s must be those of the feature files")
    fold = np.full(len(y), -1, dtype=np.int64)
    if len(val):
        fold[train], fold[val], fold[test] = 0, 1, 2
        plan_round = Round((2,), (0,), (((1,), (0,)),))
    else:
        count = len(np.unique(group[train]))
        fold[train] = grouped_folds(y[train], group[train], min(INNER_FOLDS, count), seed) if count > 1 else 0
        inner = int(fold.max()) + 1
        fold[test] = inner
        plan_round = _leave_out(inner, tuple(range(inner)))
    missing = sorted(set(ids[side == ""].tolist()) - {""})
    warnings = (f"{len(missing)} {key}s are not in {path.name} and were left out: {shorten(missing)}",) if missing else ()
    return Plan(fold, (plan_round,), f"{path}", warnings)


def _refuse_leaks(path: Path, side: np.ndarray, patient_id: np.ndarray) -> None:
    known = (patient_id != "") & (side != "")
    sides: dict[str, set[str]] = {}
    for patient, where in zip(patient_id[known].tolist(), side[known].tolist(), strict=True):
        sides.setdefault(patient, set()).add(where)
    leaks = sorted(patient for patient, where in sides.items() if len(where) > 1)
    if leaks:
        raise UserError(f"{path}: patients on two sides: {shorten(leaks, 10)}: put all slides of a patient on one side")


def check_plan(plan: Plan, group: np.ndarray) -> None:
    """ValueError where a group is in two folds, or a round trains on what it tests: a bug, never a user's mistake."""
    used = plan.fold >= 0
    pairs = np.unique(np.stack([group[used], plan.fold[used]], 1), axis=0)
    if len(np.unique(pairs[:, 0])) != len(pairs):
        raise ValueError("a group is in two folds")
    for r in plan.rounds:
        seen = set(r.train).union(*(set(val) | set(train) for val, train in r.inner))
        if seen & set(r.test) or any(set(val) & set(train) for val, train in r.inner):
            raise ValueError("a round trains on rows it tests")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with a header, every value stripped. Raises UserError where it cannot be read."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The same with the line of each row (`tiling.csvfile`)."""
    rows = [(line, {name: text.strip() for name, text in row.items()}) for line, row in read_csv_file(Path(path)).rows]
    if not rows:
        raise UserError(f"{path}: holds no rows: a header line and one line per item are needed")
    return rows
