"""The report: complete, self-contained, honest about what it left out."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotations.errors import UserError
from odis_path.figures.scores import KCurve, draw_per_k
from odis_path.reporting.build import report
from odis_path.reporting.evaluations import read_evaluation
from odis_path.reporting.inventory import find_outputs

SECTIONS = ["headline", "cohort", "slides", "crops", "training", "results", "maps", "attention", "settings"]
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(everything, tmp_path_factory.mktemp("out") / "report.html").page


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written.read_text(encoding="utf-8"))


def test_a_complete_folder_gives_every_section_and_leaves_nothing_out(page: Page) -> None:
    assert [s["id"] for s in page.all("section")] == SECTIONS
    assert "Left out of this report" not in page.text


def test_the_page_needs_no_network_and_runs_no_script(page: Page, written: Path) -> None:
    assert not page.all("script")
    assert not page.all("link")
    assert all((i["src"] or "").startswith("data:image/") for i in page.all("img"))
    assert not re.search(r"https?://", written.read_text(encoding="utf-8"))
    assert any("default-src 'none'" in (m.get("content") or "") for m in page.all("meta"))


def test_every_picture_is_a_picture_and_has_a_text_for_those_who_do_not_see_it(page: Page) -> None:
    for attrs in page.all("img"):
        assert attrs["alt"]
        data = base64.b64decode((attrs["src"] or "").split(",", 1)[1])
        with Image.open(io.BytesIO(data)) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_every_figure_also_lies_beside_the_page_as_png(page: Page, written: Path) -> None:
    beside = written.with_name("report_files")
    assert len(list(beside.glob("*.png"))) == len(page.all("img"))
    names = {p.stem for p in beside.glob("*.png")}
    assert {"scores", "training", "crop-pairs", "attention-tiny", "confusion-knn", "map-features-tile"} <= names


def test_the_headline_says_the_result_and_the_baselines_in_words(page: Page) -> None:
    assert "right 80% of the time" in page.text
    assert "95% interval 75% to 85%" in page.text
    assert "same network, untrained 31%" in page.text
    assert "guessing 20%" in page.text


def test_the_ring_marks_the_k_that_evaluate_chose(everything: Path) -> None:
    folder = find_outputs(everything / "evaluation").evaluations[0]
    evaluation = read_evaluation(folder)
    assert evaluation.per_k == {5: 0.75, 20: 0.8}
    assert evaluation.chosen_k == 20
    axes = draw_per_k([KCurve("a", evaluation.per_k, evaluation.chosen_k)]).axes[0]
    (ring,) = axes.collections
    assert np.asarray(ring.get_offsets()).tolist() == [[20, 0.8]]


def test_the_page_says_that_the_slides_are_synthetic_at_its_head_and_foot(page: Page) -> None:
    assert "All 3 slides in this report were drawn by odis-path" in page.text
    assert "Every slide in this report is synthetic" in page.text


def test_settings_hold_the_tiling_the_configuration_and_the_hash_of_the_data(page: Page) -> None:
    assert '"size_px": 64' in page.text
    assert "whole_tile_p: 0.5" in page.text
    assert "ab" * 32 in page.text
    assert '"scikit-learn"' in page.text


def test_the_page_repeats_whom_the_encoder_saw_and_what_was_done_to_features(page: Page, written: Path) -> None:
    assert "The encoder was pretrained on 1 of the 3 tested patients." in page.text, "in the headline's words"
    assert "5 folds; the encoder was pretrained on 1 of the 3 tested patients" in page.text, "in the table"
    assert "zscore" in page.text
    assert "whiten" in page.text
    first = json.loads((written.with_name("report_files") / "report.json").read_text())["evaluations"][0]
    assert first["standardised"] == {"this model": "zscore", "same network, untrained": "whiten", "mean colour": ""}


def test_the_numbers_lie_beside_the_page_as_csv_and_json(written: Path) -> None:
    beside = written.with_name("report_files")
    numbers = json.loads((beside / "report.json").read_text())
    assert numbers["cohort"]["slides"] == 3
    assert numbers["evaluations"][0]["scores"]["balanced_accuracy"] == pytest.approx({"point": 0.8, "low": 0.75, "high": 0.85})
    assert numbers["maps"]["features, tile"]["same_class"] > 0.9
    with (beside / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["what"] == "this model"
    assert float(rows[0]["point"]) == 0.8
    with (beside / "confusion-knn.csv").open() as file:
        assert next(csv.reader(file)) == ["truth", "lymphoid infiltrate", "necrosis", "normal glands", "stroma", "tumour"]


def test_a_second_report_replaces_the_first_and_does_not_report_on_it(everything: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(everything / "evaluation", folder)
    first = report(folder).page
    shutil.rmtree(folder / "linear")
    second = report(folder).page
    assert first == second == folder / "report.html"
    assert {p.name for p in (folder / "report_files").glob("confusion*.png")} == {"confusion-knn.png"}


def test_evaluations_alone_give_headline_results_and_settings(everything: Path, tmp_path: Path) -> None:
    page = Page(report(everything / "evaluation", tmp_path / "r.html").page.read_text())
    assert [s["id"] for s in page.all("section")] == ["headline", "results", "settings"]
    assert "synthetic" not in page.text


def test_slide_files_alone_give_cohort_and_slides(everything: Path, tmp_path: Path) -> None:
    page = Page(report(everything / "tiles", tmp_path / "r.html").page.read_text())
    assert [s["id"] for s in page.all("section")] == ["headline", "cohort", "slides", "settings"]


def test_broken_files_are_named_and_the_rest_is_reported(everything: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(everything / "evaluation", folder)
    (folder / "linear" / "results.json").write_text("{cut of")
    (folder / "slide.h5").write_bytes(b"not HDF5")
    page = Page(report(folder).page.read_text())
    assert "slide.h5: not a readable HDF5 file" in page.text
    assert "linear/results.json: not readable as JSON" in page.text
    assert "right 80% of the time" in page.text


def test_names_with_markup_are_shown_as_they_are(everything: Path, tmp_path: Path) -> None:
    results = json.loads((everything / "evaluation" / "knn" / "results.json").read_text())
    results["labels"][0] = "<script>alert(1)</script>"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "<script" not in report(tmp_path).page.read_text()


def test_an_evaluation_that_lacks_parts_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"probe": "knn", "headline": {"balanced_accuracy": 0.5, "auroc": None}}))
    page = Page(report(tmp_path).page.read_text())
    assert "0.500" in page.text


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no slide files") as caught:
        report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(UserError, match="no such folder"):
        report(tmp_path / "missing")


@pytest.mark.browser
def test_chromium_shows_every_picture_without_a_complaint(written: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    check = tmp_path / "check.html"
    html = written.read_text(encoding="utf-8")
    html = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    html = html.replace(
        "</body>",
        "<script>onload = () => { const images = [...document.images]; document.title = 'shown ' + "
        "images.filter(i => i.complete && i.naturalWidth > 100).length + ' of ' + images.length + ', wide ' + "
        "(document.documentElement.scrollWidth > innerWidth); }</script></body>",
    )
    check.write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--window-size=900,1200",
            "--dump-dom",
            check.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    count = html.count("<img ")
    assert f"<title>shown {count} of {count}, wide false</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
