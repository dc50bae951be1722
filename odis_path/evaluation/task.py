"""The task of an evaluation: embeddings with classes, patients and folds, the same for a model and all its baselines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.bootstrap import Resamples, resample_patients
from odis_path.evaluation.labels import Chosen, apply_patients, choose_level, label_rows, read_labels, sites_of
from odis_path.evaluation.seen_patients import PretrainingOverlap, pretraining_overlap, split_of_run
from odis_path.evaluation.splits import (
    CrossValidation,
    OuterFold,
    Split,
    check_cross_validation,
    cross_validation,
    given_split,
    group_codes,
    read_split,
    shorten,
)
from odis_path.features.pretraining import Pretraining
from odis_path.features.read import FeatureSet, read_features

FEW_GROUPS = 10
AUTO_SPLIT = "auto"  # the split of the run that made the encoder


@dataclass(frozen=True)
class TaskOptions:
    """Options that decide who is judged by whom. labels: a CSV or "annotations". split: a CSV, "auto" or None."""

    labels: Path | str
    probe: str
    groups: str
    level: str
    split: Path | str | None
    folds: int
    seed: int
    bootstrap: int
    max_rows: int


@dataclass(frozen=True)
class EvaluationTask:
    """Labelled rows and who is judged by whom.

    features: n labelled rows. y int (n,) into names. group int (n,): the patient (or slide, or row) that is kept on one side.
    site: codes (n,), or None where not known. slide: codes (n,). cv: folds. resamples: of the groups of the tested rows.
    overlap: the tested patients that the encoder was pretrained on.
    """

    features: FeatureSet
    y: np.ndarray
    names: tuple[str, ...]
    groups: str
    group: np.ndarray
    site: np.ndarray | None
    slide: np.ndarray
    cv: CrossValidation
    resamples: Resamples
    overlap: PretrainingOverlap
    warnings: tuple[str, ...]

    @property
    def tested(self) -> np.ndarray:
        return self.cv.tested

    @property
    def n_classes(self) -> int:
        return len(self.names)

    @property
    def n_patients(self) -> int:
        """Patients among the judged rows; rows whose patient is not known count for none."""
        return len(set(self.features.patient_id[self.tested].tolist()) - {""})

    def sha256(self) -> str:
        """Hash the embeddings, labels, groups and folds judged."""
        digest = hashlib.sha256()
        for array in (self.features.x, self.y, self.group, self.cv.fold, self.features.coords, self.features.object):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("\0".join([*self.names, *self.features.slide_id.tolist()]).encode())
        return digest.hexdigest()


def prepare(feats: Path, options: TaskOptions) -> EvaluationTask:
    """Read embeddings and labels, and decide who is judged by whom. Raises UserError for what would make the result void."""
    if options.max_rows < 2:
        raise UserError(f"--max-rows {options.max_rows}: two rows at least")
    labels, seed, retrieval = read_labels(options.labels), options.seed, options.probe == "retrieval"
    level, warnings = choose_level(feats, labels, options.level)
    chosen: list[Chosen] = []

    def select(index: FeatureSet) -> np.ndarray:
        chosen.append(label_rows(index, labels, options.max_rows, seed))
        return chosen[0].rows

    features = read_features(feats, level, select)
    pretraining = features.pretraining_in(feats if feats.is_dir() else feats.parent)
    split = _split_of(options.split, pretraining)
    features = replace(features, patient_id=apply_patients(features, labels, split, warnings.append))
    warnings += labels.warnings + chosen[0].warnings
    group = group_codes(options.groups, features.patient_id, features.slide_id, str(feats))
    classes, y = np.unique(chosen[0].name.astype(str), return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"{labels.where}: all {len(y)} labelled rows are {classes[0]}: two classes at least are needed")
    if split is not None:
        cv = given_split(split, y, group, features.patient_id, features.slide_id, seed)
    elif retrieval:
        cv = cross_group_retrieval(group, options.groups)
    else:
        cv = cross_validation(y, group, options.folds, seed, options.groups)
    if split is not None or not retrieval:
        check_cross_validation(cv, group)
    warnings += [*cv.warnings, *group_warnings(options.groups, features, cv), *class_warnings(classes, y, group, cv)]
    if features.mode not in ("full", ""):
        warnings.append(
            f"mode {features.mode}: the boxes were given on both sides, in training and in testing, and to the baselines"
        )
    resamples = resample_groups(y[cv.tested], group[cv.tested], len(classes), options.bootstrap, seed, warnings)
    site = sites_of(features, labels, warnings.append) if retrieval else None
    overlap = pretraining_overlap(cv, features, pretraining)
    warnings += overlap.warnings(split_given=split is not None)
    slide, names = np.unique(features.slide_id.astype(str), return_inverse=True)[1], tuple(classes.tolist())
    return EvaluationTask(features, y, names, options.groups, group, site, slide, cv, resamples, overlap, tuple(warnings))


def _split_of(split: Path | str | None, pretraining: Pretraining) -> Split | None:
    if split is None:
        return None
    return split_of_run(pretraining) if split == AUTO_SPLIT else read_split(Path(split))


def cross_group_retrieval(group: np.ndarray, groups: str) -> CrossValidation:
    """Plan retrieval without a split: each row asks all rows of other groups. Nothing is fitted, so there is one outer fold."""
    if len(np.unique(group)) < 2:
        raise UserError(
            "labels: only one group (patient or slide) has labels: retrieval asks the rows of others, two are needed"
        )
    what = groups.removesuffix("_id") if groups != "none" else "row"
    return CrossValidation(
        np.zeros(len(group), dtype=np.int64), (OuterFold((0,), (0,), ()),), f"each row against all of every other {what}"
    )


def resample_groups(
    y: np.ndarray, group: np.ndarray, n_classes: int, bootstrap: int, seed: int, warnings: list[str]
) -> Resamples:
    """Draw samples of the groups of tested rows, y and group int (t,); none, and so no intervals, for a single group."""
    count, cluster = len(np.unique(group)), np.unique(group, return_inverse=True)[1]
    if bootstrap < 0:
        raise UserError(f"--bootstrap {bootstrap}: 1000 or more samples; 0 leaves the intervals out")
    resamples = resample_patients(y, cluster, n_classes, bootstrap, seed)
    if count < 2:
        warnings.append("all judged rows are of one group: there is no interval, the result speaks of that one only")
        return resamples
    if not bootstrap:
        return resamples
    if count < FEW_GROUPS:
        warnings.append(f"intervals rest on {count} groups only: they are wide, as so few cannot tell how groups differ")
    if bootstrap < 1000 and not resamples.is_jackknife:
        warnings.append(f"--bootstrap {bootstrap}: intervals from fewer than 1000 samples are coarse")
    lacking = int(resamples.lacking.sum())
    if lacking and not resamples.single:
        warnings.append(
            f"{lacking} of {len(resamples.weights)} samples of groups lacked a class and were left out of intervals"
        )
    return resamples


def group_warnings(groups: str, features: FeatureSet, cv: CrossValidation) -> list[str]:
    """Warn where patients were not kept apart."""
    if groups == "patient_id":
        return []
    used = cv.fold >= 0
    patients = set(features.patient_id[used].tolist()) - {""}
    what = "slides" if groups == "slide_id" else "rows"
    known = f"{len(patients)} patients are known and may be on both sides" if patients else "patients are not known"
    return [f"--groups {groups}: single {what}, not patients, were kept apart ({known}): the score may be too high"]


def class_warnings(classes: np.ndarray, y: np.ndarray, group: np.ndarray, cv: CrossValidation) -> list[str]:
    """Warn of classes that an outer fold tests without having seen them in training."""
    warnings, unseen = [], set()
    for outer in cv.outer_folds:
        tested, trained = set(y[cv.rows(outer.test)].tolist()), set(y[cv.rows(outer.train)].tolist())
        unseen |= tested - trained
    if unseen:
        names = shorten([str(classes[c]) for c in sorted(unseen)])
        warnings.append(f"classes tested in a round that trained without them, so never found there: {names}")
    used = cv.fold >= 0
    single = [str(classes[c]) for c in np.unique(y[used]) if len(np.unique(group[used & (y == c)])) == 1]
    if single:
        warnings.append(f"classes of a single group, which cannot be both learned and judged: {shorten(single)}")
    judged_y, judged_group = y[cv.tested], group[cv.tested]
    alone = [str(classes[c]) for c in np.unique(judged_y) if len(np.unique(judged_group[judged_y == c])) == 1]
    if alone and len(np.unique(judged_group)) > 1:
        warnings.append(
            f"classes judged on one group alone: {shorten(alone)}: averages over classes have no interval, "
            "as how groups differ in such a class cannot be known"
        )
    return warnings
