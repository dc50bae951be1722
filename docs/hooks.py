"""Hooks of the docs site (mkdocs.yml): pages that lie elsewhere, the reference of commands and keys, formulas as MathML."""

from __future__ import annotations

import html
import json
import pkgutil
import posixpath
import re
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from typer.cli import get_docs_for_click
from typer.main import get_command

ROOT = Path(__file__).parents[1]
PAGES = {  # files outside docs/ that are pages of the site
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/RESULTS.md": "results.md",
    "experiments/paper_in1k.md": "paper_in1k.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[#)])")  # the path in [text](path#anchor), without those that have a scheme
MADE = re.compile(r"<!-- (commands|keys): ([\w.]+) -->")  # what a page wants made of an object of the code
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

    return MADE.sub(lambda match: MAKERS[match[1]](pkgutil.resolve_name(match[2])), LINK.sub(relinked, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Make MathML of formulas: browsers show it without a script."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="inline" if match[1] == "span" else "block")

    return FORMULA.sub(formula, content)


def commands(app: typer.Typer) -> str:
    """Every command with its arguments and options, as --help tells them."""
    group: Any = get_command(app)
    context = group.context_class(group, info_name="odis-path")
    pages = [
        get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="odis-path")
        for name, command in group.commands.items()
    ]
    return "\n".join(pages).replace("**Usage**:\n\n", "")


def configuration_keys(config: type[BaseModel]) -> str:
    """Every key of a configuration: what it may be, its default, what it means."""
    parts = []
    for section, field in config.model_fields.items():
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
    if parts := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(_values(part) for part in parts)
    if "const" in schema:
        return f"`{schema['const']}`"
    if items := schema.get("prefixItems"):
        return f"{len(items)} times {_values(items[0])}"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    bounds = ", ".join(f"{sign}\u00a0{schema[key]:g}" for key, sign in BOUNDS.items() if abs(schema.get(key, inf)) < 1e9)
    return f"{TYPES[schema['type']]} {bounds}".strip()


MAKERS: dict[str, Callable[[Any], str]] = {"commands": commands, "keys": configuration_keys}
