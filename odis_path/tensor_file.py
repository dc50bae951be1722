"""Check files of tensors before loading them: torch reads a damaged zip without an error."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from annotations.errors import one_line
from tiling.storage.checksums import DamagedError, crc32

BLOCK_BYTES = 1 << 18  # stays in the cache of a core
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, and at 26 the lengths of the name and the extra field
_SIGNATURE = b"PK\x03\x04"
_BROKEN = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, LookupError, OverflowError, zlib.error, struct.error)
METADATA_KEY = "crc32"  # of a .safetensors file of ours; as JSON, like all of its metadata


def check_zip(path: Path, what: str, remedy: str) -> bool:
    """Compare every member of a zip file (what torch.save writes) with its CRC-32; whether there was something to compare.

    False for a file that is no zip (torch's older form, plain pickles) and for one written without (torch can be told so).
    what: the file should be, such as "a readable checkpoint". Raises DamagedError, one line with the file, the member and the
    remedy; OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if info.file_size]
                if not any(info.CRC for info in members):
                    return False
                for info in members:
                    if _member_crc32(file, archive, info) != info.CRC:
                        raise DamagedError(f"{path}: damaged: {info.filename} does not match its checksum: {remedy}")
        except _BROKEN as error:
            why = one_line(error)[:120]
            raise DamagedError(f"{path}: not {what}, damaged or cut off ({why}): {remedy}") from None
    return True


def _member_crc32(file: BufferedReader, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Compute the CRC-32 of a member, read as torch reads it: where its local header says that it begins."""
    value, remaining = 0, info.file_size
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            while block := member.read(BLOCK_BYTES):
                value = crc32(block, value)
        return value
    file.seek(info.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != _SIGNATURE:
        raise zipfile.BadZipFile(f"{info.filename} has no header")
    file.seek(name_bytes + extra_bytes, 1)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while remaining and (count := file.readinto(buffer[: min(remaining, BLOCK_BYTES)])):
        value = crc32(buffer[:count], value)
        remaining -= count
    return value


def state_crc32(state: Mapping[str, Tensor]) -> str:
    """Compute the CRC-32, eight hex digits, of tensors with names, types and shapes; for a .safetensors file's metadata."""
    value = 0
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        value = crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def load_safetensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], bool]:
    """Load the tensors of a .safetensors file, and whether it holds a checksum (ours do, others' do not) that they match.

    Raises DamagedError where they do not match it, and what safetensors raises for a file that is cut off or of another kind.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        stored = (file.metadata() or {}).get(METADATA_KEY)
    if stored is not None and stored.strip('"') != state_crc32(state):
        raise DamagedError(f"{path}: damaged: its tensors do not match their checksum: {remedy}")
    return state, stored is not None
