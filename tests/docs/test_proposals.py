"""The examples of docs/proposals.md are read as it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tiling.boxes.run import annotate
from tiling.slide_file.read import SlideFile
from tiling.slide_file.write import SlideMeta, write_slide_file

PAGE = (Path(__file__).parents[2] / "docs" / "proposals.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("example", "objects"), list(zip(EXAMPLES, [2, 1, 1], strict=True)))
def test_an_example_becomes_objects(example: str, objects: int, tmp_path: Path) -> None:
    meta = SlideMeta("slide_17", tmp_path / "slide_17.svs", 40000, 32000, 0.5, 0.25, 224, parameters={"x": 1})
    coords = np.array([(x, y) for y in range(0, 4480, 448) for x in range(0, 5600, 448)])
    write_slide_file(tmp_path / "tiles" / "slide_17.h5", meta=meta, coords=coords)
    (tmp_path / "slide_17.json").write_text(example)
    (outcome,) = annotate(tmp_path / "tiles", tmp_path / "slide_17.json", workers=1)
    assert outcome.ok, outcome.message
    with SlideFile(tmp_path / "tiles" / "slide_17.h5") as file:
        assert len(file.objects_table()["id"]) == objects
        assert (file.objects_table()["kind"] == 1).all()
        assert len(file.boxes_table()["object"]) >= objects


def test_the_keys_of_box_noise_are_those_of_the_configuration() -> None:
    config = (Path(__file__).parents[2] / "odis_path" / "config.py").read_text()
    keys = re.findall(r"`target\.(noise_\w+)=", PAGE)
    assert len(keys) == 3
    for key in keys:
        assert f"    {key}: " in config
