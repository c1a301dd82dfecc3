"""Hashes of pictures: of their bytes, and perceptual ones, which stay about the same when a picture is encoded anew."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from scipy.fft import dctn

Codes = NDArray[np.uint8]
"""One row of bytes for each picture: `[n, bytes]`."""
OVERSAMPLED = 4
"""Side of the picture that is transformed over the number of frequencies that are read, as in pHash."""


def content_hash(content: bytes) -> Codes:
    """The first 16 bytes of SHA-256: `[16]`."""
    return np.frombuffer(hashlib.sha256(content).digest()[:16], np.uint8)


def pixel_hash(picture: PILImage.Image) -> Codes:
    """A hash of an RGB picture's size and pixels: `[16]`."""
    return content_hash(f"{picture.width} {picture.height} ".encode() + picture.tobytes())


def perceptual_hash(picture: PILImage.Image, bits: int = 64) -> Codes:
    """The signs of a picture's low frequencies, as pHash has them (Zauner, 2010, section 3.2.1).

    The picture is reduced to a grey square of 4 × 4 pixels per frequency. Of its cosine transform the lowest √bits ×
    √bits coefficients are read without the very first row and column, which say how bright the picture is and at which
    side. A bit says whether a coefficient is above the median.

    Args:
        picture: of any mode and size.
        bits: of the hash, a square number that 8 divides: 64, 144, 256.

    Returns:
        `[bits / 8]`.
    """
    side = round(bits**0.5)
    square = (side * OVERSAMPLED, side * OVERSAMPLED)
    grey = np.asarray(picture.convert("L").resize(square, PILImage.Resampling.LANCZOS, reducing_gap=2.0), np.float32)
    low = dctn(grey)[1 : side + 1, 1 : side + 1].ravel()
    return np.packbits(low > np.median(low))
