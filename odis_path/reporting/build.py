"""Write the report of a folder: list what it holds, draw the sections, render the page."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from annotations.errors import UserError
from odis_path.reporting.cohort_table import read_cohort
from odis_path.reporting.evaluations import read_evaluation
from odis_path.reporting.inventory import find_outputs
from odis_path.reporting.page import Report, Section
from tiling.storage.atomic import atomic_path
from tiling.storage.locks import sweep


def report(folder: Path | str, out: Path | str | None = None) -> Report:
    """Write the report of a folder to `out` (None: `<folder>/report.html`), one HTML page about everything the folder holds.

    Pictures and numbers also go to `<out without .html>_files/`. Its `problems` say what could not be shown. Raises UserError
    where there is nothing to report.
    """
    from odis_path.reporting.sections_cohort import SECTIONS

    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    files = out.with_name(f"{out.stem}_files")
    for written in (out.parent, files):
        sweep(written)
    inventory = find_outputs(folder, leave_out=files)
    cohort = read_cohort(inventory.slides)
    evaluations = [read_evaluation(evaluation) for evaluation in inventory.evaluations]
    files.mkdir(parents=True, exist_ok=True)
    if (files / "report.json").is_file():  # an earlier report's files; no others are removed
        for earlier in (*files.glob("*.png"), *files.glob("*.csv")):
            earlier.unlink()
    report = Report(inventory, cohort, evaluations, files, out, problems=[*inventory.problems, *cohort.problems])
    sections = []
    for make in SECTIONS:
        try:
            section = make(report)
        except UserError as error:  # a damaged file costs the section that shows it
            report.add_problem(f"{make.__name__.replace('_', ' ')} left out", error)
            continue
        if section is not None and section.items:
            sections.append(section)
    write_numbers(report)
    write_page(report, sections)
    return report


def write_numbers(report: Report) -> None:
    """Write all numbers of the report as `report.json` among its files."""
    with atomic_path(report.files / "report.json") as temporary:
        temporary.write_text(json.dumps(report.numbers, indent=1, default=str), encoding="utf-8")


def write_page(report: Report, sections: list[Section]) -> None:
    """Render the template to one HTML file that needs nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from odis_path import __version__

    environment = Environment(
        loader=PackageLoader("odis_path.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    synthetic = report.cohort.synthetic
    page = environment.get_template("page.html.j2").render(
        title=report.inventory.root.resolve().name,
        sections=sections,
        problems=report.problems,
        version=__version__,
        date=f"{datetime.date.today():%d %B %Y}".lstrip("0"),
        synthetic=len(synthetic),
        all_synthetic=len(synthetic) == len(report.cohort.rows),
        files=report.files.name,
    )
    with atomic_path(report.page) as temporary:
        temporary.write_text(page, encoding="utf-8")
