"""The arithmetic of LoRA on CPUs as one compiled call per layer: y[row] += B[slot] (A[slot] x[row]), for sorted rows.

A batch of many adapters is many tiny products. Called one by one through PyTorch they cost more in calls, copies and
thread wake-ups than in arithmetic; here one call goes through all rows, slices and slots of a layer, four rows of an
adapter at a time, reads every weight once per four rows, and allocates a few kilobytes. Compiled by Numba for the
machine it runs on (vLLM depends on Numba already, so no C++ compiler is needed), summed in float32 whatever the
tensors hold, and run on the threads that vLLM has bound for PyTorch.

It knows addresses, strides and ranks; nothing of vLLM, of layers, or of who owns a row. Nothing is checked here: the
caller vouches for every address.

Legend of shapes: n rows with an adapter, h input width, o output width of a slice, r an adapter's rank, S slots.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, cfunc, njit, types  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

from loradock_serve.inside.number_formats import memory

Int64s = npt.NDArray[np.int64]

# The columns of a layer's table, one row per slice; strides in elements.
A_ADDRESS, A_SLOT_STRIDE, A_ROW_STRIDE, B_ADDRESS, B_SLOT_STRIDE, B_ROW_STRIDE, WIDTH, OFFSET = range(8)
COLUMNS = 8

CHUNK = 512
"""Outputs that are summed before they are added to y: four rows of them stay in the nearest cache."""
ALONE_BELOW = 2_000_000
"""Multiplications for which waking the other threads costs more than it saves (measured: docs/decisions.md)."""

# Sums may be taken in any order; NaN and infinity keep their meaning.
_JIT: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
    "nogil": True,
    "no_cfunc_wrapper": True,
}
_INNER: dict[str, Any] = {**_JIT, "no_cpython_wrapper": True}

_at_float, _get, _put = memory(torch.float32)
"""Sums and low-rank rows are float32 in plain memory. (Compiled code that indexes arrays checks for negative indices,
which keeps loops from being vectorised: measured at a factor of 15.)"""


def _shrinks(get_x: Any, get_w: Any) -> tuple[Any, Any]:
    """s[i] = x . A[i] for every i below the rank, of one row and of four (whose s lie one after another)."""

    @njit(**_INNER)
    def shrink1(x, a, stride, rank, h, s):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        i = 0
        while i + 4 <= rank:
            p = i * stride
            c0 = c1 = c2 = c3 = np.float32(0)
            for k in range(h):
                v = get_x(x, k)
                c0 += v * get_w(a, p + k)
                c1 += v * get_w(a, p + stride + k)
                c2 += v * get_w(a, p + 2 * stride + k)
                c3 += v * get_w(a, p + 3 * stride + k)
            _put(s, i, c0)
            _put(s, i + 1, c1)
            _put(s, i + 2, c2)
            _put(s, i + 3, c3)
            i += 4
        while i < rank:
            c0 = np.float32(0)
            for k in range(h):
                c0 += get_x(x, k) * get_w(a, i * stride + k)
            _put(s, i, c0)
            i += 1

    @njit(**_INNER)
    def shrink4(x0, x1, x2, x3, a, stride, rank, h, s):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        i = 0
        while i < rank:
            # The last of an odd number is computed twice rather than by a loop of its own.
            j = min(i + 1, rank - 1)
            p, q = i * stride, j * stride
            c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
            for k in range(h):
                v, w = get_w(a, p + k), get_w(a, q + k)
                x0k, x1k, x2k, x3k = get_x(x0, k), get_x(x1, k), get_x(x2, k), get_x(x3, k)
                c0 += x0k * v
                c1 += x1k * v
                c2 += x2k * v
                c3 += x3k * v
                d0 += x0k * w
                d1 += x1k * w
                d2 += x2k * w
                d3 += x3k * w
            for place, low, high in ((0, c0, d0), (rank, c1, d1), (2 * rank, c2, d2), (3 * rank, c3, d3)):
                _put(s, place + i, low)
                _put(s, place + j, high)
            i += 2

    return shrink1, shrink4


def _expands(get_w: Any, get_y: Any, put_y: Any) -> tuple[Any, Any]:
    """y[k] += scale * (s . B[:, k]) for every k below the width, of one row and of four; `d` is room for 4 x CHUNK."""

    @njit(**_INNER)
    def add(y, start, d, first, count, scale):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        for k in range(count):
            put_y(y, start + k, get_y(y, start + k) + scale * _get(d, first + k))

    @njit(**_INNER)
    def expand1(y, b, stride, rank, width, scale, s, d):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            for k in range(count):
                _put(d, k, np.float32(0))
            i = 0
            while i + 4 <= rank:
                p = i * stride + start
                s0, s1, s2, s3 = _get(s, i), _get(s, i + 1), _get(s, i + 2), _get(s, i + 3)
                for k in range(count):
                    low = s0 * get_w(b, p + k) + s1 * get_w(b, p + stride + k)
                    high = s2 * get_w(b, p + 2 * stride + k) + s3 * get_w(b, p + 3 * stride + k)
                    _put(d, k, _get(d, k) + low + high)
                i += 4
            while i < rank:
                p = i * stride + start
                s0 = _get(s, i)
                for k in range(count):
                    _put(d, k, _get(d, k) + s0 * get_w(b, p + k))
                i += 1
            add(y, start, d, 0, count, scale)

    @njit(**_INNER)
    def expand4(y0, y1, y2, y3, b, stride, rank, width, scale, s, d):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            for k in range(4 * CHUNK):
                _put(d, k, np.float32(0))
            i = 0
            while i < rank:
                j = min(i + 1, rank - 1)
                odd = np.float32(0) if i == j else np.float32(1)
                p, q = i * stride + start, j * stride + start
                s0, s1, s2, s3 = _get(s, i), _get(s, rank + i), _get(s, 2 * rank + i), _get(s, 3 * rank + i)
                t0, t1 = odd * _get(s, j), odd * _get(s, rank + j)
                t2, t3 = odd * _get(s, 2 * rank + j), odd * _get(s, 3 * rank + j)
                for k in range(count):
                    v, w = get_w(b, p + k), get_w(b, q + k)
                    _put(d, k, _get(d, k) + s0 * v + t0 * w)
                    _put(d, CHUNK + k, _get(d, CHUNK + k) + s1 * v + t1 * w)
                    _put(d, 2 * CHUNK + k, _get(d, 2 * CHUNK + k) + s2 * v + t2 * w)
                    _put(d, 3 * CHUNK + k, _get(d, 3 * CHUNK + k) + s3 * v + t3 * w)
                i += 2
            add(y0, start, d, 0, count, scale)
            add(y1, start, d, CHUNK, count, scale)
            add(y2, start, d, 2 * CHUNK, count, scale)
            add(y3, start, d, 3 * CHUNK, count, scale)

    return expand1, expand4


# One call's arguments as its threads find them, all int64 (the scale as the bits of a float64); then the rows at which
# each share of the work begins, and the end.
TABLE, SLICES, RANKS, SLOT_COUNT, ORDER, SLOTS, ROWS, X, X_STRIDE, Y, Y_STRIDE, H, SCALE, MAX_RANK, SHARES, FIRST = (
    range(16)
)
MAX_SHARES = 64


@intrinsic  # type: ignore[untyped-decorator]
def _address(_context: Any, _number: Any) -> Any:
    """A number as the untyped pointer that `carray` wants."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


def _openmp() -> tuple[Any, Any, Any]:
    """The threads that PyTorch computes on, which vLLM has bound to its cores: OpenMP's, by the interface that GNU's
    and LLVM's and Intel's runtimes share.

    Looked up in the process, as PyTorch's own calls are. By a file's name another runtime may be found, with threads of
    its own: some builds of PyTorch rename theirs, and vLLM preloads it, or its operator another.
    """
    process = ctypes.CDLL(None)
    parallel, number, size = process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    for function in (number, size):
        function.argtypes, function.restype = (), ctypes.c_int
    return parallel, number, size


_parallel, _thread_number, _team_size = _openmp()


def _part(x_dtype: torch.dtype, weights_dtype: torch.dtype, y_dtype: torch.dtype) -> Any:
    """The compiled work on some of a layer's rows, for these number formats."""
    at_x, get_x, _ = memory(x_dtype)
    at_w, get_w, _ = memory(weights_dtype)
    at_y, get_y, put_y = memory(y_dtype)
    shrink1, shrink4 = _shrinks(get_x, get_w)
    expand1, expand4 = _expands(get_w, get_y, put_y)

    @njit(**_INNER)
    def low_rank(table, j, x, x_stride, order, i, count, slot, rank, h, s):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """The low-rank rows of `count` batch rows; where there is no A the rows of x are low-rank already."""
        if table[j, A_ADDRESS] == 0:
            for m in range(count):
                row = at_x(x, order[i + m] * x_stride)
                for k in range(rank):
                    _put(s, m * rank + k, get_x(row, k))
            return
        a = at_w(table[j, A_ADDRESS], slot * table[j, A_SLOT_STRIDE])
        x0 = at_x(x, order[i] * x_stride)
        if count == 1:
            shrink1(x0, a, table[j, A_ROW_STRIDE], rank, h, s)
        else:
            x1, x2 = at_x(x, order[i + 1] * x_stride), at_x(x, order[i + 2] * x_stride)
            x3 = at_x(x, order[i + 3] * x_stride)
            shrink4(x0, x1, x2, x3, a, table[j, A_ROW_STRIDE], rank, h, s)

    @njit(**_INNER)
    def part(table, ranks, order, slots, x, x_stride, y, y_stride, h, scale, max_rank, first, last):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """The rows [first, last) of the sorted ones."""
        room = np.empty(4 * max_rank + 4 * CHUNK, np.float32)
        s = _at_float(room.ctypes.data, 0)
        d = _at_float(room.ctypes.data, 4 * max_rank)
        i = first
        while i < last:
            slot = slots[i]
            rank = ranks[slot]
            count = 4 if i + 4 <= last and slots[i + 3] == slot else 1
            if rank > 0:
                for j in range(table.shape[0]):
                    low_rank(table, j, x, x_stride, order, i, count, slot, rank, h, s)
                    b = at_w(table[j, B_ADDRESS], slot * table[j, B_SLOT_STRIDE])
                    stride, width, offset = table[j, B_ROW_STRIDE], table[j, WIDTH], table[j, OFFSET]
                    y0 = at_y(y, order[i] * y_stride + offset)
                    if count == 1:
                        expand1(y0, b, stride, rank, width, scale, s, d)
                    else:
                        y1 = at_y(y, order[i + 1] * y_stride + offset)
                        y2 = at_y(y, order[i + 2] * y_stride + offset)
                        y3 = at_y(y, order[i + 3] * y_stride + offset)
                        expand4(y0, y1, y2, y3, b, stride, rank, width, scale, s, d)
            i += count
        room[0] = 0  # keeps it until here: of addresses taken from it Numba does not know

    return part


@functools.cache
def _thread_function(x_dtype: torch.dtype, weights_dtype: torch.dtype, y_dtype: torch.dtype) -> Any:
    """What OpenMP runs on each thread of a team, compiled for these number formats; its `address` is what is wanted."""
    part = _part(x_dtype, weights_dtype, y_dtype)

    @cfunc(types.void(types.voidptr))
    def thread(packed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        """The thread's share of a call, and the shares of threads that the team did not get."""
        call = carray(packed, (FIRST + MAX_SHARES + 1,), np.int64)
        rows = call[ROWS]
        table = carray(_address(call[TABLE]), (call[SLICES], COLUMNS), np.int64)
        ranks = carray(_address(call[RANKS]), (call[SLOT_COUNT],), np.int64)
        order = carray(_address(call[ORDER]), (rows,), np.int64)
        slots = carray(_address(call[SLOTS]), (rows,), np.int64)
        scale = np.float32(call.view(np.float64)[SCALE])
        share = np.int64(_thread_number())
        while share < call[SHARES]:
            first, last = call[FIRST + share], call[FIRST + share + 1]
            part(
                table, ranks, order, slots, call[X], call[X_STRIDE], call[Y], call[Y_STRIDE], call[H], scale,
                call[MAX_RANK], first, last,
            )  # fmt: skip
            share += np.int64(_team_size())

    return thread


@functools.cache
def _runner() -> Any:
    """The compiled entry: divides a call's rows among threads by the sum of their ranks, and has them run."""

    @njit(**_JIT)
    def run(function, table, ranks, order, slots, x, x_stride, y, y_stride, h, scale, threads):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        rows, total, max_rank, size = len(order), 0, 0, 0
        for i in range(rows):
            total += ranks[slots[i]]
            max_rank = max(max_rank, ranks[slots[i]])
        if total == 0:
            return
        for j in range(table.shape[0]):
            size += h + table[j, WIDTH]
        threads = min(threads, MAX_SHARES) if total * size >= ALONE_BELOW else 1
        call = np.empty(FIRST + MAX_SHARES + 1, np.int64)
        call[TABLE], call[SLICES], call[RANKS] = table.ctypes.data, table.shape[0], ranks.ctypes.data
        call[SLOT_COUNT], call[ORDER], call[SLOTS], call[ROWS] = len(ranks), order.ctypes.data, slots.ctypes.data, rows
        call[X], call[X_STRIDE], call[Y], call[Y_STRIDE], call[H] = x, x_stride, y, y_stride, h
        call[MAX_RANK], call[SHARES] = max_rank, threads
        call.view(np.float64)[SCALE] = scale
        share = done = 0
        for i in range(rows):
            while done * threads >= total * share:
                call[FIRST + share] = i
                share += 1
            done += ranks[slots[i]]
        while share <= threads:
            call[FIRST + share] = rows
            share += 1
        _parallel(function, call.ctypes.data, threads, 0)
        call[TABLE] = 0  # keeps it until here, as above

    run.compile(
        types.void(
            types.int64, types.Array(types.int64, 2, "C"), *(types.Array(types.int64, 1, "C"),) * 3,
            *(types.int64,) * 5, types.float32, types.int64,
        )
    )  # fmt: skip
    run.disable_compile()  # any other types are a mistake of the caller
    return run


def kernel(x_dtype: torch.dtype, weights_dtype: torch.dtype, y_dtype: torch.dtype) -> Callable[..., None]:
    """The compiled call for these number formats of x, of A and B, and of y.

    Its arguments: the layer's table (slices, COLUMNS), the rank of each slot (S,), the rows that have an adapter sorted
    by slot (n,), the slot of each (n,), x's address and row stride, y's address and row stride, h, the scale, and how
    many threads may be used. Tensors must be dense in their last dimension.

    Compiles for a few seconds, once a process. KeyError for a format that is none of float32, bfloat16 and float16.
    """
    return cast(
        Callable[..., None], functools.partial(_runner(), _thread_function(x_dtype, weights_dtype, y_dtype).address)
    )
