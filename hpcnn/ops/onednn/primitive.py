"""Primitives: created once for an operation and its shapes, then only given addresses and executed.

Activations are described as they lie in memory and never converted. A filter may be described as "any format": when
the implementation chooses a blocked one, the primitive carries a reorder that runs before it (or after, for a filter's
gradient) through a buffer shared by all. Scratch memory is one shared buffer too, as large as the largest need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int64, c_void_p
from functools import cache, wraps
from threading import RLock
from typing import Any, ParamSpec, TypeAlias

import numpy as np

from hpcnn.arrays import Shape, empty
from hpcnn.ops.cpu.activation import LEAKY_SLOPE
from hpcnn.ops.onednn import library as lib

Handle: TypeAlias = c_void_p
PostOp: TypeAlias = tuple[Any, ...]
P = ParamSpec("P")

# Operations that read and write no more than this, all in all, take microseconds on one thread.
ONE_THREAD_BYTES = 1 << 18

# Memory objects and the two buffers are shared: one thread executes at a time, whichever Python thread it is.
_lock = RLock()

# What the library could not do, and the NumPy implementation did instead: "operation: reason" -> times asked for.
_fallbacks: dict[str, int] = {}


class _Buffer:
    """Memory shared by all primitives, as large as the largest request so far."""

    def __init__(self) -> None:
        self._memory = empty(0, np.uint8)

    def reserve(self, num_bytes: int) -> int:
        """Return the address of at least `num_bytes`."""
        if self._memory.nbytes < num_bytes:
            self._memory = empty(max(num_bytes, 1 << 20), np.uint8)
        return self._memory.ctypes.data


_scratch, _blocked = _Buffer(), _Buffer()


def extents(values: Sequence[int]) -> Any:
    """Return `values` as the array of 64-bit integers that the library takes for dimensions."""
    return (c_int64 * 12)(*values)


@cache
def descriptor(dims: Shape, strides: Shape | None = None, data_type: int = lib.F32) -> Handle:
    """Return a memory descriptor; without `strides`, of whatever format an implementation likes best."""
    handle, library = Handle(), lib.library()
    if strides is None:
        create, layout = library.dnnl_memory_desc_create_with_tag, lib.FORMAT_ANY
    else:
        create, layout = library.dnnl_memory_desc_create_with_strides, extents(strides)
    status = create(byref(handle), len(dims), extents(dims), data_type, layout)
    lib.check(status, f"memory descriptor of {dims} with strides {strides}")
    return handle


def images(shape: Shape, data_type: int = lib.F32) -> Handle:
    """Return the descriptor of images (N, H, W, C): logical dimensions are (N, C, H, W), memory is as it is."""
    count, rows, columns, channels = shape
    strides = (rows * columns * channels, 1, columns * channels, channels)
    return descriptor((count, channels, rows, columns), strides, data_type)


def matrix(rows: int, columns: int, data_type: int = lib.F32, *, transposed: bool = False) -> Handle:
    """Return the descriptor of a matrix, C-ordered, or `transposed`: its transpose is what lies in memory."""
    return descriptor((rows, columns), (1, rows) if transposed else (columns, 1), data_type)


def vector(size: int, data_type: int = lib.F32) -> Handle:
    """Return the descriptor of a vector."""
    return descriptor((size,), (1,), data_type)


def relu(activation: str | None) -> tuple[PostOp, ...]:
    """Return the post-operation of an activation: none, or (leaky) ReLU."""
    return () if activation is None else (("eltwise", lib.RELU, slope(activation), 0.0),)


def slope(activation: str) -> float:
    """Return an activation's slope below zero."""
    return LEAKY_SLOPE if activation == "leaky_relu" else 0.0


@cache
def attributes(post_ops: tuple[PostOp, ...] = ()) -> Handle:
    """Return primitive attributes: scratch memory is ours, then the post-operations.

    Each post-operation is ("sum",), ("eltwise", algorithm, alpha, beta) or ("binary", algorithm, dims, strides,
    data type).
    """
    library, handle, chain = lib.library(), Handle(), Handle()
    lib.check(library.dnnl_primitive_attr_create(byref(handle)), "attributes")
    lib.check(library.dnnl_primitive_attr_set_scratchpad_mode(handle, lib.SCRATCHPAD_USER), "scratchpad mode")
    lib.check(library.dnnl_post_ops_create(byref(chain)), "post-operations")
    for kind, *values in post_ops:
        if kind == "sum":
            status = library.dnnl_post_ops_append_sum(chain, 1.0, 0, lib.F32)
        elif kind == "eltwise":
            status = library.dnnl_post_ops_append_eltwise(chain, *values)
        else:
            status = library.dnnl_post_ops_append_binary(chain, values[0], descriptor(*values[1:]))
        lib.check(status, f"post-operation {kind}")
    lib.check(library.dnnl_primitive_attr_set_post_ops(handle, chain), "post-operations")
    library.dnnl_post_ops_destroy(chain)
    return handle


class Description:
    """A primitive descriptor: which implementation would serve an operation, and in which formats.

    Parameters
    ----------
    who : str
        Operation and shapes, for messages.
    kind : str
        Name of the C function that describes it, less "dnnl_" and "_primitive_desc_create".
    *arguments
        Its arguments behind the descriptor and, but for a reorder, the engine.
    prefer : str
        Take the first implementation whose name contains this; where none does, the library's first choice.
    """

    def __init__(self, who: str, kind: str, *arguments: Any, prefer: str = "") -> None:
        self.who, self._kind, self._arguments = who, kind, arguments
        self.handle = self._create()
        while prefer not in self.implementation:
            if lib.library().dnnl_primitive_desc_next_impl(self.handle) != lib.SUCCESS:
                lib.library().dnnl_primitive_desc_destroy(self.handle)
                self.handle = self._create()
                break

    def _create(self) -> Handle:
        handle = Handle()
        create = getattr(lib.library(), f"dnnl_{self._kind}_primitive_desc_create")
        first = () if self._kind == "reorder" else (lib.engine(),)
        lib.check(create(byref(handle), *first, *self._arguments), self.who)
        return handle

    @property
    def implementation(self) -> str:
        """Name of the implementation, such as "brgconv:avx512_core"."""
        name = c_char_p()
        lib.library().dnnl_primitive_desc_query(self.handle, lib.QUERY_IMPLEMENTATION, 0, byref(name))
        return (name.value or b"").decode()

    def format_of(self, argument: int) -> Handle:
        """Return the memory descriptor of an argument; its size is 0 when the argument does not exist."""
        return Handle(lib.library().dnnl_primitive_desc_query_md(self.handle, lib.QUERY_ARGUMENT, argument))


def size_of(layout: Handle) -> int:
    """Return how many bytes memory of this descriptor takes."""
    return int(lib.library().dnnl_memory_desc_get_size(layout)) if layout else 0


class Primitive:
    """One operation on one set of shapes; calling it with addresses executes it.

    Parameters
    ----------
    description : Description
        What to create; refused if only a reference implementation would serve, which NumPy outruns.
    arguments : sequence of int
        Argument numbers, in the order in which calls give their addresses.
    plain : (int, Handle), optional
        Number of the argument that was described as "any format", and the caller's own format of it.
    """

    def __init__(self, description: Description, arguments: Sequence[int], plain: tuple[int, Handle] | None = None):
        self.who, self.implementation = description.who, description.implementation
        if self.implementation.startswith("ref"):
            raise lib.UnimplementedError(f"oneDNN: {self.who} has only the implementation '{self.implementation}'.")
        library, self._handle = lib.library(), Handle()
        self.description = description  # the hint of a backward description, and owner of the formats
        lib.check(library.dnnl_primitive_create(byref(self._handle), description.handle), self.who)
        self._execute, self._set_handle = library.dnnl_primitive_execute, library.dnnl_memory_set_data_handle
        self._stream = lib.stream()
        self.scratch_bytes = size_of(description.format_of(lib.SCRATCHPAD))
        self.num_bytes = sum(size_of(description.format_of(number)) for number in arguments)
        self.workspace_bytes = size_of(description.format_of(lib.WORKSPACE))
        numbers = [*arguments, lib.SCRATCHPAD] if self.scratch_bytes else list(arguments)
        layouts = [description.format_of(number) for number in numbers]
        self._memories = [_memory(layout) for layout in layouts]
        pairs = [lib.ExecuteArgument(number, memory) for number, memory in zip(numbers, self._memories, strict=True)]
        self._arguments = (lib.ExecuteArgument * len(pairs))(*pairs)

        self._threads: int | None = None  # of the caller, where this primitive works on one
        self.reorder: Primitive | None = None
        if plain is not None:
            self._place, self._after = numbers.index(plain[0]), plain[0] == lib.DIFF_WEIGHTS
            chosen = layouts[self._place]
            if not library.dnnl_memory_desc_equal(chosen, plain[1]):
                self._blocked_bytes = size_of(chosen)
                formats = (chosen, plain[1]) if self._after else (plain[1], chosen)
                self.reorder = _reorder(f"{self.who}, filter", *formats)

    def keep_to_one_thread(self, threads: int) -> None:
        """Execute on one thread from now on, where the caller has `threads`; it must have been created on one."""
        self._threads = threads

    def __call__(self, *addresses: int) -> None:
        """Execute on these addresses, one for each argument, in order.

        Raises
        ------
        RuntimeError
            If the library reports anything but success.
        """
        with _lock:
            if self.reorder is None:
                self._run(addresses)
                return
            mine, theirs = addresses[self._place], _blocked.reserve(self._blocked_bytes)
            if not self._after:
                self.reorder(mine, theirs)
            self._run((*addresses[: self._place], theirs, *addresses[self._place + 1 :]))
            if self._after:
                self.reorder(theirs, mine)

    def _run(self, addresses: tuple[int, ...]) -> None:
        """Set the addresses and execute; the lock is held."""
        if self.scratch_bytes:
            addresses = (*addresses, _scratch.reserve(self.scratch_bytes))
        for memory, address in zip(self._memories, addresses, strict=True):
            self._set_handle(memory, address)
        if self._threads is not None:
            lib.set_num_threads(1)
        status = self._execute(self._handle, self._stream, len(addresses), self._arguments)
        if self._threads is not None:
            lib.set_num_threads(self._threads)
        if status:
            lib.check(status, self.who)


def _memory(layout: Handle) -> Handle:
    """Return a memory object without memory."""
    handle = Handle()
    lib.check(lib.library().dnnl_memory_create(byref(handle), layout, lib.engine(), None), "memory object")
    return handle


def _reorder(who: str, source: Handle, target: Handle) -> Primitive:
    """Return the primitive that copies from one format to another."""
    engine = lib.engine()
    return Primitive(Description(who, "reorder", source, engine, target, engine, attributes()), (lib.SRC, lib.DST))


def cached(build: Callable[P, Primitive]) -> Callable[P, Primitive | None]:
    """Make `build` return one primitive per arguments and number of threads; None, and a record, where there is none.

    A primitive divides its work when it is created, so the number of threads belongs to the key. Work on few bytes is
    done on one thread: waking another takes longer.
    """
    made: dict[tuple[Any, ...], Primitive | None] = {}

    def create(threads: int, *args: P.args, **kwargs: P.kwargs) -> Primitive | None:
        try:
            primitive = build(*args, **kwargs)
            if threads > 1 and primitive.num_bytes <= ONE_THREAD_BYTES:
                lib.set_num_threads(1)
                try:
                    primitive = build(*args, **kwargs)
                finally:
                    lib.set_num_threads(threads)
                primitive.keep_to_one_thread(threads)
        except lib.UnimplementedError as error:
            _fallbacks[str(error)] = _fallbacks.get(str(error), 0) + 1
            return None
        return primitive

    @wraps(build)
    def find(*args: P.args, **kwargs: P.kwargs) -> Primitive | None:
        threads = lib.num_threads()
        key = (threads, args, *kwargs.values())
        if key not in made:
            with _lock:
                made[key] = create(threads, *args, **kwargs)
        return made[key]

    return find


def fallbacks() -> tuple[str, ...]:
    """Return what the library could not do in this process, so that NumPy did it."""
    return tuple(_fallbacks)


def data_type(x: np.ndarray) -> int:
    """Return the library's number for the elements of an array of float32 or bfloat16."""
    return lib.F32 if x.dtype == np.float32 else lib.BF16


def plain(x: np.ndarray) -> np.ndarray:
    """Return `x` itself, or a C-ordered copy where it is not C-ordered."""
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def address(x: np.ndarray) -> int:
    """Return where the first element lies."""
    return x.ctypes.data
