"""What people added to a manifest, kept where `scan` writes it anew."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from annotations.errors import UserError
from tiling.atomic import atomic_path
from tiling.csvfile import number_in
from tiling.manifest import SlideItem, manifest_rows, mpp_in, slide_of
from tiling.slideid import id_problem
from tiling.urls import place


@dataclass(frozen=True)
class Before:
    """The manifest that is there: `columns` in its order; `rows` and `mpps` by place of the slide; `count`: all its rows."""

    columns: tuple[str, ...] = ()
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    mpps: dict[str, float | None] = field(default_factory=dict)
    count: int = 0

    @property
    def slide_ids(self) -> dict[str, str]:
        """place -> slide_id, where there is one that can be and that no other slide has."""
        given = {at: row.get("slide_id", "").strip() for at, row in self.rows.items()}
        first = {slide_id: at for at, slide_id in reversed(given.items())}
        return {
            at: slide_id for at, slide_id in given.items() if slide_id and first[slide_id] == at and not id_problem(slide_id)
        }

    def onto(self, item: SlideItem) -> SlideItem:
        """A slide with the patient and the mpp it has in the manifest."""
        at = place(item.path)
        patient_id = self.rows.get(at, {}).get("patient_id", "").strip() or item.patient_id
        return replace(item, patient_id=patient_id, mpp=self.mpps.get(at))


def manifest_before(out: Path) -> Before:
    """What is at `out`. Raises UserError where that is no manifest, or one that cannot be read: it is not written over."""
    if not out.exists() or not out.stat().st_size:
        return Before()
    try:
        manifest = manifest_rows(out)
        by_place: dict[str, tuple[int, dict[str, str]]] = {}
        for line, row in manifest.rows:
            if row["path"].strip():
                by_place.setdefault(place(slide_of(out, row)), (line, row))
        mpps = {at: _given(out, line, row) for at, (line, row) in by_place.items()}
    except UserError as error:
        raise UserError(f"{error}; scan does not write over it: put it right, or give another --out") from None
    return Before(tuple(manifest.columns), {at: row for at, (_, row) in by_place.items()}, mpps, len(manifest.rows))


def _given(out: Path, line: int, row: dict[str, str]) -> float | None:
    """The mpp of a row where it is not the one that scan wrote there: slides may be replaced, and say another then."""
    given = mpp_in(out, line, row)
    try:
        written = number_in(row.get("mpp_headers") or "nan")
    except ValueError:
        written = math.nan
    return given if by_hand(given, None if math.isnan(written) else written) else None


def by_hand(given: float | None, own: float | None) -> bool:
    """Whether a manifest's mpp was given by hand: it is not what the slide's headers say, rounded or not."""
    return given is not None and (own is None or not math.isclose(given, own, rel_tol=1e-6))


def tell_kept(out: Path, before: Before, items: Sequence[SlideItem]) -> None:
    """Say in a line on stderr what of the manifest that is there stays. Rows of other slides go to a file beside it."""
    kept = sum(place(item.path) in before.rows for item in items)
    said = []
    if kept:
        said.append(
            f"{kept} of {len(items)} slides were in it and keep slide_id, patient_id, further columns and an mpp given by hand"
        )
    if gone := before.count - kept:
        names = (out.with_name(f"{out.name}.before{number or ''}") for number in (0, *range(2, 10_000)))
        aside = next(name for name in names if not name.exists())
        with atomic_path(aside) as temporary:
            shutil.copyfile(out, temporary)
        said.append(f"{gone} rows of other slides are left out of it and stay in {aside}")
    if said:
        print(f"{out}: {'; '.join(said)}", file=sys.stderr, flush=True)
