"""The patients an encoder was pretrained on: kept in its checkpoints, written beside its embeddings, read to judge these.

A checkpoint of odis-path names its slides and patients, those of the run's weights included where these are a checkpoint too.
`embed` writes them as pretraining.csv beside the feature files, which name its hash, so that neither the run nor the checkpoint
need be there when the embeddings are judged.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from annotations.errors import UserError
from tiling.storage.atomic import atomic_path

if TYPE_CHECKING:
    from odis_path.data.tile_index import TileIndex

FILE = "pretraining.csv"
COLUMNS = ("slide_id", "patient_id", "split", "seen")


@dataclass(frozen=True)
class Slide:
    """A slide of a run. split: its side in the run, train or test, or "" where only its weights come from a run that had it.
    seen: whether some run that made the encoder trained on its tiles."""

    slide_id: str
    patient_id: str
    split: str
    seen: bool


@dataclass(frozen=True)
class Pretraining:
    """kind: "run" (slides are known), "none" (untrained), or "unknown", for the reason `why`. of: the checkpoint or model.
    base: weights that the run began from and of whose data nothing is known; empty where there are none."""

    kind: Literal["run", "none", "unknown"]
    of: str
    why: str = ""
    base: str = ""
    slides: tuple[Slide, ...] = ()

    def text(self) -> str:
        """Return the content of pretraining.csv."""
        file = io.StringIO()
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows([s.slide_id, s.patient_id, s.split, int(s.seen)] for s in self.slides)
        return file.getvalue()

    def note(self) -> str:
        """Return the note for a feature file: JSON with kind, of, why, base and the hash of pretraining.csv."""
        digest = hashlib.sha256(self.text().encode()).hexdigest() if self.kind == "run" else ""
        return json.dumps(
            {"kind": self.kind, "of": self.of, "why": self.why, "base": self.base, "sha256": digest}, sort_keys=True
        )

    def write(self, folder: Path) -> None:
        """Write pretraining.csv into a folder of feature files, crash-safe; nothing without a run, or where it is there."""
        if self.kind == "run" and not self._is_written(folder / FILE):
            with atomic_path(folder / FILE) as path:
                path.write_text(self.text(), encoding="utf-8")

    def _is_written(self, path: Path) -> bool:
        try:
            return path.read_bytes() == self.text().encode()
        except OSError:
            return False


def unknown(of: str, why: str) -> Pretraining:
    return Pretraining("unknown", of, why)


def of_checkpoint(path: Path, data: Mapping[str, Any]) -> Pretraining:
    """Return the pretraining of a checkpoint. data: what it keeps of its tiles; an older one's slides are in its run folder."""
    kept = data.get("pretrained_on")
    if kept is not None:
        slides = tuple(Slide(str(a), str(b), str(c), bool(d)) for a, b, c, d in kept["slides"])
        return Pretraining("run", str(path), base=str(kept.get("base", "")), slides=slides)
    return of_run_folder(path)


def of_run_folder(checkpoint: Path) -> Pretraining:
    """Return the pretraining of a checkpoint by the split.csv beside it."""
    from odis_path.tables import read_csv

    split = checkpoint.parent / "split.csv"
    try:
        rows = read_csv(split)
        slides = tuple(Slide(r["slide_id"], r["patient_id"], r["split"], r["split"] == "train") for r in rows)
    except (UserError, KeyError):
        return unknown(str(checkpoint), f"{split} is not there, or not as pretrain wrote it")
    return Pretraining("run", str(checkpoint), slides=slides)


def slides_of(train: TileIndex, away: set[str]) -> list[Slide]:
    """List every slide of a run. train: the tiles that are trained on; away: the held-out patients."""
    seen = set(train.slide.tolist())
    pairs = enumerate(zip(train.slide_ids, train.patients, strict=True))
    return [Slide(slide, patient, side_of(patient, away), i in seen) for i, (slide, patient) in pairs]


def side_of(patient: str, away: set[str]) -> str:
    """Return test for held-out patients, else train."""
    return "test" if patient in away else "train"


def kept_in_checkpoint(slides: Iterable[Slide], weights: str | None) -> dict[str, Any]:
    """Return slides of a run for its checkpoints. weights: model.weights; slides of a checkpoint are added."""
    rows = {slide.slide_id: slide for slide in slides}
    start = None
    if weights is not None:
        path = Path(weights)
        start = read_checkpoint(path) if path.is_file() else unknown(weights, "")
        for slide in start.slides:
            if slide.seen:
                rows[slide.slide_id] = replace(rows.get(slide.slide_id, replace(slide, split="")), seen=True)
    base = "" if start is None else start.base if start.kind == "run" else str(weights)
    return {"slides": [[s.slide_id, s.patient_id, s.split, s.seen] for s in rows.values()], "base": base}


def read_checkpoint(path: Path) -> Pretraining:
    """Read the pretraining of a file of weights: unknown where it is no checkpoint of odis-path."""
    from odis_path.checkpoint import read_data_facts

    data = read_data_facts(path)
    return unknown(str(path), "it is no checkpoint of odis-path") if data is None else of_checkpoint(path, data)


def of_encoder(source: str, *, random_weights: bool) -> Pretraining:
    """Read the pretraining of an encoder. source: the path of a file, or the name of a model of others."""
    if random_weights:
        return Pretraining("none", source)
    if Path(source).is_file():
        return read_checkpoint(Path(source))
    return unknown(source, "it is not a model of odis-path; see what its authors say")


def _content(note: str) -> dict[str, Any]:
    """Read a note as JSON; one without a kind where it is damaged."""
    try:
        content = json.loads(note) if note else {}
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"kind": ""}


def common_note(notes: Iterable[str]) -> str:
    """Return the note of files of one folder; that it is not known where they differ in more than the checkpoint's place."""
    by_content = {}
    for note in notes:
        content = _content(note)
        by_content[tuple(content.get(key, "") for key in ("kind", "why", "base", "sha256"))] = note
    if len(by_content) == 1:
        return next(iter(by_content.values()))
    return unknown("", "the feature files were made from several checkpoints, or by several versions").note()


def read_note(note: str, folder: Path, checkpoint: str) -> Pretraining:
    """Read the pretraining of the encoder of a folder of embeddings by the note in its files, empty in older ones.

    checkpoint: path (with size and time) or name of what made them. The run folder is looked at where pretraining.csv is
    gone.
    """
    content = _content(note)
    of = str(content.get("of") or checkpoint)
    if content and content.get("kind") != "run":
        if content.get("kind") not in ("none", "unknown"):
            return unknown(of, "what the feature files say of it cannot be read")
        return Pretraining(content["kind"], of, str(content.get("why", "")))
    digest, base = str(content.get("sha256", "")), str(content.get("base", ""))
    path = folder / FILE
    if content and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        slides = tuple(Slide(r["slide_id"], r["patient_id"], r["split"], r["seen"] == "1") for r in rows)
        return Pretraining("run", of, base=base, slides=slides)
    file = Path(of if content else of.rsplit(":", 2)[0])
    if not content and not (file.suffix in (".pt", ".pth") or file.is_file()):
        return unknown(of, "the feature files do not say")
    pretraining = read_checkpoint(file) if content and file.is_file() else of_run_folder(file)
    if pretraining.kind == "run" and digest in ("", hashlib.sha256(pretraining.text().encode()).hexdigest()):
        return Pretraining("run", of, base=base or pretraining.base, slides=pretraining.slides)
    gone = (
        f"{path} is gone or changed, and so is the run of {file}" if content else f"the run folder of {file} is gone or changed"
    )
    return unknown(of, gone)
