"""What the teacher's embeddings know, while a run trains: variance explained by tile, slide, patient and class.

A tile embedded once explains all of its embedding, so each tile gives several pieces: objects in it, embedded as the run trains
them (masked, in windows, or cut out), or its four quarters where tiles have too few objects.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from annotations.errors import UserError
from odis_path.config import PretrainConfig
from odis_path.data.dataset import TileSamples
from odis_path.data.targets import tile_share
from odis_path.data.tile_index import OpenSlides, TileIndex
from odis_path.data.windows import training_samples
from odis_path.embedding.encoder import FrozenEncoder, batches
from odis_path.embedding.request import Mode
from odis_path.evaluation.probes.knn import unit_rows
from odis_path.training.log.rows import VARIANCE, Row
from odis_path.training.shortcut.variance import variance_share
from tiling.slide_file.tile_labels import tile_labels

TILES, PIECES = 96, 4  # tiles at most, pieces of each
_LEAST_TILES = 8  # with two objects or more, for pieces to be objects
_BATCH = 64


class Piece(NamedTuple):
    """An object, or a quarter, of a tile: its pixels' row in `Pieces.images`, its box in them, its class."""

    image: int
    box: np.ndarray
    tile: int
    label: int


@dataclass(frozen=True)
class Pieces:
    """Images uint8 (m, S, S, 3), and of each of n pieces: row of its image int (n,), box (n, 4) in its px, and groups int (n,).

    label: -1 where a piece has no class.
    """

    images: np.ndarray
    image: np.ndarray
    boxes: np.ndarray
    tile: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    label: np.ndarray
    are_objects: bool

    def __len__(self) -> int:
        return len(self.image)


class VarianceProbe:
    """The shares of embedding variance of a cohort, of tiles of training and of held-out patients alike.

    most_tiles: fewer are taken where k-NN compares few, so that this stays the smaller part. `ready` is False where nothing can
    be said: less than two tiles.
    """

    def __init__(self, config: PretrainConfig, train: TileIndex, held_out: TileIndex, patch_px: int, most_tiles: int) -> None:
        self.config = config
        index = _joined(train, held_out)
        views = config.views.model_copy(update={"stain_swap_p": 0.0})  # nothing is coloured, so no stains are measured
        samples = training_samples(index, config.model_copy(update={"views": views}), patch_px)
        try:
            self.pieces = read_pieces(samples, min(TILES, most_tiles))
        finally:
            samples.files.close()
        self.ready = len(set(self.pieces.tile)) > 1

    def score(self, encoder: FrozenEncoder) -> Row:
        """Embed the pieces at the size of global views, and compute the shares that can be: variance_tile and so on."""
        p = self.pieces
        encoder = replace(encoder, resize_px=self.config.views.global_size)
        mode = self._mode()
        rows = [encoder.encode(p.images[p.image[s]], p.boxes[s], mode) for s in batches(len(p), _BATCH)]
        x = unit_rows(np.concatenate(rows))
        labelled = p.label >= 0
        shares = [variance_share(x[labelled], p.label[labelled]) if labelled.any() else None]
        shares += [variance_share(x, groups) for groups in (p.patient, p.slide, p.tile)]
        return {key: share for key, share in zip(VARIANCE, shares, strict=True) if share is not None}

    def _mode(self) -> Mode:
        if not self.pieces.are_objects:
            return "full"
        if not self.config.target.mask:
            return "crop"
        return "window" if self.config.views.window_um else "masked"


def read_pieces(samples: TileSamples, tiles: int) -> Pieces:
    """Choose tiles, as many of each slide as can be, and read their pieces: objects where _LEAST_TILES tiles have two."""
    order = by_turns(samples.index, samples.config.run.seed)
    pieces, images = _objects(samples, order, tiles)
    are_objects = len({piece.tile for piece in pieces}) >= _LEAST_TILES
    if not are_objects:
        pieces, images = _quarters(samples, order, tiles)
    tile = np.array([piece.tile for piece in pieces], np.int64)
    slide = samples.index.slide[tile].astype(np.int64)
    patients = np.unique(samples.index.patients, return_inverse=True)[1]
    return Pieces(
        images=np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8),
        image=np.array([piece.image for piece in pieces], np.int64),
        boxes=np.array([piece.box for piece in pieces], np.float64).reshape(-1, 4),
        tile=tile,
        slide=slide,
        patient=patients[slide],
        label=np.array([piece.label for piece in pieces], np.int64),
        are_objects=are_objects,
    )


def by_turns(index: TileIndex, seed: int) -> np.ndarray:
    """Order tiles so that slides take turns, each with its tiles in a random order: int64 (n,)."""
    mixed = np.random.default_rng([seed, 43]).permutation(len(index))
    turn = np.zeros(len(index), np.int64)
    for slide in np.unique(index.slide):
        own = mixed[index.slide[mixed] == slide]
        turn[own] = np.arange(len(own))
    return mixed[np.argsort(turn[mixed], kind="stable")]


def _objects(samples: TileSamples, order: np.ndarray, tiles: int) -> tuple[list[Piece], list[np.ndarray]]:
    """Read up to PIECES objects each of the first tiles that have two or more, and the images that they are seen in."""
    index, files, windows = samples.index, samples.files, bool(samples.config.views.window_um)
    pieces: list[Piece] = []
    images: list[np.ndarray] = []
    names: dict[str, int] = {}
    rng = np.random.default_rng([samples.config.run.seed, 47])
    left = tiles
    for i in order[: 20 * tiles].tolist():  # not the whole of a large cohort without boxes
        slide, row = int(index.slide[i]), int(index.row[i])
        boxes = samples.boxes(files[slide], slide, row)
        usable = [k for k, box in enumerate(boxes.xyxy) if tile_share(box, index.tile_px) <= samples.config.target.whole_share]
        if len(usable) < 2:
            continue
        chosen = rng.permutation(usable)[:PIECES]
        labels = _labels(files, slide, boxes.row[chosen], names)
        with suppress(UserError):
            if windows:
                place = files.windows(slide)
                corners = [place.corner(row, boxes.xyxy[k], samples.side_px) for k in chosen]
                seen = [place.read(row, *corner, samples.side_px) for corner in corners]
                moved = [
                    np.clip(boxes.xyxy[k] - np.tile(c, 2), 0, samples.side_px) for k, c in zip(chosen, corners, strict=True)
                ]
            else:
                seen, moved = [files[slide].tile(row)], list(boxes.xyxy[chosen])
            at = range(len(images), len(images) + len(chosen)) if windows else [len(images)] * len(chosen)
            pieces += [Piece(*piece) for piece in zip(at, moved, [i] * len(chosen), labels, strict=True)]
            images += seen
            left -= 1
        if not left:
            break
    return pieces, images


def _labels(files: OpenSlides, slide: int, rows: np.ndarray, names: dict[str, int]) -> list[int]:
    """Number the classes of rows of /boxes, -1 for none; `names` grows by the classes met."""
    classes = files[slide].objects_table(ids=False)["labels"]
    label = files.box_groups(slide)[1][rows]
    return [names.setdefault(classes[k], len(names)) if k >= 0 else -1 for k in label.tolist()]


def _quarters(samples: TileSamples, order: np.ndarray, tiles: int) -> tuple[list[Piece], list[np.ndarray]]:
    """Read the four quarters of the first tiles, each an image of its own, with the class of its tile."""
    index, files = samples.index, samples.files
    pieces: list[Piece] = []
    images: list[np.ndarray] = []
    names: dict[str, int] = {}
    half = index.tile_px // 2
    for i in order[:tiles].tolist():
        slide, row = int(index.slide[i]), int(index.row[i])
        try:
            tile = files[slide].tile(row)
        except UserError:
            continue
        labels, classes = tile_labels(files[slide])
        label = names.setdefault(classes[labels[row]], len(names)) if labels[row] >= 0 else -1
        for y, x in ((0, 0), (0, half), (half, 0), (half, half)):
            pieces.append(Piece(len(images), np.array([0, 0, half, half], np.float64), i, label))
            images.append(tile[y : y + half, x : x + half])
    return pieces, images


def _joined(train: TileIndex, held_out: TileIndex) -> TileIndex:
    """Put two parts of an index together again."""
    slide, row = (np.concatenate([getattr(train, key), getattr(held_out, key)]) for key in ("slide", "row"))
    return replace(train, slide=slide, row=row)
