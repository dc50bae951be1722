"""`doctor DIR`: read everything that the commands wrote below a folder, and compare it with its checksums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotations.errors import UserError
from tiling.jobs.outcome import Outcome
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Result, show_failures

if TYPE_CHECKING:
    from rich.console import Console

SLIDE, FEATURES, EMBEDDINGS = "slide files", "feature files", "slides.parquet"
CHECKPOINT, WEIGHTS, UNKNOWN = "checkpoints", "exported weights", "unreadable .h5"
PATTERNS = ("*.h5", "checkpoint-*.pt", "*.safetensors", "slides.parquet")


@dataclass(frozen=True)
class Verified:
    """Counts of one kind of file. unchecked: read as a whole, but it holds no checksums (it is of an earlier version)."""

    kind: str
    files: int
    damaged: int
    unchecked: int


@dataclass(frozen=True)
class Verification(Result):
    """Outcomes of all files that were looked at."""

    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.ok]

    def width(self) -> int:
        """As many columns as keep each failure on one line."""
        longest = [max((len(text) for text in texts), default=0) for texts in zip(*self._rows(), strict=True)]
        return max(160, 20 + sum(longest))

    def _rows(self) -> list[tuple[str, str]]:
        return [(outcome.item, outcome.message) for outcome in self.failed]

    def show(self, console: Console) -> None:
        """The kinds of files with their counts, and the damaged ones."""
        from rich.table import Table

        table = Table(title="odis-path doctor", title_justify="left")
        for title in ("kind", "files", "well", "damaged", "without checksums"):
            table.add_column(title, justify="left" if title == "kind" else "right")
        for kind in by_kind(self.outcomes):
            counts = (kind.files, kind.files - kind.damaged, kind.damaged, kind.unchecked)
            table.add_row(kind.kind, *(f"{count:,}" for count in counts))
        console.print(table)
        show_failures(console, self.failed, "damaged")


def verify(folder: Path, workers: int | None = None) -> Verification:
    """Read every slide file, feature file and checkpoint below a folder, all pixels too.

    `info` of a file's outcome: `kind`, and `unchecked` where it holds no checksums. A damaged file has failed, and its
    `message` says what to do. Hidden files and those of other programs are left out. Raises UserError where the folder is
    missing or holds nothing of ours.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the one that the other odis-path commands wrote into")
    paths = sorted({path for pattern in PATTERNS for path in folder.rglob(pattern)})
    paths = [
        path for path in paths if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    outcomes = run_cohort(paths, verify_file, title="doctor", workers=workers, name=lambda path: str(path.relative_to(folder)))
    for outcome in outcomes:
        outcome.ok = outcome.ok and not outcome.message
    ours = [outcome for outcome in outcomes if outcome.info.get("kind") or not outcome.ok]
    if not ours:
        raise UserError(f"{folder}: holds no slide file, feature file or checkpoint: give the folder of a cohort or of a run")
    return Verification(tuple(ours))


def verify_file(path: Path) -> dict[str, Any]:
    """`kind` of a file ("" where it is not ours), `unchecked`, and in `message` what is wrong with it and what to do."""
    kind, check = _kind(path)
    try:
        return {"kind": kind, "unchecked": not check(path)}
    except UserError as error:
        return {"kind": kind, "unchecked": False, "message": str(error)}


def by_kind(outcomes: Sequence[Outcome]) -> list[Verified]:
    """The counts of each kind of file that there is."""
    kinds = [str(outcome.info.get("kind") or UNKNOWN) for outcome in outcomes]
    damaged = Counter(kind for kind, outcome in zip(kinds, outcomes, strict=True) if not outcome.ok)
    unchecked = Counter(kind for kind, outcome in zip(kinds, outcomes, strict=True) if outcome.info.get("unchecked"))
    return [Verified(kind, count, damaged[kind], unchecked[kind]) for kind, count in sorted(Counter(kinds).items())]


def _kind(path: Path) -> tuple[str, Any]:
    """The kind of a file, and the function that reads it and tells whether it holds checksums."""
    if path.suffix == ".pt":
        return CHECKPOINT, _check_checkpoint
    if path.suffix == ".safetensors":
        return WEIGHTS, _check_weights
    if path.suffix == ".parquet":
        return EMBEDDINGS, _check_embeddings
    from odis_path.features.write import FORMAT, open_features
    from tiling.slide_file.read import is_slide_file

    try:
        with open_features(path) as file:
            if file.h5.attrs.get("format") == FORMAT:
                return FEATURES, _check_features
    except Exception:  # HDF5 has many: what cannot be read may have been one of ours
        return UNKNOWN, _check_slide
    return (SLIDE, _check_slide) if is_slide_file(path) else ("", lambda _: True)


def _check_slide(path: Path) -> bool:
    from tiling.slide_file.read import SlideFile

    with SlideFile(path) as file:
        file.check()
        return file.has_checksums


def _check_features(path: Path) -> bool:
    from odis_path.features.write import open_features
    from tiling.storage.checked_file import CRC_ATTR

    with open_features(path) as file:
        file.check()
        return CRC_ATTR in file.h5["coords"].attrs


def _check_embeddings(path: Path) -> bool:
    from odis_path.features.read import read_slides_parquet

    read_slides_parquet(path)
    return True


def _check_checkpoint(path: Path) -> bool:
    from odis_path.tensor_file import check_zip

    return check_zip(path, "a readable checkpoint", "copy it again, or take an older checkpoint")


def _check_weights(path: Path) -> bool:
    from odis_path.tensor_file import load_safetensors

    try:
        return load_safetensors(path, "export or copy it again")[1]
    except UserError:
        raise
    except Exception as error:  # safetensors has its own
        raise UserError(f"{path}: not readable, damaged or cut off ({error}): export or copy it again") from None
