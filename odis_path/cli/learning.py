"""Commands of learning: pretrain, embed, doctor, demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from odis_path.cli.slides import Scheduler, exit_with


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the application."""
    app.command()(pretrain)
    app.command()(embed)
    app.command()(doctor)
    app.command()(demo)


def pretrain(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe, for example odis_wsi.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, for example data.tiles=tiles.")] = None,
    from_previous: Annotated[
        bool, typer.Option("--from-previous", help="Where the newest checkpoint is damaged, go on from the last whole one.")
    ] = False,
) -> None:
    """Train a model from a configuration; the same command under torchrun trains on any number of ranks."""
    from odis_path.training.run import pretrain as run

    trained = run(config, overrides, from_previous=from_previous)
    if os.environ.get("RANK", "0") == "0":
        exit_with(trained)


def embed(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of slide files.")],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint, run folder, timm model name, or a folder with config.json.")],
    out: Annotated[Path, typer.Option(help="Folder for the feature files.")],
    level: Annotated[str, typer.Option(help="tile, object or slide.")] = "tile",
    mode: Annotated[str, typer.Option(help="full, masked, window, crop or blackout.")] = "full",
    kinds: Annotated[str, typer.Option(help="Objects to embed: tissue, cell, proposal, comma-separated.")] = "all",
    batch: Annotated[int, typer.Option(min=1, help="Tiles a forward pass.")] = 64,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    pool: Annotated[str | None, typer.Option(help="cls, mean or cls+mean; default: as the model was trained.")] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Resize tiles to this side in px before the model.")] = None,
    window_um: Annotated[
        float | None, typer.Option("--window-um", help="Side of the windows of --mode window, in µm; default: as trained.")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Same architecture, untrained (baseline).")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace embeddings of another encoder in --out.")] = False,
    scheduler: Scheduler = None,
) -> None:
    """Write tile, object or slide embeddings of every slide."""
    from odis_path.embedding.run import embed as run

    outcomes = run(
        folder,
        checkpoint,
        out,
        level=level,
        mode=mode,
        kinds=kinds,
        batch=batch,
        dtype=dtype,
        pool=pool,
        resize=resize,
        window_um=window_um,
        random_weights=random_weights,
        device=device,
        overwrite=overwrite,
        scheduler=scheduler,
    )
    exit_with(outcomes)


def doctor(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR|CONFIG]",
            help="Look through slide files, feature files and checkpoints below DIR; or at what CONFIG would train on.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of CONFIG: key.sub=value, for example data.tiles=tiles.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Files read at once; default: one per CPU.")] = None,
) -> None:
    """Check the install; with DIR check what was written there: every file is read and compared with its checksums.

    With CONFIG look at views, targets and schedules before training: does colour alone find the other view of a tile?
    """
    from odis_path.diagnostics import doctor as run

    exit_with(run(subject, overrides, workers))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")],
    slides: Annotated[Path | None, typer.Option(help="Your slides (file or folder) in place of generated ones.")] = None,
    geojson: Annotated[Path | None, typer.Option(help="Their annotations; without them boxes are proposed.")] = None,
    assume_mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of slides that do not say.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="CSV with patient ids of your images.")] = None,
    point_size: Annotated[str | None, typer.Option(help="Extent given to point annotations, for example 12um.")] = None,
    config: Annotated[str | None, typer.Option(help="Training recipe in place of the demo's.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs in place of the recipe's.")] = None,
    patients: Annotated[int, typer.Option(min=2, help="Generated patients, two slides each.")] = 10,
    slide_px: Annotated[int, typer.Option(min=512, help="Side of a generated slide in pixels.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the generated slides and the training.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one a core.")] = None,
) -> None:
    """Run the whole chain: slides, tiles, boxes, pretraining, embeddings, probes, report."""
    from odis_path.chain import demo as run

    result = run(
        out,
        slides=slides,
        geojson=geojson,
        assume_mpp=assume_mpp,
        manifest=manifest,
        point_size=point_size,
        config=config,
        epochs=epochs,
        patients=patients,
        slide_px=slide_px,
        seed=seed,
        workers=workers,
        stream=sys.stdout,
    )
    exit_with(result)
