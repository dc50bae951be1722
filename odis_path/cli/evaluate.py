"""The command evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from odis_path.cli.slides import exit_with


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(evaluate)


def evaluate(
    feats: Annotated[Path, typer.Argument(metavar="FEATS", help="Folder of feature files, as odis-path embed writes it.")],
    labels: Annotated[str, typer.Option(help="CSV with slide_id and label (and x,y or object), or: annotations.")],
    probe: Annotated[str, typer.Option(help="knn, linear, prototype or retrieval.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, tables and figures.")],
    groups: Annotated[str, typer.Option(help="What is kept on one side: patient_id, slide_id or none.")] = "patient_id",
    level: Annotated[str, typer.Option(help="auto, tile, object or slide.")] = "auto",
    split: Annotated[
        str | None,
        typer.Option(help="CSV with split (train, val, test) and patient_id or slide_id; auto: of the encoder's run."),
    ] = None,
    k: Annotated[str, typer.Option("--k", help="Numbers of neighbours to choose from.")] = "1,5,10,20,50",
    weights: Annotated[str, typer.Option(help="Votes of neighbours: temperature or majority.")] = "temperature",
    standardise: Annotated[
        str,
        typer.Option(help="Model and baselines alike: none, zscore, whiten, centre-slide; auto: chosen on training folds."),
    ] = "auto",
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation, without --split.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of folds, draws and episodes.")] = 0,
    bootstrap: Annotated[
        int,
        typer.Option(help="Samples for intervals of over 100 patients (of fewer, each is left out once); 0: none."),
    ] = 1000,
    max_rows: Annotated[int, typer.Option(help="Judge at most so many labelled rows, drawn at random.")] = 20000,
    baseline: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Another feature folder to compare with; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of another encoder in --out.")] = False,
) -> None:
    """Judge embeddings by a probe, patients kept apart, with intervals and with baselines beside."""
    from rich.console import Console

    from odis_path.evaluation.run import evaluate as run

    with Console().status("starting") as status:
        result = run(
            feats,
            labels,
            probe=probe,
            out=out,
            groups=groups,
            level=level,
            split=split,
            k=parse_ks(k),
            weights=weights,
            standardise=standardise,
            folds=folds,
            seed=seed,
            bootstrap=bootstrap,
            max_rows=max_rows,
            baseline=parse_baselines(baseline or []),
            overwrite=overwrite,
            tell=status.update,
        )
    exit_with(result)


def parse_ks(text: str) -> tuple[int, ...]:
    """ "1,5,10" -> (1, 5, 10). Raises UserError."""
    from annotations.errors import UserError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--k {text}: whole numbers with commas between, for example 1,5,20") from None


def parse_baselines(entries: list[str]) -> dict[str, Path]:
    """NAME=FOLDER entries -> folder by name. Raises UserError."""
    from annotations.errors import UserError

    folders: dict[str, Path] = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        name = name.strip()
        if not name or not folder:
            raise UserError(f"--baseline {entry}: write NAME=FOLDER, for example random=features/random")
        if name in folders:
            raise UserError(f"--baseline {entry}: the name {name} is given twice")
        folders[name] = Path(folder)
    return folders
