"""Class names by a YAML file: many names, one label; what is not named; what cannot be a map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from annotations import UserError, read_annotations, read_classmap

RING = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]


def table(tmp_path: Path, *names: str | None):
    items = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [RING]}, "properties": {"classification": name}}
        for name in names
    ]
    (tmp_path / "a.geojson").write_text(json.dumps(items))
    return read_annotations(tmp_path / "a.geojson")


def classmap(tmp_path: Path, text: str, **options):
    (tmp_path / "map.yaml").write_text(text)
    return read_classmap(tmp_path / "map.yaml", **options)


MAP = "Stroma:\nTumour: [tumor, TUM, 1]\nImmune: lymphocyte\nNecrosis: []\n"


def test_many_names_one_label(tmp_path: Path) -> None:
    mapped = classmap(tmp_path, MAP).applied(
        table(tmp_path, " tum ", "Tumor", None, "tumour", "1", "LYMPHOCYTE", "fat", "stroma")
    )
    assert mapped.labels == ("Stroma", "Tumour", "Immune", "fat")
    assert mapped.label.tolist() == [1, 1, -1, 1, 1, 2, 3, 0]
    assert mapped.label.dtype == np.int16


def test_unknown_classes(tmp_path: Path) -> None:
    before = table(tmp_path, "tumor", "fat", "fold")
    assert classmap(tmp_path, MAP).unknown(before.labels) == ("fat", "fold")
    with pytest.raises(UserError, match=r"^fat, fold: not named in .*map.yaml.*--strict-classes"):
        classmap(tmp_path, MAP, strict=True).applied(before)
    assert classmap(tmp_path, MAP, strict=True).applied(table(tmp_path, "tumor", None)).labels == ("Tumour",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A: [x]\nB: [X]", "X stands under A and B"),
        ("A: [b]\nB:", "B stands under A and B"),
        ("A: [No]", "put names in quotes"),
        ("A: {b: c}", "no class name"),
        ("A: ['']", "no class name"),
        ("- A\n- B", "no class names"),
        ("", "no class names"),
        ("A: [", "not YAML"),
    ],
)
def test_what_is_no_map(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        classmap(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_missing_map(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_classmap(tmp_path / "none.yaml")
