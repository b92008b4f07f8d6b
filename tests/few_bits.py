"""What compressed storages keep of gradients, one after another, in plain NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from mfac_jax.rows import Int8, TopK

BFLOAT16 = np.dtype(jnp.bfloat16)


def rounded(x, dtype):
    """``x`` rounded to a dtype, in float32."""
    return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def tiles_of(gradient, width):
    """The gradient in float32, padded and cut into tiles."""
    tiles = np.zeros((max(-(-len(gradient) // width), 1), width), np.float32)
    tiles.reshape(-1)[: len(gradient)] = gradient
    return tiles


@dataclass
class Model:
    """Stores gradients as a storage does, and keeps their errors.

    Attributes:
        storage: the storage.
        errors: what was left out so far, in tiles.
    """

    storage: Any
    errors: Any = field(default=0.0)

    def __call__(self, gradient):
        """The next gradient as the rows keep it; the errors change."""
        store = {TopK: self.largest, Int8: self.integers}[type(self.storage)]
        return store(gradient).reshape(-1)[: len(gradient)].astype(np.float64)

    def integers(self, gradient):
        """Every number as a multiple of the largest of its tile, over 127."""
        tile = self.storage.tile
        # As few tiles as possible, all about as wide.
        tiles = tiles_of(gradient, math.ceil(len(gradient) / math.ceil(len(gradient) / tile)))
        scale = np.abs(tiles).max(axis=1, keepdims=True) * np.float32(1 / 127)
        with np.errstate(invalid="ignore"):
            levels = np.nan_to_num(np.rint(tiles / scale))
        return levels.astype(np.float32) * scale

    def largest(self, gradient):
        """The largest numbers of each block, with the errors of earlier gradients."""
        width = 2
        while width < min(self.storage.block, len(gradient)):
            width *= 2
        tiles = tiles_of(gradient, width) + np.float32(self.errors)
        stored = np.zeros_like(tiles)
        kept = max(math.ceil(self.storage.density * tiles.shape[1]), 1)
        for block, out in zip(tiles, stored, strict=True):
            places = np.argsort(-np.abs(block), kind="stable")[:kept]
            out[places] = rounded(block[places], self.storage.values)
        if self.storage.error_bits:
            self.errors = self.packed(tiles - stored)
        return stored

    def packed(self, errors):
        """Errors in the bits that they have."""
        if self.storage.error_bits == 16:
            return rounded(errors, BFLOAT16)
        groups = errors.reshape(len(errors), -1, min(errors.shape[1], 64))
        scale = rounded(np.abs(groups).max(axis=2, keepdims=True) / np.float32(7), BFLOAT16)
        with np.errstate(invalid="ignore"):
            levels = np.clip(np.nan_to_num(np.rint(groups / scale)), -7, 7)
        return (levels * scale).reshape(errors.shape)
