"""Paths of files and URLs: http, s3 and whatever else fsspec opens.

They travel as paths like all others. pathlib takes one of a URL's slashes ("http:/host/a.svs"), which is put back here.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote

from annotations.errors import UserError, one_line

URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+(.+)$")
SHORT = re.compile(r"(?<![\w/])(https?|ftp|s3a?|gs|gcs|az|abfss?|memory|hdfs|sftp):/(?=[^/])")  # with its slash taken
LOCAL = ("file", "local")
VERSIONS = ("ETag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")  # of fsspec's kinds


def url_of(path: Path | str) -> str | None:
    """Return the URL a path stands for, also where pathlib took one of its slashes; None for a file of this machine."""
    match = URL.match(str(path))
    if match is None:
        return None
    scheme, rest = match.groups()
    return f"{scheme}:///{rest}" if scheme in (*LOCAL, "memory") else f"{scheme}://{rest}"


def parse_path(path: Path | str) -> Path:
    """Parse a file or URL as a user gives it; of file:///folder/a.svs the file on this machine."""
    url = url_of(path)
    if url is None:
        return expand_home(path)
    scheme, _, rest = url.partition("://")
    if scheme in LOCAL:
        return Path(unquote(rest) if scheme == "file" else rest)
    return Path(url)


def expand_home(path: Path | str) -> Path:
    """Replace `~` or `~user` in front of a path by that home; another name with a tilde, as `~$lock.svs`, stays."""
    return Path(os.path.expanduser(path))


def absolute(path: Path) -> Path:
    """A path that does not depend on the working folder."""
    return path if url_of(path) else path.absolute()


def path_key(path: Path) -> str:
    """Return one text for one file, however its path is written: absolute, without . and .. in it; a URL stays as it is."""
    return url_of(path) or os.path.normpath(path.absolute())


def display_path(path: Path) -> str:
    """Return a path as the user knows it."""
    return url_of(path) or str(path)


def printable(path: Path | str) -> str:
    """Return a path as text that any file holds: of a name that is not UTF-8 the odd bytes as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def restore_slashes(text: str) -> str:
    """Put the slashes back that pathlib took of the URLs in a message."""
    return SHORT.sub(r"\1://", text)


def file_name(path: Path) -> str:
    """The last part of a path, of a URL without what follows its question mark."""
    return Path(url.partition("?")[0]).name if (url := url_of(path)) else path.name


def url_stamp(url: str) -> tuple[int, int]:
    """Return the size in bytes, and a number that changes with the file's tag or time (0 where the server tells neither).

    (-1, -1) where there is no such file, or nothing opens such URLs.
    """
    from fsspec.core import url_to_fs

    try:
        system, name = url_to_fs(url)
        info = system.info(name)
    except Exception:  # each kind of store has errors of its own; whoever reads the slide tells them
        return -1, -1
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    digest = hashlib.sha256(version.encode()).digest() if version else b""
    return int(info.get("size") or -1), int.from_bytes(digest[:7], "big")


def list_urls(url: str, suffixes: frozenset[str]) -> list[Path]:
    """List files with these suffixes below a URL (searched recursively) or that match it (with * in it), in order.

    Raises UserError where it cannot be listed or holds none.
    """
    from fsspec.core import url_to_fs

    try:
        system, name = url_to_fs(url)
        names = system.glob(name) if "*" in name else system.find(name)
    except Exception as error:  # each kind of store has errors of its own
        raise UserError(f"{url}: cannot be listed: {one_line(error) or type(error).__name__}") from None
    paths = [Path(system.unstrip_protocol(name)) for name in sorted(names)]
    if not (slides := [path for path in paths if Path(file_name(path)).suffix.lower() in suffixes]):
        raise UserError(f"{url}: no slide is listed there (looked for {' '.join(sorted(suffixes))}): name each by its URL")
    return slides
