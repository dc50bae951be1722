"""Streams decoded in one call give what each gives alone, or nothing."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiling.wsi.backends.jpeg_stack import MAX_HEIGHT_PX, parse_jpeg_header
from tiling.wsi.codec import decode_jpeg

SIDE = 96
SAMPLINGS = {"444": (1, 1), "422": (2, 1), "420": (2, 2), "440": (1, 2), "411": (4, 1)}


def picture(seed: int, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side, 3), sharp in all colours, so that each row differs from the next."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def encoded(seed: int, sampling: str = "422", **options: object) -> bytes:
    return imagecodecs.jpeg8_encode(picture(seed), level=90, subsampling=SAMPLINGS[sampling], **options)


def alone(stream: bytes, scale: int) -> np.ndarray:
    return decode_jpeg(stream, SIDE // scale, SIDE // scale)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_stack_is_each_alone_at_every_sampling_and_scale(sampling: str, scale: int) -> None:
    streams = [encoded(seed, sampling) for seed in range(11)]  # more than there are restart markers
    head = parse_jpeg_header(streams[0])
    assert head is not None
    decoded = head.decode(streams, scale)
    refused = sampling == "440" or (sampling == "420" and scale == 1)  # rows of colour are mixed with their neighbours'
    assert (decoded is None) == refused
    if decoded is not None:
        np.testing.assert_array_equal(decoded, [alone(stream, scale) for stream in streams])


def test_grey_and_untransformed_colours_and_one_alone() -> None:
    grey = [imagecodecs.jpeg8_encode(picture(seed)[..., 0].copy()) for seed in range(3)]
    rgb = [imagecodecs.jpeg8_encode(picture(seed), colorspace="rgb", outcolorspace="rgb") for seed in range(3)]
    for streams in (grey, rgb, rgb[:1]):
        head = parse_jpeg_header(streams[0])
        assert head is not None
        np.testing.assert_array_equal(head.decode(streams, 2), [alone(stream, 2) for stream in streams])


def test_a_head_kept_elsewhere() -> None:
    streams = [encoded(seed) for seed in range(3)]
    first = streams[0][2 : 4 + int.from_bytes(streams[0][4:6], "big")]  # the first segment, which the others lack now
    assert all(stream[2:].startswith(first) for stream in streams)
    head = parse_jpeg_header(streams[0][:2] + streams[0][2 + len(first) :], first)
    assert head is not None
    without = [stream[:2] + stream[2 + len(first) :] for stream in streams]
    np.testing.assert_array_equal(head.decode(without, 2), [alone(stream, 2) for stream in streams])


def test_what_cannot_be_stacked() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "JPEG", progressive=True)
    assert parse_jpeg_header(buffer.getvalue()) is None
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "JPEG", restart_marker_blocks=4)
    assert parse_jpeg_header(buffer.getvalue()) is None
    assert parse_jpeg_header(b"") is None
    assert parse_jpeg_header(b"\xff\xd8") is None
    assert parse_jpeg_header(encoded(0)[:40]) is None
    good, head = encoded(0), parse_jpeg_header(encoded(0))
    assert head is not None
    other = imagecodecs.jpeg8_encode(picture(1), level=50, subsampling=(2, 1))
    assert head.decode([good, other], 2) is None  # other tables
    assert head.decode([good, good[:-2]], 2) is None  # no end
    assert head.decode([good] * (MAX_HEIGHT_PX // SIDE + 1), 2) is None
    odd = parse_jpeg_header(imagecodecs.jpeg8_encode(picture(0, 92), subsampling=(1, 1)))
    assert odd is None  # its last row of blocks is filled up, and would lie between two pictures


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.floats(0, 1), st.binary(min_size=0, max_size=6), st.integers(0, 6))
def test_a_damaged_stream_is_told_or_decoded_as_alone(which: int, where: float, put: bytes, cut: int) -> None:
    streams = [encoded(seed) for seed in range(4)]
    head = parse_jpeg_header(streams[0])
    assert head is not None
    at = len(head.own) + int(where * (len(streams[which]) - len(head.own) - 2))
    streams[which] = streams[which][:at] + put + streams[which][at + cut :]
    decoded = head.decode(streams, 2)
    if decoded is not None:
        np.testing.assert_array_equal(decoded, [alone(stream, 2) for stream in streams])
