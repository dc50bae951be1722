"""Coverage of the 95 % intervals of `evaluate`: simulated patients, by number of patients and design.

A patient's rows share random effects (of each class, and a leaning towards some class), patients are of uneven size, and two
models of correlated scores are judged, so that the paired difference has an interval too. The truth is the score on very many
patients of the same kind. Prints a table and writes JSON.

    python experiments/coverage.py --simulations 2000 --json experiments/results/coverage.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from odis_path.evaluation.bootstrap import Estimate, Predictions, Resamples, estimate_classes, estimate_mean, resample_patients

PATIENTS = (5, 10, 20, 40)
LIMITS = (0.93, 0.97)
MEASURES = ("balanced_accuracy", "macro_f1", "accuracy", "auroc", "precision", "difference")


@dataclass(frozen=True)
class Design:
    """A kind of cohort. nested: a patient has one class only, else rows of several. rows: mean per patient; uneven: standard
    deviation of the logarithm of it. signal: distance of a class from the others in units of row noise, of the better
    model. effect: standard deviation of patients' effects, in the same units."""

    name: str
    classes: int
    nested: bool
    rows: float = 30.0
    uneven: float = 0.7
    signal: float = 1.6
    effect: float = 0.6


DESIGNS = (
    Design("3 classes in each patient", 3, False),
    Design("3 classes in each patient, high scores", 3, False, signal=3.0),
    Design("5 classes in each patient, large patients", 5, False, rows=120.0, effect=0.4),
    Design("2 classes, one a patient", 2, True),
    Design("2 classes, one a patient, equal sizes", 2, True, uneven=0.0),
)


@dataclass(frozen=True)
class Sample:
    """n rows: y int (n,), patient int (n,), scores (n, C) of two models, precision (n,) of a retrieval by the first."""

    y: np.ndarray
    patient: np.ndarray
    scores: tuple[np.ndarray, np.ndarray]
    precision: np.ndarray


def simulate(design: Design, patients: int, rng: np.random.Generator) -> Sample:
    """Draw patients and the scores of their rows."""
    c = design.classes
    spread = np.exp(design.uneven * rng.normal(size=patients) - design.uneven**2 / 2)
    patient = np.repeat(np.arange(patients), np.maximum(2, np.round(design.rows * spread)).astype(int))
    if design.nested:
        y = patient % c
    else:
        share = rng.dirichlet(np.full(c, 2.0), size=patients).cumsum(axis=1)
        y = np.minimum((rng.random(len(patient))[:, None] > share[patient]).sum(axis=1), c - 1)
    here = np.eye(c)[y]

    def effects() -> np.ndarray:
        by_class, leaning = rng.normal(size=(patients, c, c)), rng.normal(size=(patients, 1, c))
        values: np.ndarray = design.effect * (by_class + leaning)[patient, y if c > 1 else 0]
        return values

    shared, noise = effects(), rng.normal(size=here.shape)
    first = design.signal * here + shared + noise
    second = 0.8 * design.signal * here + 0.7 * (shared + noise) + 0.7 * (effects() + rng.normal(size=here.shape))
    margin = first[np.arange(len(y)), y] - np.where(here > 0, -np.inf, first).max(axis=1)
    return Sample(y, patient, (first, second), rng.binomial(10, 1 / (1 + np.exp(-margin))) / 10)


def estimates(sample: Sample, resamples: Resamples, classes: int) -> dict[str, Estimate]:
    """Every measure of a sample, by the code that `evaluate` runs."""
    by_measure, weaker = (
        estimate_classes(
            sample.y, Predictions(s.argmax(axis=1)[None], s[None]), resamples, classes, with_auroc=s is sample.scores[0]
        )
        for s in sample.scores
    )
    by_measure["precision"] = estimate_mean(sample.precision, resamples)
    by_measure["difference"] = by_measure["balanced_accuracy"].minus(weaker["balanced_accuracy"])
    return by_measure


def truth_of(design: Design, seed: int, patients: int = 4000, parts: int = 12) -> dict[str, float]:
    """The score of each measure on very many patients."""
    total: defaultdict[str, float] = defaultdict(float)
    for part in range(parts):
        sample = simulate(design, patients, np.random.default_rng([seed, part, 1]))
        resamples = resample_patients(sample.y, sample.patient, design.classes, 0, 0)
        for name, estimate in estimates(sample, resamples, design.classes).items():
            total[name] += estimate.point / parts
    return dict(total)


def coverage(
    design: Design, patients: int, truth: dict[str, float], simulations: int, samples: int, seed: int, *, plain: bool = False
) -> dict[str, float]:
    """Share of simulations in which each measure's interval holds the truth; `simulations` counts those with intervals.

    plain: percentiles of the plain bootstrap (n of n patients drawn among all) in place of the intervals of `evaluate`.
    """
    held: Counter[str] = Counter()
    done = 0
    for number in range(simulations):
        rng = np.random.default_rng([seed, patients, number])
        sample = simulate(design, patients, rng)
        resamples = resample_patients(sample.y, sample.patient, design.classes, samples, number)
        if resamples.single:
            continue  # no interval is given where one patient alone has a class
        if plain:
            weights = rng.multinomial(patients, np.full(patients, 1 / patients), size=samples).astype(np.float32)
            resamples = replace(resamples, weights=weights, is_jackknife=False, lacking=np.zeros(samples, bool))
        done += 1
        for name, estimate in estimates(sample, resamples, design.classes).items():
            interval = estimate.interval()
            low, high = np.nanpercentile(estimate.replicates, [2.5, 97.5]) if plain else (interval.low, interval.high)
            assert low is not None
            assert high is not None
            held[name] += bool(low <= truth[name] <= high)
    return {"simulations": done, **{name: held[name] / done for name in MEASURES}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=500, help="bootstrap samples, of --plain or beyond 100 patients")
    parser.add_argument("--patients", default=",".join(map(str, PATIENTS)))
    parser.add_argument("--designs", default="", help="numbers of designs, from 0 on; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="percentiles of the plain bootstrap, to compare with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    chosen = [DESIGNS[int(i)] for i in options.designs.split(",") if i] or list(DESIGNS)
    rows, missed = [], 0
    for design in chosen:
        truth = truth_of(design, options.seed)
        for patients in map(int, options.patients.split(",")):
            row = coverage(design, patients, truth, options.simulations, options.samples, options.seed, plain=options.plain)
            rows.append({"design": design.name, "patients": patients, "truth": truth, **row})
            missed += sum(not LIMITS[0] <= row[name] <= LIMITS[1] for name in MEASURES)
            cells = "  ".join(f"{name} {row[name]:.3f}" for name in MEASURES)
            print(f"{design.name:42} {patients:3} patients: {cells}", flush=True)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"limits": LIMITS, "options": settings, "rows": rows}, indent=2) + "\n")
    print(f"{missed} of {len(rows) * len(MEASURES)} outside {LIMITS[0]} to {LIMITS[1]}")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
