"""numba, set up for the kernels, and what it lacks: half precision, four bits, fetching ahead.

kernels.py and step.py take numba from here, so that nothing starts it before.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Each product wakes all threads of numba's pool: idle ones took a hundred times as long as it.
if "numba" not in sys.modules:  # else they may have begun
    os.environ["NUMBA_NUM_THREADS"] = str(torch.get_num_threads())
import numba
from llvmlite import binding, ir
from numba import njit, types
from numba import prange as prange
from numba.core import cgutils
from numba.extending import intrinsic, overload

MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # the threads of torch: others would wait for these
if (flags := binding.get_host_cpu_features()).get("sse2") and not flags.get("f16c"):
    raise ImportError("this CPU does not convert float16 by itself")

f32 = np.float32
HERE = Path(__file__).parent
# Sums in any order, so that they are vectors'; but NaN stays NaN.
FASTMATH = {"reassoc", "contract", "nsz"}
SOURCES = ("intrinsics.py", "kernels.py", "step.py")
STAMP = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def compiled(parallel: bool) -> Callable[[Callable], Any]:
    """Make a decorator that compiles a function when it is wanted, once on a machine.

    numba would keep what a function became until its own file changes, whatever those change that
    it calls: so each state of the sources has a folder of its own.
    """

    def decorate(function: Callable) -> Any:
        config: Any = numba.config
        before = config.CACHE_DIR
        config.CACHE_DIR = str(Path(before or HERE / "__pycache__") / f"kernels-{STAMP}")
        try:
            return njit(cache=True, fastmath=FASTMATH, parallel=parallel)(function)
        finally:
            config.CACHE_DIR = before

    return decorate


inner, kernel = compiled(parallel=False), compiled(parallel=True)

# Functions of a docstring alone are compiled as the @overload below them says.


@intrinsic
def of_float16(typing: Any, bits: Any) -> Any:
    """The float32 of a float16's bits, int16."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), build


@intrinsic
def to_float16(typing: Any, number: Any) -> Any:
    """The bits of the float16 nearest to a float32, int16."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(number), build


def widen(number: Any) -> Any:
    """The float32 of a number in an array: float32, or the bits of a half precision."""


@overload(widen, inline="always")
def _(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Float):
        return lambda number: number
    if number == types.int16:
        return lambda number: of_float16(number)  # type: ignore[call-arg]
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(f32)


def put(array: Any, place: Any, number: Any) -> None:
    """Write a float32 into an array such as widen() reads, rounded to the nearest."""


@overload(put)
def _(array, place, number):  # type: ignore[no-untyped-def]
    def to_float32(array, place, number):  # type: ignore[no-untyped-def]
        array[place] = number

    def to_bfloat16(array, place, number):  # type: ignore[no-untyped-def]
        bits = f32(number).view(np.uint32)
        # half of the last bit that stays is added, less a little if that is even
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        array[place] = np.uint16(bits >> np.uint32(16) if number == number else 0x7FC0)

    def as_float16(array, place, number):  # type: ignore[no-untyped-def]
        array[place] = to_float16(f32(number))  # type: ignore[call-arg]

    if isinstance(array.dtype, types.Float):
        return to_float32
    return as_float16 if array.dtype == types.int16 else to_bfloat16


@njit(inline="always")
def low(byte: Any) -> Any:
    """The lower four bits."""
    return f32(np.uint8(byte & np.uint8(15)))


@njit(inline="always")
def high(byte: Any) -> Any:
    """The upper four bits."""
    return f32(np.uint8(byte >> np.uint8(4)))


@intrinsic
def prefetch(typing: Any, array: Any, place: Any) -> Any:
    """Have the memory of an array (n,) at a place fetched into the caches; also behind its end."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        builder.call(fetch, [address, number(0), number(3), number(1)])  # to read, into all caches
        return context.get_dummy_value()

    return types.void(array, place), build
