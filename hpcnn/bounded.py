"""Files that anybody may have written, read with bounds: regular ones, not endless, not nested or claiming without end.

Whoever opens such a file comes through here: a pipe or a device would be waited for or read for ever, and TOML, JSON
and HDF5 readers take whatever time and memory a few bytes ask them for.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_TEXT_BYTES = 1 << 20
"""Of configurations, plans and machine files; those of the largest models have a tenth of it."""
MOST_DOTS = 256
"""In a line of TOML: the time that a dotted key takes to be read grows with the square of its parts."""
INTEGERS = range(-(1 << 63), 1 << 63)
"""Those that TOML promises; larger ones cannot even be printed."""
LARGEST_ATTRIBUTE_BYTES = 16 << 20
MOST_ATTRIBUTE_ITEMS = 1 << 20


def opened(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; raises OSError, for pipes and devices too, which are not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        folder = stat.S_ISDIR(mode)
        raise OSError(errno.EISDIR if folder else errno.EINVAL, f"it is a {'folder' if folder else 'pipe or device'}")
    return os.fdopen(descriptor, "rb")


def require_regular(path: str | Path) -> None:
    """Raise OSError unless `path` is a regular file that can be opened: for libraries that open files themselves."""
    opened(path).close()


def text(path: str | Path, most_bytes: int = LARGEST_TEXT_BYTES, errors: str = "strict") -> str:
    """Return the text of a file.

    Raises
    ------
    OSError
        If it cannot be read, is no regular file, or is longer than `most_bytes`.
    UnicodeDecodeError
        If it is no UTF-8, with `errors` "strict".
    """
    with opened(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it is longer than {most_bytes} bytes")
    return data.decode("utf-8", errors)


def toml(document: str) -> dict[str, Any]:
    """Return the tree of a TOML text; raises ValueError where it is none, or goes beyond what TOML promises."""
    for number, line in enumerate(document.split("\n"), 1):
        if line.count(".") > MOST_DOTS:
            raise ValueError(f"line {number} has more than {MOST_DOTS} dots")
    try:
        tree = tomllib.loads(document.replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    nodes: list[Any] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict | list):
            nodes += node.values() if isinstance(node, dict) else node
        elif isinstance(node, int) and node not in INTEGERS:
            raise ValueError("it has a number of more than 64 bits")
    return tree


def json_value(document: str) -> Any:
    """Return what a JSON text says; raises ValueError where it is none."""
    try:
        return json.loads(document)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def attribute(file: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of an HDF5 file or object, or `default` where it has none, or an empty one.

    Raises
    ------
    ValueError
        If it claims to be large; nothing has been taken for it then.
    """
    if name not in file.attrs:
        return default
    found = file.attrs.get_id(name)
    if found.shape is None:  # it is there, and empty
        return default
    num_items = prod(found.shape)
    if num_items > MOST_ATTRIBUTE_ITEMS or num_items * found.dtype.itemsize > LARGEST_ATTRIBUTE_BYTES:
        raise ValueError(f"attribute '{name}' claims to have {num_items} items of {found.dtype.itemsize} bytes")
    return file.attrs[name]
