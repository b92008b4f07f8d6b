"""The backend for TPUs: the scans and the block inverse, and the limits of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from mfac_jax.kernels import _tpu, _tpu_blocks
from mfac_jax.kernels.backends import Backend

_MODULES: dict[str, Any] = dict.fromkeys(("dots", "write_row", "combine"), _tpu)
_MODULES |= dict.fromkeys(("block_inverse_diagonal", "block_ihvp"), _tpu_blocks)


class _MosaicTpu(Backend):
    """Kernels for TPUs."""

    needs = "a TPU"
    operations = tuple(_MODULES)

    def why_not(self, operation: str, block: jax.core.ShapedArray) -> str | None:
        reason: str | None = _MODULES[operation].unsupported(block.shape, block.dtype)
        return reason

    def run(self, operation: str, operands: Mapping[str, Array]) -> Any:
        return getattr(_MODULES[operation], operation)(**operands)


BACKEND = _MosaicTpu()
