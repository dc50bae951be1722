"""`doctor DIR`: read everything that the commands wrote below a folder, and compare it with its checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from annotations.errors import UserError
from tiling.jobs.outcome import ItemResult, Outcome
from tiling.jobs.run import run_cohort
from tiling.jobs.summary import Outcomes, show_failures

if TYPE_CHECKING:
    from rich.console import Console

SLIDE, FEATURES, EMBEDDINGS = "slide files", "feature files", "slides.parquet"
CHECKPOINT, WEIGHTS, UNKNOWN = "checkpoints", "exported weights", "unreadable .h5"
PATTERNS = ("*.h5", "checkpoint-*.pt", "*.safetensors", "slides.parquet")


class KindCounts(NamedTuple):
    """Counts of one kind of file. unchecked: read as a whole, but it holds no checksums (it is of an earlier version)."""

    kind: str
    files: int
    damaged: int
    unchecked: int


class Verification(Outcomes):
    """Outcomes of all files that were looked at."""

    def show(self, console: Console) -> None:
        """Write the kinds of files with their counts, and the damaged ones."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column in ("kind", "files", "well", "damaged", "without checksums"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for kind, files, damaged, unchecked in count_kinds(self):
            table.add_row(kind, *(f"{count:,}" for count in (files, files - damaged, damaged, unchecked)))
        console.print(table)
        show_failures(console, self.failed, "damaged")


def verify(folder: Path, workers: int | None = None) -> Verification:
    """Read every slide file, feature file and checkpoint below a folder, all pixels too.

    `info` of a file's outcome: `kind`, and `unchecked` where it holds no checksums. A damaged file has failed, and its
    `error` says what to do. Hidden files and those of other programs are left out. Raises UserError where the folder is
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
        if damage := outcome.info.pop("damage", ""):
            outcome.ok, outcome.error = False, damage
    ours = [outcome for outcome in outcomes if outcome.info.get("kind") or not outcome.ok]
    if not ours:
        raise UserError(f"{folder}: holds no slide file, feature file or checkpoint: give the folder of a cohort or of a run")
    return Verification(ours, "odis-path doctor", folder)


def verify_file(path: Path) -> ItemResult:
    """Check a file; info: its `kind` ("" where it is not ours), `unchecked`, and `damage`: what is wrong and what to do."""
    kind, has_checksums = _kind(path)
    try:
        return ItemResult({"kind": kind, "unchecked": not has_checksums(path)})
    except UserError as error:
        return ItemResult({"kind": kind, "unchecked": False, "damage": str(error)})


def count_kinds(outcomes: Iterable[Outcome]) -> list[KindCounts]:
    """Count the files of each kind that there is."""
    by_kind: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_kind.setdefault(str(outcome.info.get("kind") or UNKNOWN), []).append(outcome)
    counts = []
    for kind, files in sorted(by_kind.items()):
        damaged = sum(not file.ok for file in files)
        unchecked = sum(bool(file.info.get("unchecked")) for file in files)
        counts.append(KindCounts(kind, len(files), damaged, unchecked))
    return counts


def _kind(path: Path) -> tuple[str, Callable[[Path], bool]]:
    """Return the kind of a file, and the function that reads it and tells whether it holds checksums."""
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
