"""CRC-32 of what files hold: the one that zlib, zip files and PNG have, so that other programs can check it too."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from annotations.errors import UserError


class DamagedError(UserError):
    """A file does not hold what was written into it. what: the damage alone, without the file and the remedy."""

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what


@lru_cache(maxsize=1)
def _function() -> Any:
    from imagecodecs import deflate_crc32  # libdeflate's: several times as quick as zlib's

    return deflate_crc32


def crc32(data: Any, start: int = 0) -> int:
    """CRC-32 of bytes (or of a C-contiguous array of bytes); start: the CRC-32 of what stands before them."""
    return int(_function()(data, start))


def value_crc32(value: Any) -> int:
    """CRC-32 of an attribute or a dataset as h5py gives it: of its type, shape and bytes, or of its texts.

    Text is the same as str and as bytes. str, bytes, a number, an array or a list of str.
    """
    if isinstance(value, str | bytes):
        return crc32(_encoded(value))
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        texts = array.ravel().tolist()
        if set(map(type, texts)) != {bytes}:
            texts = [_encoded(text) for text in texts]
        lengths = np.array([*array.shape, *map(len, texts)], dtype=np.int64)
        return crc32(b"".join(texts), crc32(lengths.tobytes()))
    head = crc32(f"{array.dtype.str}{array.shape}".encode())
    return crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), head) if array.size else head


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)


DAMAGED = "the file was damaged"
