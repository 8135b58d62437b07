"""What is done to valid files: bytes changed, tokens replaced by hostile ones, structure that means harm."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

TOKENS = (
    "-1", "0", "1", "2", "3", "1.5", "-0.0", "1e-320", "1e308", "1e400", "nan", "inf", "-inf", "true", "[]", "{}", '""',
    str(2**31), str(2**63 - 1), str(2**63), str(10**400), "0x" + "f" * 5000, "9" * 5000, '"x"', '"' + "x" * 5000 + '"',
    "1979-05-27T07:32:00Z", "[" * 50 + "]" * 50, "[" * 5000, '"\\u0000\\u001b[2J"', "[1, 2]", "'''a\nb'''",
    "{a.b.c = 1}",
)  # fmt: skip
JSON_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1.5, -1e308, float("nan"), float("inf"), "", "x" * 5000, "\0\x1b[2J\ud800",
    "<script>alert(1)</script>", [], {}, [[]], [1, "a"], {"a": {"b": []}},
)  # fmt: skip


def mutate_bytes(draw: Random, data: bytes) -> bytes:
    """Return the bytes with one to eight changes, most of them small, or cut short."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(changed) + 1) if draw.random() < 0.5 else draw.randrange(min(len(changed), 2048) + 1)
        match draw.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                width = draw.choice((1, 2, 4, 8))
                changed[at : at + width] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x01")) * width
            case 2:
                changed[at:at] = draw.randbytes(draw.choice((1, 2, 16, 300)))
            case 3:
                del changed[at : at + draw.choice((1, 2, 16, 300))]
            case 4:
                changed[at:at] = changed[at : at + draw.choice((4, 64, 1024))]
            case _ if draw.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def mutate_toml(draw: Random, text: str) -> bytes:
    """Return a TOML text with a line or value replaced, or broken as a text."""
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(lines))
        match draw.randrange(10):
            case 0 | 1 | 2 | 3 | 8 | 9 if "=" in lines[at]:
                lines[at] = f"{lines[at].split('=')[0]}= {draw.choice(TOKENS)}"
            case 4:
                del lines[at : at + draw.choice((1, 1, 4))]
            case 5:
                lines[at:at] = lines[at : at + draw.choice((1, 3))]
            case 6:
                lines.insert(at, draw.choice(("[[layer]]", "[x.y]", f"{draw.choice('abc')} = {draw.choice(TOKENS)}")))
            case 7 if draw.random() < 0.3:
                lines.insert(at, draw.choice((".".join("a" * 3000) + " = 1", "\0", "a" * 100_000, "[" * 3000)))
        lines = lines or [""]
    data = "\n".join(lines).encode()
    return mutate_bytes(draw, data) if draw.random() < 0.25 else data


def extremes(draw: Random, text: str) -> bytes:
    """Return a TOML text with half of its numbers as small or as large as numbers can be."""
    numbers = ("0", "1e-320", "1e-18", "1", "3", "1e18", "1e308", str(2**31), str(2**63 - 1))
    found = re.compile(r"(?<![\w\"])\d[\w.+-]*")
    return found.sub(lambda old: draw.choice((old[0], draw.choice(numbers))), text).encode()


def mutate_json(draw: Random, value: Any) -> Any:
    """Return JSON with values in it, at any depth, replaced."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        place = draw.choice(list(changed)) if isinstance(value, dict) else draw.randrange(len(changed))
        if draw.random() < 0.1:
            del changed[place]
        else:
            changed[place] = mutate_json(draw, changed[place])
        return changed
    return draw.choice(JSON_VALUES)


def json_bytes(draw: Random, value: Any) -> bytes:
    """Return JSON with a change, as bytes that may be broken too."""
    data = json.dumps(mutate_json(draw, value)).encode()
    match draw.randrange(10):
        case 0:
            return mutate_bytes(draw, data)
        case 1:
            return b"[" * 100_000
    return data


def mutate_csv(draw: Random, text: str) -> bytes:
    """Return a table with cells replaced or broken."""
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(draw.choice((1, 2, 6))):
        row = draw.choice(rows)
        row[draw.randrange(len(row))] = draw.choice((*TOKENS, '"', "a,b,c", "\0", "x" * 200_000))
    data = "\n".join(map(",".join, rows)).encode()
    return mutate_bytes(draw, data) if draw.random() < 0.3 else data


def rewritten(path: Path, target: Path, *, old: bool) -> None:
    """Copy an HDF5 file, object by object; `old`: into the form without checksums, where damage goes unnoticed."""
    with h5py.File(path) as source, h5py.File(target, "w", libver="earliest" if old else "latest") as copy:
        for name in source:
            source.copy(name, copy)
        for name, value in source.attrs.items():
            copy.attrs[name] = value


def _replaced(file: h5py.File, name: str, make: Callable[[], object]) -> None:
    kept = dict(file[name].attrs)
    del file[name]
    make()
    if name in file and isinstance(file.get(name, getlink=True), h5py.HardLink) and name in file:
        for key, value in kept.items():
            file[name].attrs[key] = value


def mutate_hdf5(draw: Random, path: Path) -> None:
    """Give an HDF5 file a structure that means harm: one of its data sets, links or attributes is replaced."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = draw.choice(sorted(names))
        shape, dtype = file[name].shape, file[name].dtype
        other = path.with_name("other.h5")
        virtual = h5py.VirtualLayout(shape, dtype)
        virtual[...] = h5py.VirtualSource(str(other), name, shape)
        space = h5py.h5s.create_simple(shape)
        empty, endless = h5py.Empty("f4"), (None,) * len(shape)
        made: tuple[Callable[[], object], ...] = (
            lambda: file.__setitem__(name, h5py.ExternalLink(str(other), name)),
            lambda: file.__setitem__(name, h5py.ExternalLink("/dev/zero", "/")),
            lambda: file.__setitem__(name, h5py.SoftLink(f"/{name}")),
            lambda: file.__setitem__(name, h5py.SoftLink("/nowhere")),
            lambda: file.create_virtual_dataset(name, virtual),
            lambda: file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]),
            lambda: file.create_dataset(name, (1 << 40, *shape[1:]), dtype, chunks=(1, *shape[1:])),
            lambda: file.create_dataset(name, (1 << 60,), dtype, chunks=(1 << 20,), maxshape=(None,)),
            lambda: file.create_dataset(name, shape, dtype, chunks=(1 << 16,) * len(shape), maxshape=endless),
            lambda: file.create_dataset(name, shape, draw.choice((">f8", ">i2", "f2", "i1", "u8", "S4", "?", "c16"))),
            lambda: file.create_dataset(name, shape, h5py.string_dtype()),
            lambda: file.create_dataset(name, shape, h5py.vlen_dtype("f4")),
            lambda: file.create_dataset(name, shape, np.dtype([("a", "u1"), ("b", "f8")])),
            lambda: file.create_dataset(name, shape, h5py.ref_dtype),
            lambda: file.create_dataset(name, shape, h5py.enum_dtype({"a": 1}, "u1")),
            lambda: file.create_dataset(name, shape[:-1], dtype),
            lambda: file.create_dataset(name, (0, *shape[1:]), dtype),
            lambda: file.create_dataset(name, data=empty),
            lambda: file.create_group(name),
            lambda: h5py.h5t.IEEE_F32LE.copy().commit(file.id, name.encode()),
            lambda: h5py.h5d.create(file.id, b"\xff\xfe", h5py.h5t.STD_U8LE, space),
            lambda: file.create_dataset(name, shape, dtype, chunks=True, compression="gzip", fillvalue=7),
        )  # fmt: skip
        if draw.random() < 0.7:
            _replaced(file, name, draw.choice(made))
        else:
            _mutate_attribute(draw, file)
        if draw.random() < 0.1:
            file["loop"] = file["/"]


def _mutate_attribute(draw: Random, file: h5py.File) -> None:
    owner = file
    if draw.random() < 0.3:
        owner = next(item for item in file.values() if isinstance(item, h5py.Dataset | h5py.Group))
    name = draw.choice([*owner.attrs, "mean", "class_names"])
    values: tuple[Any, ...] = (
        -1, 1.5, float("nan"), 2**63 - 1, np.uint64(2**64 - 1), "", "x" * 60_000, b"\xff\xfe\x80",
        "\x1b[2J\nhpcnn: fine",
        np.zeros(0), np.arange(7.0), np.zeros((2, 2)), h5py.Empty("f4"), np.array([b"a"] * 1000), ["a", "b"],
        np.full(3, np.inf), np.array([1e-45] * 3), np.zeros(2, [("a", "f4")]),
        "[" * 50_000, "[train]\nlr = nan", "a = 0x" + "f" * 5000, "model = 3",
    )  # fmt: skip
    owner.attrs[name] = draw.choice(values)


def hostile_tar(draw: Random, members: dict[str, bytes]) -> bytes:
    """Return an archive of the members, one of which means harm, or has a header that does."""
    kind, name, parts = draw.randrange(10), draw.choice(sorted(members)), list[bytes]()
    for each, data in members.items():
        info = tarfile.TarInfo(each)
        info.size = len(data)
        if each == name and kind < 5:  # a link or a device instead
            info.name = draw.choice((each, f"../../{each}", f"/etc/{each}"))
            info.type = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)[kind]
            info.linkname, info.size = "/etc/passwd", 0
        elif kind == 5:
            info.name = f"../../../../tmp/{each}"
        elif kind == 6 and each == name:
            info.size = draw.choice((1 << 27, 1 << 40, 0, 1))
        elif kind == 7:
            info.pax_headers = {"path": "x" * 9000 + "/" + each, "size": draw.choice(("-1", "99999999999", "x"))}
        elif kind == 8 and each == name:
            info.type = tarfile.GNUTYPE_SPARSE
        parts += [info.tobuf(tarfile.PAX_FORMAT), data[: info.size], bytes(-min(len(data), info.size) % 512)]
    if kind == 9:
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = draw.choice((tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)), 1 << 33
        few = draw.random() < 0.2
        parts.insert(0, header.tobuf() + bytes(700 << 20) if few else header.tobuf() * 3000)
    data = b"".join([*parts, bytes(1024)])
    data = gzip.compress(data, 1) if draw.random() < 0.5 or len(data) > 1 << 24 else data
    return mutate_bytes(draw, data) if draw.random() < 0.3 else data


def hostile_place(draw: Random, path: Path) -> None:
    """Put something in the place of a file that is no file: a pipe, a folder, a device, a link to nowhere or itself."""
    path.unlink(missing_ok=True)
    match draw.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path)
        case _:
            path.symlink_to("/nowhere")
