"""The oneDNN C API through ctypes: finding the library, its functions, constants and errors.

Numbers are those of oneDNN 3's headers (dnnl_types.h, dnnl_common_types.h), which keeps them fixed within version 3.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import Any

from hpcnn.errors import ConfigError

VARIABLE = "HPCNN_ONEDNN"
OFF = "off"
STATUS = (
    *("success", "out of memory", "invalid arguments", "unimplemented", "last implementation reached"),
    *(
        "runtime error",
        "not required",
        "invalid graph",
        "invalid graph operation",
        "invalid shape",
        "invalid data type",
    ),
)
SUCCESS, UNIMPLEMENTED = 0, 3

BF16, F32 = 2, 3
ISA_AVX512_BF16 = 0xE7
FORMAT_ANY = 1
FORWARD, BACKWARD = 64, 128
CONVOLUTION_DIRECT = 0x1
RELU, SQUARE, LINEAR = 0x20, 0x23, 0x26
POOL_MAX, POOL_AVERAGE = 0x1FF, 0x2FF
BINARY_ADD, BINARY_MUL, BINARY_SUB, BINARY_GREATER = 0x1FFF0, 0x1FFF1, 0x1FFF5, 0x1FFF7
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, FUSE_RELU = 0x1, 0x2, 0x4, 0x8
QUERY_IMPLEMENTATION, QUERY_ARGUMENT = 8, 255
SCRATCHPAD_USER = 1

SRC, SRC_1, DST, WEIGHTS, BIAS, MEAN, VARIANCE, SCALE, SHIFT = 1, 2, 17, 33, 41, 49, 50, 51, 52
WORKSPACE, SCRATCHPAD = 64, 80
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS, DIFF_SCALE, DIFF_SHIFT = 129, 145, 161, 169, 255, 256


def post_op_source(index: int) -> int:
    """Return the argument number of the second operand of the binary post-operation at `index`."""
    return 32768 * (index + 1) | SRC_1


class ExecuteArgument(ctypes.Structure):
    """One argument of an execution: its number and its memory object."""

    _fields_ = (("arg", c_int), ("memory", c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p))


# A function's arguments, a letter each: p pointer or handle, c char, i int, u unsigned, z size_t, f float, l int64.
_LETTERS = {"p": c_void_p, "c": c_char, "i": c_int, "u": c_uint, "z": c_size_t, "f": c_float, "l": c_int64}
_PROTOTYPES = {
    "engine_create": "piz",
    "stream_create": "ppu",
    "memory_desc_create_with_strides": "pipip",
    "memory_desc_create_with_tag": "pipii",
    "memory_desc_equal": "pp",
    "memory_create": "pppp",
    "memory_set_data_handle": "pp",
    "primitive_attr_create": "p",
    "primitive_attr_destroy": "p",
    "primitive_attr_set_scratchpad_mode": "pi",
    "primitive_attr_set_post_ops": "pp",
    "post_ops_create": "p",
    "post_ops_destroy": "p",
    "post_ops_append_sum": "pfii",
    "post_ops_append_eltwise": "piff",
    "post_ops_append_binary": "pip",
    "primitive_desc_query": "piip",
    "primitive_desc_next_impl": "p",
    "primitive_desc_destroy": "p",
    "primitive_create": "pp",
    "primitive_execute": "ppip",
    "reorder_primitive_desc_create": "pppppp",
    "convolution_forward_primitive_desc_create": "ppii" + "p" * 9,
    "convolution_backward_data_primitive_desc_create": "ppi" + "p" * 9,
    "convolution_backward_weights_primitive_desc_create": "ppi" + "p" * 10,
    "inner_product_forward_primitive_desc_create": "ppi" + "p" * 5,
    "inner_product_backward_data_primitive_desc_create": "pp" + "p" * 5,
    "inner_product_backward_weights_primitive_desc_create": "pp" + "p" * 6,
    "matmul_primitive_desc_create": "p" * 7,
    "pooling_forward_primitive_desc_create": "ppii" + "p" * 8,
    "pooling_backward_primitive_desc_create": "ppi" + "p" * 9,
    "batch_normalization_forward_primitive_desc_create": "ppippfup",
    "batch_normalization_backward_primitive_desc_create": "ppipppfupp",
    "eltwise_forward_primitive_desc_create": "ppiippffp",
    "binary_primitive_desc_create": "ppipppp",
    "reduction_primitive_desc_create": "ppippffp",
    "sgemm": "cclllfplplfpl",
}


def _candidates() -> Sequence[str]:
    """Return the paths and names under which the library may be found, best first."""
    prefixed = Path(sys.prefix, "lib", "libdnnl.so.3")
    found = find_library("dnnl")
    return [*([str(prefixed)] if prefixed.exists() else []), "libdnnl.so.3", *([found] if found else [])]


def _open(path: str) -> ctypes.CDLL:
    """Load the library at `path` and declare its functions; OSError or AttributeError when it is not oneDNN 3."""
    library = ctypes.CDLL(path)
    library.dnnl_version.restype = POINTER(_Version)
    if library.dnnl_version().contents.major != 3:
        raise OSError(f"{path} is oneDNN {library.dnnl_version().contents.major}, not 3")
    for name, letters in _PROTOTYPES.items():
        getattr(library, f"dnnl_{name}").argtypes = [_LETTERS[letter] for letter in letters]
    library.dnnl_primitive_desc_query_md.restype = c_void_p
    library.dnnl_primitive_desc_query_md.argtypes = [c_void_p, c_int, c_int]
    library.dnnl_memory_desc_get_size.restype = c_size_t
    library.dnnl_memory_desc_get_size.argtypes = [c_void_p]
    library.dnnl_get_effective_cpu_isa.restype = c_int
    return library


@cache
def find() -> tuple[ctypes.CDLL, str] | None:
    """Return the library and the path it was loaded from, None when there is none or HPCNN_ONEDNN=off.

    Raises
    ------
    ConfigError
        If HPCNN_ONEDNN names a file that does not load as oneDNN 3.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() == OFF:
        return None
    for path in [chosen] if chosen else _candidates():
        try:
            return _open(path), path
        except (OSError, AttributeError) as error:
            if chosen:
                raise ConfigError(
                    f"oneDNN: cannot load {VARIABLE} (={chosen}): {error}; it must be the shared library of oneDNN 3,"
                    f" libdnnl.so.3. Correct the path, unset the variable, or set {VARIABLE}={OFF} to use NumPy."
                ) from error
    return None


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found = find()
    if found is None:
        raise ConfigError(
            f"oneDNN: libdnnl.so.3 was not found, or {VARIABLE}={OFF}. Install hpcnn[onednn], or set {VARIABLE}"
            " to the path of the library."
        )
    return found[0]


class UnimplementedError(RuntimeError):
    """What the library cannot do; another implementation must."""


def check(status: int, who: str) -> None:
    """Raise unless `status` is success.

    Raises
    ------
    UnimplementedError
        If the library cannot do what was asked.
    RuntimeError
        If it failed; the message names the operation `who` and the status.
    """
    if status != SUCCESS:
        name = STATUS[status] if 0 <= status < len(STATUS) else "unknown"
        kind = UnimplementedError if status == UNIMPLEMENTED else RuntimeError
        raise kind(f"oneDNN: {who} failed with status '{name}' (={status}).")


@cache
def engine() -> c_void_p:
    """Return the handle of the CPU engine."""
    handle = c_void_p()
    check(library().dnnl_engine_create(byref(handle), 1, 0), "engine")
    return handle


@cache
def stream() -> c_void_p:
    """Return the handle of the one in-order stream."""
    handle = c_void_p()
    check(library().dnnl_stream_create(byref(handle), engine(), 1), "stream")
    return handle


@cache
def _has_bfloat16() -> bool:
    return library().dnnl_get_effective_cpu_isa() & ISA_AVX512_BF16 == ISA_AVX512_BF16


def computes_bfloat16(*_: Any, **__: Any) -> bool:
    """Return whether the processor has instructions for bfloat16, and the library uses them, whatever the operands."""
    return _has_bfloat16()


def num_threads() -> int:
    """Return the number of OpenMP threads that an operation started now would use."""
    return int(library().omp_get_max_threads())


def set_num_threads(count: int) -> None:
    """Let OpenMP use so many threads for what the calling thread starts from now on."""
    library().omp_set_num_threads(count)


def available() -> bool:
    """Return whether a usable oneDNN library is there; ConfigError if HPCNN_ONEDNN names one that is not."""
    return find() is not None


def describe() -> str:
    """Return the library's version and where it was found, such as "onednn 3.2.0 (/usr/lib/libdnnl.so.3)"."""
    number, found = library().dnnl_version().contents, find()
    return f"onednn {number.major}.{number.minor}.{number.patch} ({found[1] if found else ''})"
