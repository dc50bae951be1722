"""odis-path: pretrain, embed and evaluate a pathology vision foundation model on your own whole-slide images.

    import odis_path as op

    op.tile("manifest.csv", out="tiles", mpp=0.5, size=224)
    run = op.pretrain("odis_wsi", {"data.tiles": "tiles", "run.out": "run"})
    op.embed("tiles", run, out="features", level="object", mode="masked")

Every command of the command line is here under its name (`import` is `import_images`), with its options by its words. A verb
returns a result: its `.summary()` is what the command prints, a notebook shows it, `.failed` lists what of it failed.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from annotations.readers.read import read_annotations
    from odis_path.chain import demo
    from odis_path.diagnostics import doctor
    from odis_path.embedding.encoder import load_encoder
    from odis_path.embedding.run import embed
    from odis_path.evaluation.run import evaluate
    from odis_path.exporters.run import export
    from odis_path.features.read import read_features
    from odis_path.reporting.build import report
    from odis_path.training.run import pretrain
    from tiling.boxes.run import annotate
    from tiling.cohort.scan import scan
    from tiling.images.run import import_images
    from tiling.jobs.outcome import Outcome
    from tiling.jobs.summary import Outcomes
    from tiling.proposals.run import propose
    from tiling.slide_file.read import SlideFile
    from tiling.tiles.run import tile
    from tiling.tiles.settings import TileSettings
    from tiling.wsi.slide import Slide

    open_slide = Slide.open

__version__ = "0.1.0"

_HOME = (
    "annotations.readers.read:read_annotations",
    "odis_path.chain:demo",
    "odis_path.diagnostics:doctor",
    "odis_path.embedding.run:embed",
    "odis_path.embedding.encoder:load_encoder",
    "odis_path.evaluation.run:evaluate",
    "odis_path.exporters.run:export",
    "odis_path.features.read:read_features",
    "odis_path.reporting.build:report",
    "odis_path.training.run:pretrain",
    "tiling.boxes.run:annotate",
    "tiling.jobs.outcome:Outcome",
    "tiling.jobs.summary:Outcomes",
    "tiling.images.run:import_images",
    "tiling.proposals.run:propose",
    "tiling.cohort.scan:scan",
    "tiling.slide_file.read:SlideFile",
    "tiling.tiles.run:tile",
    "tiling.tiles.settings:TileSettings",
)
_HOME_OF = {path.rpartition(":")[2]: path for path in _HOME} | {"open_slide": "tiling.wsi.slide:Slide.open"}

__all__ = [
    "Outcome",
    "Outcomes",
    "SlideFile",
    "TileSettings",
    "annotate",
    "demo",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "import_images",
    "load_encoder",
    "open_slide",
    "pretrain",
    "propose",
    "read_annotations",
    "read_features",
    "report",
    "scan",
    "tile",
]


def __getattr__(name: str) -> Any:
    """Import a name's module on first use, so that `import odis_path` stays quick and loads no torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'odis_path' has no attribute {name!r}")
    return resolve_name(_HOME_OF[name])


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
