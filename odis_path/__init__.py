"""odis-path: pretrain, embed and evaluate a pathology vision foundation model on your own whole-slide images.

    import odis_path as op

    op.tile("manifest.csv", out="tiles", mpp=0.5, size=224)
    run = op.pretrain("odis_wsi", {"data.tiles": "tiles", "run.out": "run"})
    op.embed("tiles", run, out="features", level="object", mode="masked")

Every command of the command line is here under its name (`import` is `import_images`), with its options by its words. A verb
returns a result: its `.summary()` is what the command prints, a notebook shows it, `.failed` lists what of it failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from annotations.lazy_names import lazy_names

if TYPE_CHECKING:
    from annotations.readers.read import read_annotations as read_annotations
    from odis_path.chain import demo as demo
    from odis_path.diagnostics import doctor as doctor
    from odis_path.embedding.encoder import load_encoder as load_encoder
    from odis_path.embedding.run import embed as embed
    from odis_path.evaluation.run import evaluate as evaluate
    from odis_path.exporters.run import export as export
    from odis_path.features.read import read_features as read_features
    from odis_path.reporting.build import report as report
    from odis_path.training.run import pretrain as pretrain
    from tiling.boxes.run import annotate as annotate
    from tiling.cohort.scan import scan as scan
    from tiling.images.run import import_images as import_images
    from tiling.jobs.outcome import Outcome as Outcome
    from tiling.jobs.summary import Outcomes as Outcomes
    from tiling.proposals.run import propose as propose
    from tiling.slide_file.read import SlideFile as SlideFile
    from tiling.tiles.run import tile as tile
    from tiling.tiles.settings import TileSettings as TileSettings
    from tiling.wsi.slide import Slide

    open_slide = Slide.open

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annotations.readers.read": "read_annotations",
        "odis_path.chain": "demo",
        "odis_path.diagnostics": "doctor",
        "odis_path.embedding.encoder": "load_encoder",
        "odis_path.embedding.run": "embed",
        "odis_path.evaluation.run": "evaluate",
        "odis_path.exporters.run": "export",
        "odis_path.features.read": "read_features",
        "odis_path.reporting.build": "report",
        "odis_path.training.run": "pretrain",
        "tiling.boxes.run": "annotate",
        "tiling.cohort.scan": "scan",
        "tiling.images.run": "import_images",
        "tiling.jobs.outcome": "Outcome",
        "tiling.jobs.summary": "Outcomes",
        "tiling.proposals.run": "propose",
        "tiling.slide_file.read": "SlideFile",
        "tiling.tiles.run": "tile",
        "tiling.tiles.settings": "TileSettings",
        "tiling.wsi.slide": "Slide.open as open_slide",
    },
)
