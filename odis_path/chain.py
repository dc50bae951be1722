"""The whole chain in one command: slides, tiles, boxes, pretraining, embeddings, probes, report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from annotations.errors import UserError
from tiling.jobs.summary import Result, show_lines

if TYPE_CHECKING:
    from rich.console import Console

TILE_PX = 128
MPP = 0.5
STEPS = 700  # optimisation steps of the demo recipe: a few minutes on two cores
STDERR = 2  # the descriptor: a notebook's sys.stderr is no file
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; everything has a default but the output folder."""

    out: Path
    slides: Path | None = None
    geojson: Path | None = None
    assume_mpp: float | None = None
    manifest: Path | None = None
    point_size: str | None = None
    config: str | None = None
    epochs: float | None = None
    patients: int = 10
    slide_px: int = 2048
    seed: int = 0
    workers: int | None = None
    stream: TextIO | None = None

    @property
    def worker_options(self) -> list[str]:
        return ["--workers", str(self.workers)] if self.workers else []

    def print(self, line: str) -> None:
        """Write a line of progress to the stream, or to stderr."""
        print(line, file=self.stream or sys.stderr, flush=True)

    def command(self, arguments: list[str], *, may_fail: bool = False) -> int:
        """Run one `odis-path` command in a process of its own, as a user would, and return its exit code.

        Raises UserError where it fails, unless it `may_fail`.
        """
        self.print("$ odis-path " + " ".join(arguments))
        words = [sys.executable, "-m", "odis_path", *arguments]
        code = subprocess.run(words, check=False, stdout=None if self.stream is sys.stdout else STDERR).returncode
        if code and not may_fail:
            raise UserError(f"odis-path {arguments[0]}: ended with code {code}; its message is above")
        return code


@dataclass
class DemoResult(Result):
    """Seconds of each stage, also in timings.json; the scores, a line an evaluation; and the page of the report."""

    settings: DemoSettings
    seconds: dict[str, float] = field(default_factory=dict)
    scores: list[str] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return (self.settings.out / "report.html").resolve()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and measure its time."""
        self.settings.print(f"\n=== {len(self.seconds) + 1}. {name}")
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        (self.settings.out / "timings.json").write_text(json.dumps(self.seconds, indent=2), encoding="utf-8")

    def show(self, console: Console) -> None:
        """Write each stage with its share of the time, the scores, and where the report is."""
        from rich.table import Table

        total = sum(self.seconds.values())
        table = Table(title=f"time: {total / 60:.1f} minutes")
        for title in ("stage", "seconds", "share"):
            table.add_column(title, justify="left" if title == "stage" else "right")
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.1f}", f"{seconds / total:.0%}")
        console.print(table)
        show_lines(console, [*self.scores, "", f"open {self.page}"])


def demo(
    out: Path | str,
    slides: Path | str | None = None,
    geojson: Path | str | None = None,
    assume_mpp: float | None = None,
    manifest: Path | str | None = None,
    point_size: str | None = None,
    config: str | None = None,
    epochs: float | None = None,
    patients: int = 10,
    slide_px: int = 2048,
    seed: int = 0,
    workers: int | None = None,
    *,
    stream: TextIO | None = None,
) -> DemoResult:
    """Run the whole chain: slides, tiles, boxes, pretraining, embeddings, probes, report.

    slides, geojson: your own slides and their annotations, in place of generated ones. stream: where progress is written;
    None: stderr. Stages that are done are skipped when it runs again. Raises UserError where a stage fails.
    """
    settings = DemoSettings(
        out=Path(out),
        slides=_path(slides),
        geojson=_path(geojson),
        assume_mpp=assume_mpp,
        manifest=_path(manifest),
        point_size=point_size,
        config=config,
        epochs=epochs,
        patients=patients,
        slide_px=slide_px,
        seed=seed,
        workers=workers,
        stream=stream,
    )
    if settings.slides is not None and not settings.slides.exists():
        raise UserError(f"{slides}: no such slide or folder")
    if settings.geojson is not None and not settings.geojson.exists():
        raise UserError(f"{geojson}: no such GeoJSON file or folder")
    settings.out.mkdir(parents=True, exist_ok=True)
    return run_stages(settings)


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


def run_stages(settings: DemoSettings) -> DemoResult:
    """Run the stages one after the other."""
    result = DemoResult(settings)
    with result.stage("slides"):
        slides, annotations, manifest = settings.slides, settings.geojson, settings.manifest
        if slides is None:
            slides, annotations, manifest = make_slides(settings)
    with result.stage("tile"):
        make_tiles(settings, slides, manifest)
    with result.stage("annotate" if annotations else "propose"):
        make_boxes(settings, annotations)
    with result.stage("pretrain"):
        make_model(settings)
    with result.stage("embed"):
        make_features(settings)
    with result.stage("evaluate"):
        result.scores = make_probes(settings)
    with result.stage("report"):
        settings.command(["report", str(settings.out)])
    return result


def make_slides(settings: DemoSettings) -> tuple[Path, Path, Path]:
    """Draw slides, annotations and manifest, unless they are there; return where they are."""
    from odis_path.synthetic.slides import write_cohort

    cohort = settings.out / "cohort"
    manifest = cohort / "manifest.csv"  # written last
    if not manifest.exists():
        settings.print("the slides of this demo are synthetic: drawn by a program from a seed, no patient's tissue")
        write_cohort(
            cohort, patients=settings.patients, side_px=settings.slide_px, seed=settings.seed, workers=settings.workers or 2
        )
    return cohort / "slides", cohort / "annotations", manifest


def make_tiles(settings: DemoSettings, slides: Path, manifest: Path | None) -> None:
    """Scan and tile slides, or import a folder of images."""
    tiles, size, workers = str(settings.out / "tiles"), ["--size", str(TILE_PX)], settings.worker_options
    if is_image_folder(slides):
        mpp = ["--mpp", str(settings.assume_mpp)] if settings.assume_mpp else []
        patients = ["--manifest", str(manifest)] if manifest else []
        settings.command(["import", str(slides), "--out", tiles, *size, *mpp, *patients, *workers])
        return
    mpp = ["--assume-mpp", str(settings.assume_mpp)] if settings.assume_mpp else []
    if manifest is None:
        manifest = settings.out / "manifest.csv"
        settings.command(["scan", str(slides), "--out", str(manifest)], may_fail=True)
    options = ["--mpp", str(MPP), *size, *mpp, *workers]
    code = settings.command(["tile", str(manifest), "--out", tiles, *options], may_fail=True)
    if code and not list(Path(tiles).glob("*.h5")):
        raise UserError("no slide could be tiled; the reasons are in the table above")


def is_image_folder(path: Path) -> bool:
    """Tell whether a folder holds plain images and no slide."""
    if path.is_file():
        return path.suffix.lower() in IMAGE_SUFFIXES
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    return bool(suffixes & set(IMAGE_SUFFIXES)) and not suffixes & {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".dcm", ".scn"}


def make_boxes(settings: DemoSettings, annotations: Path | None) -> None:
    """Clip annotations to the tiles, or propose boxes where there are none."""
    tiles, workers = str(settings.out / "tiles"), settings.worker_options
    if annotations is None:
        settings.command(["propose", tiles, *workers])
        return
    size = ["--point-size", settings.point_size] if settings.point_size else []
    settings.command(["annotate", tiles, "--annotations", str(annotations), *size, *workers])


def make_model(settings: DemoSettings) -> None:
    """Pretrain with the demo's recipe, or the user's, for as many epochs as make the demo's number of steps."""
    out = settings.out
    overrides = [f"data.tiles={out / 'tiles'}", f"run.out={out / 'run'}", f"run.seed={settings.seed}"]
    if settings.config is None:
        overrides += fit_recipe(out / "tiles")
    if settings.epochs is not None:
        overrides.append(f"optim.epochs={settings.epochs}")
    settings.command(["pretrain", settings.config or "demo", *overrides])


def fit_recipe(tiles: Path) -> list[str]:
    """Return overrides that fit the demo's recipe to a cohort: batch, epochs, kinds of objects, held-out patients."""
    from odis_path.data.tile_index import index_tiles

    index = index_tiles(tiles)
    patients = len(set(index.patients))
    holdout = 0.4 if patients >= 3 else 0.0
    batch = max(2, min(32, round(len(index) * (1 - holdout)) // 2))
    steps_per_epoch = max(1, int(len(index) * (1 - holdout)) // batch)
    return [
        f"data.kinds=[{object_kinds(index.paths)}]",
        f"data.holdout={holdout}",
        f"optim.batch_size={batch}",
        f"optim.epochs={STEPS / steps_per_epoch:.3g}",
        f"eval.every_epochs={STEPS / steps_per_epoch / 5:.3g}",
    ]


def make_features(settings: DemoSettings) -> None:
    """Embed tiles, objects and slides by the trained encoder, tiles and objects by an untrained twin too."""
    from tiling.slide_file.read import list_slide_files

    out = settings.out
    tiles, run = str(out / "tiles"), str(out / "run")
    kinds = object_kinds(list_slide_files(out / "tiles"))
    for name, weights in (("odis", []), ("random", ["--random-weights"])):
        for level, options in (("tile", []), ("object", ["--level", "object", "--mode", "masked", "--kinds", kinds])):
            features = str(out / "features" / f"{name}-{level}")
            settings.command(["embed", tiles, "--checkpoint", run, "--out", features, *options, *weights])
    features = str(out / "features" / "odis-tile")
    settings.command(["embed", tiles, "--checkpoint", run, "--level", "slide", "--out", features])


def object_kinds(slide_files: Iterable[Path]) -> str:
    """Return the kinds of objects that the demo trains on and embeds: tissue where it is annotated, else all there are."""
    from annotations.objects import Kind
    from tiling.slide_file.read import SlideFile

    kinds: set[int] = set()
    for path in slide_files:
        with SlideFile(path) as file:
            kinds.update(file.objects_table(ids=False)["kind"].tolist())
    names = [kind.word for kind in Kind if kind in kinds]
    return "tissue" if "tissue" in names else ",".join(names) or "tissue"


def make_probes(settings: DemoSettings) -> list[str]:
    """Evaluate k-NN and linear probes on held-out patients; return a line for each, also where it could not be evaluated."""
    out, lines = settings.out, []
    split = ["--split", str(out / "run" / "split.csv")] if has_test_split(out / "run" / "split.csv") else []
    for level, probe in (("tile", "knn"), ("tile", "linear"), ("object", "knn")):
        features, results = out / "features", out / "evaluation" / f"{level}-{probe}"
        twin = f"random weights={features / f'random-{level}'}"
        arguments = ["evaluate", str(features / f"odis-{level}"), "--labels", "annotations", "--probe", probe, "--level", level]
        arguments += ["--groups", "patient_id", "--out", str(results), "--baseline", twin, *split]
        if settings.command(arguments, may_fail=True):
            lines.append(f"{level} {probe}: not evaluated; its message above says why")
            continue
        lines.append(f"{level} {probe}: {headline(results / 'results.json')}")
    return lines


def has_test_split(path: Path) -> bool:
    """Tell whether a run held patients out."""
    return path.exists() and ",test" in path.read_text(encoding="utf-8")


def headline(results: Path) -> str:
    """Return one line of an evaluation: balanced accuracy with its interval, beside the baselines."""
    content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    point = content["headline"]["balanced_accuracy"]
    baselines = ", ".join(f"{name} {value['balanced_accuracy']['point']:.3f}" for name, value in content["baselines"].items())
    interval = "no interval: a single patient, or a class of one"
    if point["low"] is not None:
        interval = f"95% interval {point['low']:.3f} to {point['high']:.3f}"
    return f"balanced accuracy {point['point']:.3f} ({interval}) on {content['n_patients']} patients; {baselines}"
