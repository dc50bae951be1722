"""Merge, drop and copy the objects and boxes of a slide file (`annotate --append`, `propose --from-cells`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from annotations.errors import UserError
from tiling.slide_file.write import Columns
from tiling.storage.checked_file import CheckedFile

if TYPE_CHECKING:
    from annotations.geometry.clip import TileBoxes

PARTS_ATTR = "annotation_parts"  # JSON: the record of every run whose objects are in the groups
Groups = dict[str, Columns]  # of "objects" and "boxes"
Record = Mapping[str, Any]  # JSON: the settings of one run of annotate, and the stamps of its files


def run_records(attrs: Mapping[str, Any], record_attr: str) -> list[Record]:
    """Read the records of the runs of annotate behind the groups of a slide file, from the attributes of /objects."""
    texts = attrs.get(PARTS_ATTR) or (f"[{attrs[record_attr]}]" if record_attr in attrs else "[]")
    records: list[Record] = json.loads(texts)
    return records


def files_to_read(path: Path, files: Sequence[Path], record: Record, parts: Sequence[Record]) -> list[Path]:
    """Choose the files that no earlier run read. record: of this run, with the stamp of each file under "files".

    Raises UserError where a file of the same name was read with another content or under other settings: its objects would
    be stored twice.
    """
    earlier = {stamp["name"]: (stamp, part) for part in parts for stamp in part["files"]}
    unread = []
    for file, stamp in zip(files, record["files"], strict=True):
        if stamp["name"] not in earlier:
            unread.append(file)
            continue
        old, part = earlier[stamp["name"]]
        changed = [key for key in record if key not in ("files", "polygons") and record[key] != part.get(key)]
        if old != stamp or changed:
            difference = "another content" if old != stamp else f"other settings ({', '.join(changed)})"
            raise UserError(
                f"{path}: objects of {stamp['name']} are there already, with {difference}: "
                "leave out --append to replace them, or rename the file to have both"
            )
    return unread


def read_groups(path: Path) -> Groups:
    """Read /objects and /boxes of a slide file in the form that `replace_groups` takes."""
    with CheckedFile(path, lambda _: "annotate it anew, without --append") as file:
        return {name: _group(file, name) for name in ("objects", "boxes")}


def merge_groups(path: Path, old: Groups, new: Groups) -> Groups:
    """Put the objects and boxes of a further run behind those of a slide file, each object with its one row.

    Classes are merged by name. A column that one of the two lacks is filled with NaN, -1 or "". Raises UserError where one of
    the two has outlines for its boxes and the other has none.
    """
    from annotations.geometry.clip import concatenate_boxes

    if ("polygon" in old["boxes"]) != ("polygon" in new["boxes"]):
        raise UserError(f"{path}: outlines are stored for all boxes or for none: annotate it anew, without --append")
    n_old, n_new = len(old["objects"]["label"]), len(new["objects"]["label"])
    n_tiles = len(new["boxes"]["offsets"]) - 1
    boxes = concatenate_boxes([_tile_boxes(old["boxes"]), _tile_boxes(new["boxes"])], [n_old, n_new], n_tiles)
    columns = dict.fromkeys(name for group in (old, new) for name in group["objects"] if name != "attrs")
    objects: Columns = {name: _column(old["objects"].get(name), new["objects"].get(name), n_old, n_new) for name in columns}
    labels = [str(name) for name in old["objects"]["attrs"].get("labels", ())]
    new_labels = [str(name) for name in new["objects"]["attrs"].get("labels", ())]
    labels += [name for name in new_labels if name not in labels]
    merged_label = np.array([*map(labels.index, new_labels), -1], dtype=np.int16)  # label -1 indexes it from behind
    objects["label"][n_old:] = merged_label[new["objects"]["label"]]
    objects["attrs"] = {**old["objects"]["attrs"], "labels": labels}
    columns_of_boxes: Columns = {"xyxy": boxes.xyxy, "offsets": boxes.offsets, "object": boxes.object, "visible": boxes.visible}
    if boxes.polygons is not None:
        columns_of_boxes["polygon"] = boxes.polygons.arrays()
    return {"objects": objects, "boxes": {**columns_of_boxes, "attrs": dict(old["boxes"].get("attrs", {}))}}


def _group(file: CheckedFile, name: str) -> Columns:
    content: Columns = {"attrs": {key: _plain(value) for key, value in file.attrs(name).items()}}
    with file.reading(name, f"/{name}"):
        nodes = dict(file.h5[name].items())
    for key, node in nodes.items():
        full = f"{name}/{key}"
        if isinstance(node, h5py.Group):
            content[key] = _group(file, full)
        else:
            content[key] = file.texts(full) if h5py.check_string_dtype(node.dtype) else file.array(full)
    return content


def _plain(value: Any) -> Any:
    """Turn an attribute of names, which HDF5 gives back as an array of objects, into a list."""
    return list(map(str, value)) if isinstance(value, np.ndarray) and value.dtype == object else value


def _tile_boxes(group: Columns) -> TileBoxes:
    from annotations.geometry.clip import TileBoxes, TilePolygons

    outlines = group.get("polygon")
    polygons = TilePolygons(*(outlines[name] for name in ("xy", "ring_offsets", "offsets"))) if outlines else None
    return TileBoxes(group["xyxy"], group["offsets"], group["object"], group["visible"], polygons=polygons)


def _column(old: Any, new: Any, n_old: int, n_new: int) -> np.ndarray:
    first, second = (_array(values) if values is not None else None for values in (old, new))
    known = first if first is not None else second
    assert known is not None
    nothing = {"f": np.nan, "i": -1, "u": 0}.get(known.dtype.kind, "")
    parts = [
        part if part is not None else np.full((n, *known.shape[1:]), nothing, dtype=known.dtype)
        for part, n in ((first, n_old), (second, n_new))
    ]
    return np.concatenate(parts)


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=object) if isinstance(values, list) else np.asarray(values)


def drop_objects(groups: Groups, labels: tuple[str, ...]) -> Groups:
    """Leave out of /objects and /boxes of a slide file (`read_groups`) the proposals of some labels."""
    from annotations.objects import Kind

    names = [str(name) for name in groups["objects"]["attrs"].get("labels", ())]
    gone = np.isin(groups["objects"]["label"], [i for i, name in enumerate(names) if name in labels])
    gone &= groups["objects"]["kind"] == Kind.PROPOSAL
    if not gone.any():
        return groups
    objects = {name: part if name == "attrs" else np.asarray(part)[~gone] for name, part in groups["objects"].items()}
    old = groups["boxes"]
    stays = ~gone[old["object"]]
    number = np.cumsum(~gone) - 1
    kept = np.concatenate([[0], np.cumsum(stays)])
    boxes = {**old, "xyxy": old["xyxy"][stays], "visible": old["visible"][stays], "offsets": kept[old["offsets"]]}
    boxes["object"] = number[old["object"][stays]].astype(np.int32)
    if "polygon" in old:
        boxes["polygon"] = _outlines_of(old["polygon"], stays)
    return {"objects": objects, "boxes": boxes}


def _outlines_of(polygon: Columns, stays: np.ndarray) -> Columns:
    """Select from /boxes/polygon the outlines of the boxes that stay, bool (M,)."""
    rings = np.diff(polygon["offsets"])
    ring_stays = np.repeat(stays, rings)
    vertices = np.diff(polygon["ring_offsets"])
    return {
        **polygon,
        "xy": polygon["xy"][np.repeat(ring_stays, vertices)],
        "ring_offsets": np.concatenate([[0], np.cumsum(vertices[ring_stays])]).astype(np.int64),
        "offsets": np.concatenate([[0], np.cumsum(rings[stays])]).astype(np.int64),
    }
