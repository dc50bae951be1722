"""Count the tested patients an encoder was pretrained on: their labels were never used, but their tissue is not new."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from annotations.errors import UserError
from odis_path.evaluation.splits import SIDES, CrossValidation, Split, shorten, split_of_rows
from odis_path.features.pretraining import Pretraining
from odis_path.features.read import FeatureSet
from odis_path.tables import alike, spell_alike


@dataclass(frozen=True)
class FoldOverlap:
    """Counts of one outer fold. fold: its numbers in predictions.csv. tested and seen: how many patients."""

    fold: tuple[int, ...]
    tested: int
    seen: int


@dataclass(frozen=True)
class PretrainingOverlap:
    """Count of the tested patients that the encoder was pretrained on.

    unit: patients, or slides where no patient is known, or both. tested, seen, held_out: how many were judged, how many of them
    the encoder was trained on, how many the run kept out. folds: the same by outer fold. near: tested patients not seen, beside
    those seen that may be the same.
    """

    pretraining: Pretraining
    unit: str
    tested: int
    seen: int
    held_out: int
    folds: tuple[FoldOverlap, ...]
    near: tuple[tuple[str, ...], ...] = ()

    @property
    def known(self) -> bool:
        return self.pretraining.kind != "unknown"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of results.json; counts are None where they are not known."""
        p, known = self.pretraining, self.known
        return {
            "known": known,
            "kind": p.kind,
            "of": p.of,
            "why": p.why,
            "began_from": p.base,
            "unit": self.unit,
            "tested": self.tested,
            "seen": self.seen if known else None,
            "held_out": self.held_out if known else None,
            "per_fold": [{"fold": list(f.fold), "tested": f.tested, "seen": f.seen if known else None} for f in self.folds],
            "in_words": self.words(),
        }

    def words(self) -> str:
        """Describe it in a line, for the table and the report."""
        p = self.pretraining
        if p.kind == "unknown":
            return f"whether the encoder was pretrained on the tested {self.unit} is not known: {p.why}"
        if p.kind == "none":
            return f"pretrained on 0 of the {self.tested} tested {self.unit}: it is untrained"
        base = f"; it began from {p.base}, of whose data nothing is known" if p.base else ""
        return f"the encoder was pretrained on {self.seen} of the {self.tested} tested {self.unit}{base}"

    def warnings(self, *, split_given: bool) -> list[str]:
        """Warn where the score may be too high."""
        warnings = []
        if self.seen and self.known:
            advice = "" if split_given or not self.held_out else "; --split auto judges those that the run held out"
            warnings.append(f"{self.words()}: the score may be too high for new ones{advice}")
        if self.near:
            near = spell_alike([list(group) for group in self.near])
            warnings.append(f"tested patients that may be ones of the pretraining, and count as not seen: {near}")
        return warnings


def pretraining_overlap(cv: CrossValidation, features: FeatureSet, pretraining: Pretraining) -> PretrainingOverlap:
    """Count by patient_id, and by slide_id where there is none or the slide itself was trained on."""
    slides = {slide.slide_id for slide in pretraining.slides if slide.seen}
    patients = {slide.patient_id for slide in pretraining.slides if slide.seen} - {""}
    out = {name for slide in pretraining.slides if slide.split == "test" for name in (slide.patient_id, slide.slide_id)} - {""}
    patient_of_row, slide_of_row = features.patient_id.tolist(), features.slide_id.tolist()
    unit_of = [(patient, "") if patient else ("", slide) for patient, slide in zip(patient_of_row, slide_of_row, strict=True)]

    def count(rows: np.ndarray) -> tuple[set[tuple[str, str]], set[tuple[str, str]], set[tuple[str, str]]]:
        tested = {unit_of[i] for i in rows}
        seen = {unit_of[i] for i in rows if patient_of_row[i] in patients or slide_of_row[i] in slides}
        held = {unit_of[i] for i in rows if patient_of_row[i] in out or slide_of_row[i] in out}
        return tested, seen, held - seen

    folds = []
    for outer in cv.outer_folds:
        tested, seen, _ = count(cv.rows(outer.test))
        folds.append(FoldOverlap(outer.test, len(tested), len(seen)))
    tested, seen, held = count(cv.tested)
    bare = sum(1 for patient, _ in tested if not patient)
    unit = "patients" if not bare else "slides" if bare == len(tested) else "patients (slides where none is known)"
    fresh = {patient for patient, _ in tested - seen} - {""}
    near = [group for group in alike(fresh | patients, ids=True) if fresh & set(group) and patients & set(group)]
    return PretrainingOverlap(pretraining, unit, len(tested), len(seen), len(held), tuple(folds), tuple(map(tuple, near)))


def split_of_run(pretraining: Pretraining) -> Split:
    """The split of the run that made the encoder (--split auto). Raises UserError where it is not known or kept none out."""
    if pretraining.kind != "run":
        why = pretraining.why or "the encoder is untrained"
        raise UserError(f"--split auto: the run's split is not known: {why}: give the split.csv of the run")
    rows = [
        {"slide_id": slide.slide_id, "patient_id": slide.patient_id, "split": slide.split}
        for slide in pretraining.slides
        if slide.split in SIDES
    ]
    if not any(row["split"] == "test" for row in rows):
        raise UserError(f"--split auto: the run of {pretraining.of} held no patient out: give a split, or leave --split out")
    both = sorted({slide.slide_id for slide in pretraining.slides if slide.split == "test" and slide.seen})
    split = split_of_rows(f"the split of {pretraining.of}", "slide_id", rows)
    if not both:
        return split
    warning = f"held-out slides that the weights of the run were pretrained on before: {shorten(both)}"
    return replace(split, warnings=(*split.warnings, warning))
