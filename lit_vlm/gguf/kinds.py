"""Types of weights in GGUF files, packed by llama.cpp's own code."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

KINDS: dict[str, tuple[LlamaFileType, Type]] = {
    "f32": (LlamaFileType.ALL_F32, Type.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
    "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
}
"""Name → number of the kind of file, and the type of most matrices."""
MIXED = ("q4_k_m", "q5_k_m")
"""Kinds in which some matrices have six bits, as in llama.cpp."""
INSTEAD = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""Type → the one of matrices whose rows are no multiple of its 256 numbers, as in llama.cpp."""


def type_of(name: str, columns: int, kind: str, layers: int, tied: bool) -> Type:
    """The type of a matrix in a file of a kind; vectors, which are no matrices, stay in fp32.

    Args:
        name: the tensor's name in the file.
        columns: length of its rows.
        kind: of the file.
        layers: number of blocks.
        tied: whether the word table is the output layer as well.
    """
    wanted = KINDS[kind][1]
    if kind in MIXED and _has_more_bits(name, layers, tied):
        wanted = Type.Q6_K
    if columns % GGML_QUANT_SIZES[wanted][0]:
        wanted = INSTEAD.get(wanted, Type.F16)
    return wanted if columns % GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def _has_more_bits(name: str, layers: int, tied: bool) -> bool:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return True
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
        return False
    layer, eighth = int(name.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def packed(value: NDArray[np.float32], wanted: Type) -> NDArray[Any]:
    """A matrix `[rows, columns]` as bytes of a type `[rows, bytes]`, or as fp32 or fp16.

    Raises:
        ValueError: where a value is beyond the range of fp16, or llama.cpp's code is not installed.
    """
    if wanted == Type.F32:
        return value
    if wanted == Type.F16:
        half = value.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"values up to {np.abs(value).max():g} are beyond the range of f16: take f32")
        return half
    block, size = GGML_QUANT_SIZES[wanted]
    source = np.ascontiguousarray(value, dtype=np.float32)
    rows, columns = source.shape
    out = np.empty((rows, columns // block * size), np.uint8)
    pointer = ctypes.POINTER(ctypes.c_float)
    written = _library().ggml_quantize_chunk(
        int(wanted), source.ctypes.data_as(pointer), out.ctypes.data_as(ctypes.c_void_p), 0, rows, columns, None
    )
    assert written == out.nbytes
    return out


@cache
def _library() -> ctypes.CDLL:
    """llama.cpp's code, from the package that also runs it."""
    try:
        import xllamacpp.xllamacpp as runtime
    except ModuleNotFoundError as error:
        raise ValueError(
            "quantising takes llama.cpp's own code: pip install 'lit-vlm[edge]', or take --quantise f16"
        ) from error
    library = ctypes.CDLL(runtime.__file__)
    call = library.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    number = ctypes.c_int64
    floats = ctypes.POINTER(ctypes.c_float)
    call.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, number, number, number, floats]
    return library
