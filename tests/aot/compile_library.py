"""Compiles what users call, as they call it, for an H200 and for TPUs that need not be there.

Run it by name, in an environment that ``compile_cuda.py`` and ``compile_tpu.py`` can use.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from mfac_jax import fisher_inverse, mfac_precondition, plan
from mfac_jax.rows import Dense, Int8, Paged, PagedRows, TopK

jax.config.update("jax_platforms", "cpu")

H200 = Path(__file__).parent / "h200.textproto"
D = 272_474  # ResNet-20
DENSE = Dense()


@pytest.fixture(scope="module", params=["cuda", "tpu"])
def devices(request):
    if request.param == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H200.read_text(), topology="1x1x1"
        )
    return topology.devices


def on(sharding, tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def compile_update(sharding, m, storage=DENSE, size=D, blocks=None):
    tx = mfac_precondition(m, storage=storage, blocks=blocks)
    params = {"w": jax.ShapeDtypeStruct((size,), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=1)
    return update.lower(on(sharding, params), on(sharding, state)).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_of_the_optimizer_runs_the_kernels_in_place(devices, dtype):
    compiled = compile_update(SingleDeviceSharding(devices[0]), 256, Dense(dtype))
    text = compiled.as_text()
    assert "mfac_write_row" in text
    assert "mfac_combine" in text
    memory, window = compiled.memory_analysis(), 256 * D * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= window
    assert memory.temp_size_in_bytes < window / 8


@pytest.mark.parametrize(
    ("storage", "blocks"),
    [
        (Dense(), None),
        (Dense(), "leaf"),
        (Dense(jnp.bfloat16), None),
        (Dense(packing="leaf"), None),
        (Dense(packing="leaf"), "leaf"),
        (Int8(), None),
        (TopK(0.01), None),
    ],
    ids=["float32", "by leaf", "bfloat16", "leaf", "leaf by leaf", "int8", "topk"],
)
def test_a_step_takes_what_is_planned(devices, storage, blocks):
    device = SingleDeviceSharding(devices[0])
    memory = compile_update(device, 64, storage, blocks=blocks).memory_analysis()
    actual = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    platform = "tpu" if devices[0].platform == "tpu" else "gpu"
    params = {"w": jax.ShapeDtypeStruct((D,), jnp.float32)}
    made = plan(params, 64, storage=storage, blocks=blocks, platform=platform)
    assert made.device_bytes == pytest.approx(actual, rel=0.1)


@pytest.mark.parametrize("m", [64, 512])
def test_a_step_has_one_branch_and_no_loop(devices, m):
    if devices[0].platform == "tpu":
        pytest.skip("the host waits for no predicate there")
    text = compile_update(SingleDeviceSharding(devices[0]), m).as_text()
    step = text[text.index("\nENTRY") :]
    assert step.count(" conditional(") == 1
    for name in (" while(", "cusolver", "triangularSolve"):
        assert name not in step
        assert name in text  # where the inverse is made anew


def test_xla_asked_for_runs_no_kernel(devices):
    storage = Dense(implementation="xla")
    compiled = compile_update(SingleDeviceSharding(devices[0]), 256, storage)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    for name in ("mfac_dots", "mfac_write_row", "mfac_combine"):
        assert name not in text
    window = 256 * D * 4
    assert memory.alias_size_in_bytes >= window
    assert memory.temp_size_in_bytes < window / 8


def test_the_diagonal_of_blocks(devices):
    device = SingleDeviceSharding(devices[0])
    rows = on(device, jax.eval_shape(lambda: Dense().empty(jnp.zeros(128 * 16384), 64)))

    def diagonal(rows):
        return fisher_inverse(rows, 1e-5, blocks=128).diagonal()

    compiled = jax.jit(diagonal).lower(rows).compile()
    has_kernel = "mfac_block_inverse_diagonal" in compiled.as_text()
    assert has_kernel == (devices[0].platform == "tpu")
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 128 * 16384 * 4 / 4


def test_steps_on_several_devices(devices):
    """XLA spreads replicated and sharded windows by itself, and gathers no gradient."""
    if len(devices) == 1:
        pytest.skip("the description of a GPU is of one")
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    compile_update(NamedSharding(mesh, PartitionSpec()), 64)
    tx = mfac_precondition(64, storage=Dense(packing="leaf"))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jax.ShapeDtypeStruct((4, 2**16), jnp.float32, sharding=sharding)}
    state = jax.eval_shape(tx.init, params)
    blocks = NamedSharding(mesh, PartitionSpec(None, "x"))
    placed = on(NamedSharding(mesh, PartitionSpec()), state)
    held = state.window.rows
    rows = dataclasses.replace(placed.window.rows, blocks=on(blocks, held.blocks))
    placed = placed._replace(window=placed.window._replace(rows=rows))
    text = jax.jit(tx.update).lower(params, placed).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


@pytest.fixture
def in_host_memory(devices, monkeypatch):
    """A sharding in the memory of the host, which JAX does not know for devices not there."""

    def memory_kind(sharding):
        if isinstance(sharding.mesh, AbstractMesh):
            return None
        return "pinned_host" if "host" in sharding.mesh.axis_names else "device"

    monkeypatch.setattr(NamedSharding, "memory_kind", property(memory_kind))
    mesh = Mesh(np.array(devices[:1]).reshape(1, 1), ("x", "host"))
    return NamedSharding(mesh, PartitionSpec())


# More than the GPU has, and more than a host leaves to CUDA by default.
M, RESNET_50 = 1024, 25_557_032
PAGE = 2**26


def test_a_step_with_pages_in_host_memory(devices, in_host_memory):
    """Two pages and some vectors are on the device; the window is changed where it is."""
    on_device = NamedSharding(Mesh(np.array(devices[:1]), "x"), PartitionSpec())
    params = {"w": jax.ShapeDtypeStruct((RESNET_50,), jnp.float32)}
    tx = mfac_precondition(M, storage=Paged())
    state = on(on_device, jax.eval_shape(tx.init, params))
    rows = state.window.rows
    rows = PagedRows(on(in_host_memory, rows.pages), rows.layout, M)
    state = state._replace(window=state.window._replace(rows=rows))
    update = jax.jit(tx.update, donate_argnums=1).lower(on(on_device, params), state)
    memory, window = update.compile().memory_analysis(), 4 * rows.pages.size
    assert memory.host_argument_size_in_bytes == window
    assert memory.host_alias_size_in_bytes == window
    assert memory.host_temp_size_in_bytes == 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    vector, matrix = 4 * RESNET_50, 4 * M**2
    assert held - memory.alias_size_in_bytes < 2 * PAGE + 4 * vector + 4 * matrix


def test_pages_cross_the_bus_and_two_are_on_the_device(devices, in_host_memory):
    on_device = NamedSharding(Mesh(np.array(devices[:1]), "x"), PartitionSpec())
    matrix = on(on_device, jax.ShapeDtypeStruct((M, M), jnp.float32))
    start = on(on_device, jax.ShapeDtypeStruct((), jnp.int32))
    rows = jax.eval_shape(lambda: Paged().empty(jnp.zeros(RESNET_50), M))
    rows = PagedRows(on(in_host_memory, rows.pages), rows.layout, M)
    memory = jax.jit(PagedRows.transform).lower(rows, matrix).compile().memory_analysis()
    whole, vector = rows.pages.size * 4, 4 * RESNET_50
    assert memory.temp_size_in_bytes < 2 * PAGE + vector
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes < 3 * vector
    assert memory.host_argument_size_in_bytes == whole
    assert memory.host_output_size_in_bytes == whole
    assert memory.host_temp_size_in_bytes == 0
    columns = jax.jit(lambda rows, start: rows.columns(start, 2048)).lower(rows, start).compile()
    memory = columns.memory_analysis()
    assert memory.temp_size_in_bytes < 4.1 * PAGE  # two pages, as they come and as one matrix
    assert memory.host_temp_size_in_bytes == 0


@pytest.mark.parametrize("devices", ["cuda"], indirect=True)
def test_a_window_of_the_largest_entries_fits(devices):
    """A step of the optimizer; dense rows would take 105 GB."""
    compiled = compile_update(SingleDeviceSharding(devices[0]), M, TopK(0.01), RESNET_50)
    memory = compiled.memory_analysis()
    window = 41 / 4096 * M * 4 * RESNET_50  # values and places of 2 bytes, one for each 100 entries
    assert memory.alias_size_in_bytes > window
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert held - memory.alias_size_in_bytes < 1.1 * window + 8 * 4 * RESNET_50
