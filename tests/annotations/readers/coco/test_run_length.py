"""Run-length masks: the text of lengths by its definition, outlines against those of the unpacked mask."""

from __future__ import annotations

import time

import numpy as np
import pytest
import shapely

from annotations.geometry.trace_mask import trace_outlines
from annotations.readers.coco.run_length import lengths_of, outlines_of, runs_of

# Made with the COCO tools: a mask of 7 x 5 pixels, row by row, and a frame of 30 x 25 with a hole in it, in 60 x 50.
SMALL = ("10001", "11111", "10101", "01100", "00111", "01111", "10011")
SMALL_TEXT = "033NN00000140L05OM"
FRAME_TEXT = r"f9n0n000000000\O\O0d00" + r"\O0d00" * 8 + r"\O0d0d0000000000000000000VU1"


def lengths(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask of 0 and 1, column by column, the first of 0."""
    flat = mask.T.reshape(-1).tolist()
    runs, value = [0], 0
    for pixel in flat:
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def text(numbers: list[int]) -> str:
    """The same as text, a digit at a time."""
    out = ""
    for i, number in enumerate(numbers):
        left = number - numbers[i - 2] if i > 2 else number
        while True:
            digit, left = left % 32, left // 32
            done = (left == 0 and digit < 16) or (left == -1 and digit >= 16)
            out += chr(48 + digit + (0 if done else 32))
            if done:
                break
    return out


def coco(mask: np.ndarray, *, packed: bool = True) -> dict:
    numbers = lengths(mask)
    return {"size": list(mask.shape), "counts": text(numbers) if packed else numbers}


def test_the_text_that_the_coco_tools_write() -> None:
    mask = np.array([[int(pixel) for pixel in row] for row in SMALL])
    assert text(lengths(mask)) == SMALL_TEXT
    assert lengths_of(SMALL_TEXT).tolist() == lengths(mask)
    runs, size = runs_of({"size": [7, 5], "counts": SMALL_TEXT})
    assert size == (5, 7)
    assert outlines_of([runs])[1][0].area == mask.sum()
    runs, _ = runs_of({"size": [60, 50], "counts": FRAME_TEXT})
    ring = shapely.box(5, 10, 30, 40).difference(shapely.box(10, 20, 20, 30))
    assert outlines_of([runs])[1][0].equals(ring)


@pytest.mark.parametrize("seed", range(20))
def test_any_lengths_come_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 10 ** rng.integers(1, 12), rng.integers(1, 40)).tolist()
    assert lengths_of(text(numbers)).tolist() == numbers


def test_outlines_are_those_of_the_unpacked_masks() -> None:
    """All at once or each alone: equal to the label image's outlines, corner for corner, holes and patches included."""
    rng = np.random.default_rng(0)
    masks = [(rng.random(rng.integers(1, 16, 2)) < rng.random()).astype(np.uint8) for _ in range(400)]
    masks += [np.ones((3, 4), np.uint8), np.zeros((3, 4), np.uint8), np.eye(6, dtype=np.uint8), np.eye(6, dtype=np.uint8)[::-1]]
    runs = [runs_of(coco(mask, packed=bool(i % 2)))[0] for i, mask in enumerate(masks)]
    which, outlines = outlines_of(runs)
    assert which.tolist() == [i for i, mask in enumerate(masks) if mask.any()]
    assert shapely.is_valid(outlines).all()
    for i, outline in zip(which.tolist(), outlines, strict=True):
        expected = trace_outlines(masks[i])[1][0]
        assert outline.equals(expected)
        assert shapely.get_num_coordinates(outline) == shapely.get_num_coordinates(expected)
        assert outlines_of([runs[i]])[1][0].equals(outline)


def test_runs_with_nothing_in_between_are_one() -> None:
    runs, _ = runs_of({"size": [4, 3], "counts": [1, 2, 0, 1, 4, 0, 1, 3]})
    outline = outlines_of([runs])[1][0]
    assert outline.equals(shapely.union(shapely.box(0, 1, 1, 4), shapely.box(2, 1, 3, 4)))
    assert shapely.get_num_coordinates(outline) == 10


def test_a_mask_of_a_whole_slide_is_never_unpacked() -> None:
    height, width = 80_000, 100_000
    numbers = [20_000 + 20_000 * height, 40_000] + [40_000, 40_000] * 59_999
    numbers.append(height * width - sum(numbers))
    start = time.perf_counter()
    runs, size = runs_of({"size": [height, width], "counts": text(numbers)})
    outline = outlines_of([runs])[1][0]
    assert size == (width, height)
    assert outline.equals(shapely.box(20_000, 20_000, 80_000, 60_000))
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"size": [2, 2]},
        {"size": [2], "counts": [4]},
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": [1, 4]},
        {"size": [2, 2], "counts": [-1, 5]},
        {"size": [0, 2], "counts": []},
        {"size": [2, 2], "counts": None},
        {"size": [2, 2], "counts": "P"},
        {"size": [2, 2], "counts": "4 "},
        {"size": [2, 2], "counts": "4ä"},
        {"size": [2, 2], "counts": "o" * 30 + "0"},
        {"size": [1, 10**9], "counts": [0, 10**9]},
        {"size": ["a", 2], "counts": [4]},
        {"size": [2, 2], "counts": [2**70]},
        {"size": [2, 2], "counts": [[4]] * 2},
        {"size": [2, 2], "counts": [2**62, 2**62]},
    ],
)
def test_what_is_no_mask_is_refused(mask: dict) -> None:
    with pytest.raises(ValueError, match=r".+"):
        runs_of(mask)
