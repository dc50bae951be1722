"""The docs: links that lead somewhere, in the repository and on the site; a site that fetches nothing; whole references."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from odis_path import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*.md")])
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="the site is built where `make docs` has set up mkdocs",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file_of_the_repository(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_front_page_begins_with_a_picture_and_the_two_commands() -> None:
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        0
        < front.index("![")
        < front.index("make demo")
        < front.index("make test")
        < front.index("\n## ", front.index("make test"))
    )


def test_there_is_one_version_number() -> None:
    assert "\nversion" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert "version" not in citation
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@needs_mkdocs
def test_every_page_is_on_the_site(site: Path) -> None:
    names = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in ROOT.glob("docs/**/*.md")}
    names |= {Path(f"{name}.html") for name in ("index", "architecture", "contributing", "changelog", "results", "paper_in1k")}
    assert {path.relative_to(site) for path in site.rglob("*.html")} - {Path("404.html")} == names


class Fetched(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") == "canonical":
            return
        self.addresses += [value for key in ("src", "srcset", "href") if tag != "a" and (value := values.get(key))]


@needs_mkdocs
def test_no_page_fetches_a_byte_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert [address for address in parser.addresses if re.match(r"(\w+:)?//", address)] == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", sheet.read_text(encoding="utf-8")) == [], sheet


@needs_mkdocs
def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math ") > 40
    assert not re.search(r"arithmatex|\\\(|\\operatorname", page)


@needs_mkdocs
def test_the_reference_has_every_option_and_every_key(site: Path) -> None:
    from typer.main import get_command

    from odis_path.cli.app import app
    from odis_path.config import PretrainConfig

    page = (site / "cli.html").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        part = page[page.index(f'id="odis-path-{name}"') :]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        shown = [option for parameter in command.params if not parameter.hidden for option in parameter.opts]
        assert [option for option in options if option in shown and option not in part] == [], name
    page = (site / "configuration.html").read_text(encoding="utf-8")
    keys = [
        f"{s}.{k}" for s, field in PretrainConfig.model_fields.items() for k in getattr(field.annotation, "model_fields", ())
    ]
    assert len(keys) > 60
    assert [key for key in keys if f"<code>{key}</code>" not in page] == []


@needs_mkdocs
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a part](cohorts.md#nowhere)", "#nowhere"),
        ("::: tiling.nowhere", "tiling.nowhere"),
    ],
)
def test_a_broken_link_or_reference_fails_the_build(line: str, complaint: str, tmp_path: Path) -> None:
    for name in ("mkdocs.yml", *(page.name for page in ROOT.glob("*.md"))):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("annotations", "tiling", "odis_path", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "start.md").open("a", encoding="utf-8") as page:
        page.write(f"\n\n{line}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr
