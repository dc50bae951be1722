"""The bytes of an annotation file, out of whatever it is wrapped in: plain, gzip, or zip."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from annotations.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
EMPTY_ZIP_MAGIC = b"PK\x05\x06"
BOM = b"\xef\xbb\xbf"


def read_documents(path: Path) -> list[tuple[str, bytes]]:
    """The JSON documents in a file, each with the name it is called in error messages.

    A plain or gzipped file is one document, a zip holds one or several (its .geojson and .json members). Found out by
    content, not by the file's name. Raises UserError where the file is missing, empty, damaged or encrypted.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if data[:4] in (ZIP_MAGIC, EMPTY_ZIP_MAGIC):
        documents = _zip_members(path)
    elif data[:2] == GZIP_MAGIC:
        try:
            documents = [(str(path), gzip.decompress(data))]
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise UserError(f"{path}: damaged gzip file (cut short?): copy or export it again") from None
    else:
        documents = [(str(path), data)]
    return [(name, _stripped(name, content)) for name, content in documents]


def _zip_members(path: Path) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in sorted(archive.namelist()) if _is_json(name)]
            documents = [(f"{path}:{name}", archive.read(name)) for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise UserError(f"{path}: damaged zip file (cut short?): copy or export it again") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or a compression zipfile does not know
        raise UserError(f"{path}: zip file that cannot be unpacked ({error}): unpack it first") from None
    if not documents:
        raise UserError(f"{path}: zip file without a .geojson or .json member")
    return documents


def _is_json(name: str) -> bool:
    member = PurePosixPath(name)
    hidden = member.name.startswith(".") or "__MACOSX" in member.parts
    return member.suffix.lower() in (".geojson", ".json") and not hidden


def _stripped(name: str, data: bytes) -> bytes:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeDecodeError:
            raise UserError(f"{name}: damaged UTF-16 text: export it again as UTF-8") from None
    data = data.removeprefix(BOM)
    if not data.strip():
        raise UserError(f"{name}: is empty: export the annotations again")
    return data
