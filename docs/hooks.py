"""Hooks of the docs site (mkdocs.yml): pages that lie elsewhere, the reference of commands and keys, formulas as MathML."""

from __future__ import annotations

import html
import json
import posixpath
import re
from math import inf
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click
from typer.main import get_command

ROOT = Path(__file__).parents[1]
PAGES = {  # files outside docs/ that are pages of the site
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/RESULTS.md": "results.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[#)])")  # the path in [text](path#anchor), without those that have a scheme
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what is made from the code; let links between files of the repository lead to pages of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def relinked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target in PAGES or target.startswith("docs/"):
            return posixpath.relpath(PAGES.get(target, target.removeprefix("docs/")), posixpath.dirname(here) or ".")
        return match[1]

    markdown = LINK.sub(relinked, markdown)
    if here == "cli.md":
        return markdown.replace("<!-- commands -->", commands())
    if here == "configuration.md":
        return markdown.replace("<!-- configuration keys -->", configuration_keys())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML of formulas: browsers show it without a script."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="inline" if match[1] == "span" else "block")

    return FORMULA.sub(formula, content)


def commands() -> str:
    """Every command with its arguments and options, as --help tells them."""
    from odis_path.cli.commands import app

    group: Any = get_command(app)
    context = group.context_class(group, info_name="odis-path")
    pages = [
        get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="odis-path")
        for name, command in group.commands.items()
    ]
    return "\n".join(pages).replace("**Usage**:\n\n", "")


def configuration_keys() -> str:
    """Every key of a training configuration: what it may be, its default, what it means."""
    from odis_path.train.config import PretrainConfig

    parts = []
    for section, field in PretrainConfig.model_fields.items():
        model: Any = field.annotation
        if not hasattr(model, "model_fields"):
            continue
        rows = [f"## {section}\n\n{model.__doc__}\n", "| key | values | default | |", "|---|---|---|---|"]
        schema = model.model_json_schema()["properties"]
        for key, value in model.model_fields.items():
            default = json.dumps(schema[key]["default"], ensure_ascii=False)
            rows.append(f"| `{section}.{key}` | {_values(schema[key])} | `{default}` | {value.description or ''} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


TYPES = {
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "true, false",
    "object": "mapping",
    "null": "null",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _values(schema: dict[str, Any]) -> str:
    """What a key may be, from its JSON schema: "whole number ≥ 1"."""
    if "enum" in schema:
        return ", ".join(f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"])
    if items := schema.get("prefixItems"):
        return f"{len(items)} times {_values(items[0])}"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    bounds = ", ".join(f"{sign}\u00a0{schema[key]:g}" for key, sign in BOUNDS.items() if abs(schema.get(key, inf)) < 1e9)
    return f"{TYPES[schema['type']]} {bounds}".strip()
