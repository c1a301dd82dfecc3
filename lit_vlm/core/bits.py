"""The types of 4 and 8 bits that weights are stored in, which commands name in their help without loading PyTorch."""

from typing import Literal

Kind = Literal["nf4", "int8", "fp8"]
"""4-bit floats by quantiles, integers of 8 bits, floats of 8 bits (e4m3)."""
