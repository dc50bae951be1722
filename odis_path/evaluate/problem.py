"""What is judged: embeddings with their classes, patients and folds, the same for a model and for all its baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from annotations.errors import UserError
from odis_path.evaluate.bootstrap import draw_clusters
from odis_path.evaluate.labelled import Chosen, Labels, apply_patients, choose_level, label_rows, read_labels
from odis_path.evaluate.splits import (
    Plan,
    Round,
    check_plan,
    cross_validation,
    given_split,
    group_codes,
    patients_in_split,
    shorten,
)
from odis_path.features import FeatureSet, read_features

FEW_GROUPS = 10


@dataclass(frozen=True)
class Problem:
    """features: n labelled rows. y int (n,) into names. group int (n,): the patient (or slide, or row) that is kept on one
    side. site: codes (n,), or None where not known. plan: folds. cluster int (t,): group of each tested row, 0..P-1;
    drawn float32 (B, P): bootstrap draws of these.
    """

    features: FeatureSet
    y: np.ndarray
    names: tuple[str, ...]
    groups: str
    group: np.ndarray
    site: np.ndarray | None
    plan: Plan
    cluster: np.ndarray
    drawn: np.ndarray
    warnings: tuple[str, ...]

    @property
    def tested(self) -> np.ndarray:
        return self.plan.tested

    @property
    def n_classes(self) -> int:
        return len(self.names)

    @property
    def n_patients(self) -> int:
        """Patients among the judged rows; rows whose patient is not known count for none."""
        return len(set(self.features.patient_id[self.tested].tolist()) - {""})

    def sha256(self) -> str:
        """Hash of the embeddings, labels, groups and folds judged."""
        digest = hashlib.sha256()
        for array in (self.features.x, self.y, self.group, self.plan.fold, self.features.coords, self.features.object):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("\0".join([*self.names, *self.features.slide_id.tolist()]).encode())
        return digest.hexdigest()


def prepare(
    feats: Path, labels: Path | str, *, probe: str, groups: str, level: str, split: Path | None, folds: int, seed: int,
    bootstrap: int, max_rows: int,
) -> Problem:  # fmt: skip
    """Read embeddings and labels, and say who is judged by whom. Raises UserError for what would make the result void."""
    told = read_labels(labels)
    level, warnings = choose_level(feats, told, level)
    chosen: list[Chosen] = []

    def select(index: FeatureSet) -> np.ndarray:
        chosen.append(label_rows(index, told, max_rows, seed))
        return chosen[0].rows

    features = read_features(feats, level, select)
    features = replace(features, patient_id=apply_patients(features, told, warnings.append))
    if split is not None:
        features = replace(features, patient_id=_fill_patients(features, split))
    warnings += told.warnings + chosen[0].warnings
    names = chosen[0].name.astype(str)
    group = group_codes(groups, features.patient_id, features.slide_id, str(feats))
    classes, y = np.unique(names, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"{told.where}: all {len(y)} labelled rows are {classes[0]}: two classes at least are needed")
    if split is not None:
        plan = given_split(split, y, group, features.patient_id, features.slide_id, seed)
    elif probe == "retrieval":
        plan = everyone_asks(group, groups)
    else:
        plan = cross_validation(y, group, folds, seed, groups)
    check_plan(plan, group) if split is not None or probe != "retrieval" else None
    warnings += [*plan.warnings, *group_warnings(groups, features, plan), *class_warnings(classes, y, group, plan)]
    if features.mode not in ("full", ""):
        warnings.append(
            f"mode {features.mode}: the boxes were given on both sides, in training and in testing, and to the baselines"
        )
    cluster, drawn = clusters(group[plan.tested], bootstrap, seed, warnings)
    site = _sites(features, told)
    return Problem(features, y, tuple(classes.tolist()), groups, group, site, plan, cluster, drawn, tuple(warnings))


def everyone_asks(group: np.ndarray, groups: str) -> Plan:
    """Retrieval without a split: each row asks all rows of other groups. Nothing is fitted, so there is one round."""
    if len(np.unique(group)) < 2:
        raise UserError(
            "labels: only one group (patient or slide) has labels: retrieval asks the rows of others, two are needed"
        )
    what = groups.removesuffix("_id") if groups != "none" else "row"
    return Plan(np.zeros(len(group), dtype=np.int64), (Round((0,), (0,), ()),), f"each row against all of every other {what}")


def clusters(group: np.ndarray, bootstrap: int, seed: int, warnings: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each tested row, and the draws (B, P); no draws, and so no intervals, for a single cluster."""
    found, cluster = np.unique(group, return_inverse=True)
    if bootstrap < 0:
        raise UserError(f"--bootstrap {bootstrap}: 1000 or more samples; 0 leaves the intervals out")
    if len(found) < 2:
        warnings.append("all judged rows are of one group: there is no interval, the result speaks of that one only")
        return cluster, np.zeros((0, len(found)), dtype=np.float32)
    if len(found) < FEW_GROUPS:
        warnings.append(f"intervals rest on {len(found)} groups only: they are rough, and likely too narrow")
    if bootstrap < 1000:
        warnings.append(f"--bootstrap {bootstrap}: intervals from fewer than 1000 samples are coarse")
    return cluster, draw_clusters(len(found), bootstrap, seed)


def group_warnings(groups: str, features: FeatureSet, plan: Plan) -> list[str]:
    """What to say where patients were not kept apart."""
    if groups == "patient_id":
        return []
    used = plan.fold >= 0
    patients = set(features.patient_id[used].tolist()) - {""}
    what = "slides" if groups == "slide_id" else "rows"
    known = f"{len(patients)} patients are known and may be on both sides" if patients else "patients are not known"
    return [f"--groups {groups}: single {what}, not patients, were kept apart ({known}): the score may be too high"]


def class_warnings(classes: np.ndarray, y: np.ndarray, group: np.ndarray, plan: Plan) -> list[str]:
    """Classes that some round tests without having seen them in training."""
    told, unseen = [], set()
    for r in plan.rounds:
        tested, trained = set(y[plan.rows(r.test)].tolist()), set(y[plan.rows(r.train)].tolist())
        unseen |= tested - trained
    if unseen:
        names = shorten([str(classes[c]) for c in sorted(unseen)])
        told.append(f"classes tested in a round that trained without them, so never found there: {names}")
    used = plan.fold >= 0
    single = [str(classes[c]) for c in np.unique(y[used]) if len(np.unique(group[used & (y == c)])) == 1]
    if single:
        told.append(f"classes of a single group, which cannot be both learned and judged: {shorten(single)}")
    return told


def _fill_patients(features: FeatureSet, split: Path) -> np.ndarray:
    """patient_id with the gaps filled from a split CSV that has both id columns."""
    patient_of: Mapping[str, str] = patients_in_split(split)
    pairs: Any = zip(features.slide_id.tolist(), features.patient_id.tolist(), strict=True)
    return np.array([patient or patient_of.get(slide, "") for slide, patient in pairs], dtype=object)


def _sites(features: FeatureSet, labels: Labels) -> np.ndarray | None:
    site = [labels.site.get(slide, "") for slide in features.slide_id.tolist()]
    if "" in site or len(set(site)) < 2:
        return None
    return np.unique(np.array(site), return_inverse=True)[1]
