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
    from annotations.read import read_annotations
    from odis_path.demo.pipeline import demo
    from odis_path.doctor import doctor
    from odis_path.embed import embed
    from odis_path.encode import load_encoder
    from odis_path.evaluate.run import evaluate
    from odis_path.export_run import export
    from odis_path.features import read_features
    from odis_path.report.build import report
    from odis_path.train.run import pretrain
    from tiling.annotate import annotate
    from tiling.cohort import Outcome, Outcomes
    from tiling.importer import import_images
    from tiling.propose import propose
    from tiling.scan import scan
    from tiling.slide import Slide
    from tiling.slidefile import SlideFile
    from tiling.tile import tile
    from tiling.tilesettings import TileSettings

    open_slide = Slide.open

__version__ = "0.1.0"

_HOME = (
    "annotations.read.read_annotations",
    "odis_path.demo.pipeline.demo",
    "odis_path.doctor.doctor",
    "odis_path.embed.embed",
    "odis_path.encode.load_encoder",
    "odis_path.evaluate.run.evaluate",
    "odis_path.export_run.export",
    "odis_path.features.read_features",
    "odis_path.report.build.report",
    "odis_path.train.run.pretrain",
    "tiling.annotate.annotate",
    "tiling.cohort.Outcome",
    "tiling.cohort.Outcomes",
    "tiling.importer.import_images",
    "tiling.propose.propose",
    "tiling.scan.scan",
    "tiling.slidefile.SlideFile",
    "tiling.tile.tile",
    "tiling.tilesettings.TileSettings",
)
_HOME_OF = {path.rpartition(".")[2]: path for path in _HOME} | {"open_slide": "tiling.slide.Slide.open"}

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
