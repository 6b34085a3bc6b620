"""How the kernel's compiled code reads and writes numbers in memory: float32, bfloat16 and float16, by address.

Everything is computed in float32; these are the conversions on the way in and out, in LLVM's terms, so that loops over
them are vectorised. It knows nothing of what the numbers are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]

_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)


class _Format(NamedTuple):
    """How one number format lies in memory, and how it becomes a float32 and back, in LLVM's terms."""

    stored: Any
    """Numba's type of an element."""
    width_bytes: int
    load: Callable[[Any, Any], Any]
    store: Callable[[Any, Any], Any]


def _load_bfloat16(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _FLOAT)


def _store_bfloat16(builder: Any, value: Any) -> Any:
    """Rounds to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _I32(0x7FC0), rounded), _I16)


_FORMATS = {
    torch.float32: _Format(types.float32, 4, lambda _, value: value, lambda _, value: value),
    torch.bfloat16: _Format(types.uint16, 2, _load_bfloat16, _store_bfloat16),
    torch.float16: _Format(
        types.uint16,
        2,
        lambda builder, bits: builder.fpext(builder.bitcast(bits, _HALF), _FLOAT),
        lambda builder, value: builder.bitcast(builder.fptrunc(value, _HALF), _I16),
    ),
}


def memory(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """`at(address, i)`, `get(pointer, i)` and `put(pointer, i, float32)` of a number format, for compiled code."""
    form = _FORMATS[dtype]
    pointer = types.CPointer(form.stored)

    @intrinsic  # type: ignore[untyped-decorator]
    def at(_context: Any, _address: Any, _index: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            start = builder.inttoptr(arguments[0], context.get_value_type(pointer))
            return builder.gep(start, [arguments[1]])

        return pointer(types.int64, types.int64), code

    @intrinsic  # type: ignore[untyped-decorator]
    def get(_context: Any, _pointer: Any, _index: Any) -> Any:
        def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return form.load(builder, builder.load(builder.gep(arguments[0], [arguments[1]], inbounds=True)))

        return types.float32(pointer, types.int64), code

    @intrinsic  # type: ignore[untyped-decorator]
    def put(_context: Any, _pointer: Any, _index: Any, _value: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            where = builder.gep(arguments[0], [arguments[1]], inbounds=True)
            builder.store(form.store(builder, arguments[2]), where)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, types.float32), code

    return at, get, put
