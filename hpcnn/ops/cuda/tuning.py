"""Which of several kernels is fastest for a problem: measured once on each kind of GPU, and remembered in the cache.

The table of a GPU's name and of the kernels' sources as they are now lies in a JSON file, so that changed kernels are
measured again. What one process of a node measures the others read: they wait for it rather than measure as well.

Kernels for one problem may round differently, so ranks that choose differently compute slightly different numbers.
Replicas of a model stay equal all the same, since they apply the same summed gradients; but where results are to be
reproducible to the last bit, let all ranks `adopt` what one of them can `export`, or set `HPCNN_TUNING=off`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence

from hpcnn.ops.cuda import cache, compile
from hpcnn.ops.cuda.device import device

VARIABLE = "HPCNN_TUNING"

# Choices by key, for each table's file name: those of this process, and those that were adopted.
_tables: dict[str, dict[str, str]] = {}
_adopted: dict[str, str] = {}
# A table's file name by the name of the device: the fingerprint is computed once.
_files: dict[str, str] = {}


def fastest(key: str, names: Sequence[str], measure: Callable[[str], float]) -> str:
    """Return the name whose `measure(name)` is smallest, from memory or the cache if it was found before.

    Parameters
    ----------
    key : str
        The problem, in all that the choice depends on.
    names : sequence of str
        The candidates; the first is taken where nothing may be measured (`HPCNN_TUNING=off`).
    measure : callable
        Returns seconds, as `device().measure` does; math.inf for a candidate that cannot do it.
    """
    if len(names) == 1 or os.environ.get(VARIABLE, "").lower() == "off":
        return names[0]
    known = _adopted.get(key) or _tables.get(_file(), {}).get(key, "")
    return known if known in names else _look_or_measure(key, names, measure)


def export() -> dict[str, str]:
    """Return the choices that this process has made or read so far for its device, by key."""
    return _tables.get(_file(), {}) | _adopted


def adopt(choices: Mapping[str, str]) -> None:
    """Take choices of another process, which precede those of this one from now on; no file is changed."""
    _adopted.update(choices)


def forget() -> None:
    """Forget what is in memory, adopted choices too; files stay."""
    for known in (_tables, _adopted, _files):
        known.clear()


def _look_or_measure(key: str, names: Sequence[str], measure: Callable[[str], float]) -> str:
    """Return a choice from the table's file, or measure it and write it there; one process at a time."""
    file = _file()
    table = _tables.setdefault(file, {})
    table.update(_read(file))
    if table.get(key) in names:
        return table[key]
    with cache.lock(file):
        table.update(_read(file))  # others may have measured meanwhile
        if table.get(key) not in names:
            table[key] = min(names, key=measure)
            # Read again: who could not have the lock in time measures and writes without it.
            cache.write(file, json.dumps({**_read(file), key: table[key]}, indent=1, sort_keys=True).encode())
    return table[key]


def _file() -> str:
    """Return the name of the table's file for this device and these kernels."""
    name = device().name
    if name not in _files:
        _files[name] = f"tuning-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{compile.fingerprint()}.json"
    return _files[name]


def _read(file: str) -> dict[str, str]:
    """Return the table of a file; empty where there is none, or where it is damaged."""
    try:
        found = json.loads(cache.read(file) or b"{}")
    except ValueError:
        return {}
    return {str(key): str(name) for key, name in found.items()} if isinstance(found, dict) else {}
