"""The BLAS behind NumPy: core type before it loads, threads after.

OpenBLAS picks AVX2 kernels on AMD processors that have AVX-512, at a little more than half their speed.
The choice is an environment variable that must stand before NumPy is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CORE_TYPE = "OPENBLAS_CORETYPE"
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}


def choose_core_type(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Ask OpenBLAS for its AVX-512 kernels where it would overlook them.

    Does nothing when the user has chosen already, when NumPy is loaded (too late), or on other processors.

    Returns
    -------
    str or None
        The core type that was set, None when the library's own guess stands.
    """
    if CORE_TYPE in os.environ or "numpy" in sys.modules:
        return None
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    vendor, flags = "", set[str]()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "vendor_id":
            vendor = value.strip()
        elif name.strip() == "flags":
            flags = set(value.split())
            break
    if vendor != "AuthenticAMD" or not flags >= _AVX512:
        return None
    os.environ[CORE_TYPE] = "SkylakeX"
    return "SkylakeX"
