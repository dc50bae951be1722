"""Tables of the study: scores by arm and mode, and paired differences with intervals over seeds and patients."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from scipy import stats

from odis_path.evaluation.metrics import balanced_from_confusion

Row = dict[str, Any]
PAIRS = [
    ("odis", "untrained"),
    ("odis", "crop_only"),
    ("odis", "dino"),
    ("odis", "ibot"),
    ("crop_only", "dino"),
    ("crop_only", "untrained"),
    ("dino", "untrained"),
    ("mask_only", "odis"),
    ("linear_pool", "odis"),
    ("multi_obj_2", "odis"),
    ("multi_obj_4", "odis"),
    ("readonly_4", "odis"),
    ("jittered_boxes", "odis"),
    ("random_boxes", "odis"),
    ("stain_swap", "odis"),
    ("tile_objects", "odis"),
    ("tile_center", "tile_objects"),
    ("odis_patches", "odis"),
    ("odis_patches", "ibot"),
    ("whole_half", "odis"),
    ("sinkhorn", "odis"),
]
DRAWS = 2000
PROBES = ("knn", "linear")


def table(rows: list[Row]) -> str:
    """Markdown: of each size, length and corpus the scores, then the differences of PAIRS that have at least two seeds."""
    lines: list[str] = []
    kinds = sorted({(row["size"], row["corpus"], row["steps"]) for row in rows})
    for size, corpus, steps in kinds:
        here = [row for row in rows if (row["size"], row["corpus"], row["steps"]) == (size, corpus, steps)]
        lines += [f"### {corpus}, {steps} steps, size {size}", "", *_scores(here), "", *_differences(here), ""]
    return "\n".join(lines)


def _scores(rows: list[Row]) -> list[str]:
    modes = list(dict.fromkeys(mode for row in rows for mode in row["scores"]))
    lines = ["| arm | seeds | " + " | ".join(f"{mode}: k-NN / linear" for mode in modes) + " | patient, class share | CPU s |"]
    lines.append("|---" * (len(modes) + 4) + "|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        arm_rows = [row for row in rows if row["arm"] == arm]
        cells = []
        for mode in modes:
            having = [row for row in arm_rows if mode in row["scores"]]
            values = [
                np.mean([row["scores"][mode][probe]["balanced_accuracy"] for row in having]) for probe in PROBES if having
            ]
            cells.append(" / ".join(f"{value:.3f}" for value in values))
        shares = [f"{np.mean([row[k] for row in arm_rows]):.2f}" for k in ("patient_share", "class_share") if k in arm_rows[0]]
        seconds = np.mean([row["cpu_s"] for row in arm_rows])
        lines.append(f"| {arm} | {len(arm_rows)} | " + " | ".join([*cells, ", ".join(shares), f"{seconds:.0f}"]) + " |")
    return lines


def _differences(rows: list[Row]) -> list[str]:
    by_arm: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    lines = [
        "| difference | mode, probe | seeds | mean | 95 % over seeds (t) | 95 % over seeds and patients | each seed |",
        "|---" * 7 + "|",
    ]
    for one, other in PAIRS:
        shared = sorted(set(by_arm[one]) & set(by_arm[other]))
        for mode in dict.fromkeys(mode for seed in shared for mode in by_arm[one][seed]["scores"]):
            seeds = [seed for seed in shared if all(mode in by_arm[arm][seed]["scores"] for arm in (one, other))]
            for probe in PROBES if len(seeds) > 1 else ():
                pairs = [tuple(by_arm[arm][seed]["scores"][mode][probe] for arm in (one, other)) for seed in seeds]
                gaps = np.array([a["balanced_accuracy"] - b["balanced_accuracy"] for a, b in pairs])
                low, high = t_interval(gaps)
                low_p, high_p = patient_interval(pairs)
                gaps_by_seed = " ".join(f"{gap:+.3f}" for gap in gaps)
                lines.append(
                    f"| {one} - {other} | {mode}, {probe} | {len(seeds)} | {gaps.mean():+.3f} | [{low:+.3f}, {high:+.3f}] | "
                    f"[{low_p:+.3f}, {high_p:+.3f}] | {gaps_by_seed} |"
                )
    return lines


def t_interval(gaps: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, one a seed."""
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return float(gaps.mean() - half), float(gaps.mean() + half)


def patient_interval(pairs: list[tuple[Row, ...]], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval: seeds are drawn anew, and within each its held-out patients, the same for both arms."""
    rng = np.random.default_rng(seed)
    per_seed = []
    for pair in pairs:
        patients = sorted(pair[0]["by_patient"])
        flat = np.array([[arm["by_patient"][patient] for patient in patients] for arm in pair])  # (2, patients, C * C)
        side = round(flat.shape[2] ** 0.5)
        weights = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=draws)
        scores = [balanced_from_confusion((weights @ arm).reshape(draws, side, side)) for arm in flat]
        per_seed.append(scores[0] - scores[1])
    chosen = rng.integers(len(pairs), size=(draws, len(pairs)))
    means = np.array(per_seed)[chosen, np.arange(draws)[:, None]].mean(1)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)
