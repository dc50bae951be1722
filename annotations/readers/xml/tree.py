"""XML bytes -> elements, with document types and entities refused: they can name other files and grow without bound."""

from __future__ import annotations

from collections.abc import Collection
from xml.etree import ElementTree
from xml.parsers import expat

from annotations.errors import UserError

READ = "ASAP, ImageScope, HALO and NDP.view are read"
REMEDY = "export the annotations as GeoJSON"


def parse_xml(data: bytes, source: str, remedy: str = "export the annotations again") -> ElementTree.Element:
    """Parse to the root element. Raises UserError for what is no XML, and for a DOCTYPE or an ENTITY (nothing is expanded).

    remedy: what the user is told to do where it is no XML.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(*_: object) -> None:
        raise UserError(f"{source}: holds a DOCTYPE or an ENTITY, which annotations have no use for: take it out")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise UserError(f"{source}: not XML ({error}): {remedy}") from None


def refuse_foreign(root: ElementTree.Element, source: str, positions: Collection[str], empty: Collection[str]) -> None:
    """Refuse a file that has none of the elements that hold positions, and others than one without any may have.

    Its root is that of a program we read, what is in it is not.
    """
    tags = dict.fromkeys(element.tag for element in root.iter())
    del tags[root.tag]
    foreign = [tag for tag in tags if tag not in empty]
    if foreign and not any(tag in tags for tag in positions):
        what = f"XML <{root.tag[:60]}> with <{foreign[-1][:60]}>"
        raise UserError(f"{source}: {what}, of no known program ({READ}): {REMEDY}")


def number(text: str | None) -> float:
    """Return a number as programs of any language write it, a decimal comma included; NaN where there is none."""
    try:
        return float((text or "").strip().replace(",", "."))
    except ValueError:
        return float("nan")


def position(element: ElementTree.Element) -> tuple[float, float]:
    """Return attributes X and Y."""
    return number(element.get("X")), number(element.get("Y"))
