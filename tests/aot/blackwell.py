"""Compiles the kernels for a GPU of compute capability 10, a B200, that need not be there."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mfac_jax.kernels import _mosaic_gpu

H200 = (Path(__file__).parent / "h200.textproto").read_text()


def main() -> None:
    """Raises unless all of them compile, into programs that hold them."""
    jax.config.update("jax_platforms", "cpu")
    target = H200.replace("major: 9", "major: 10")
    assert target != H200
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target, topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    tiles, m, width = 34, 512, 8064  # ResNet-20
    block, vector = place((tiles, m, width), jnp.float32), place((tiles, width), jnp.float32)
    row, where, weights = place((), jnp.int32), place((), jnp.bool_), place((m,), jnp.float32)
    for function, arguments in [
        (_mosaic_gpu.dots, (block, vector)),
        (_mosaic_gpu.write_row, (block, row, vector, where)),
        (_mosaic_gpu.combine, (block, weights)),
    ]:
        text = jax.jit(function).lower(*arguments).compile().as_text()
        assert f"mfac_{function.__name__}" in text


if __name__ == "__main__":
    main()
