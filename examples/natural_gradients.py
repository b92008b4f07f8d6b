"""Natural gradients in row space: a physics-informed network and a quantum ground state.

    python examples/natural_gradients.py [--out DIR] [--smoke]

Poisson: a network solves ``-laplace u = f`` on the unit square with zero boundary values. The rows
are the gradients of the residuals of this step. Ground state: a restricted Boltzmann machine is
the ground state of a transverse-field Ising chain, by variational Monte Carlo; the exact energy is
that of the dense Hamiltonian. Every optimizer has the same trials over its learning rate (and
damping) with a seed of its own, and three other seeds at the end. The program writes every finished
run to ``results.json`` and resumes from it. It takes about half an hour of one CPU core;
``--smoke`` takes half a minute.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import parallel

from mfac_jax import natural_gradient

TRIAL_SEED, SEEDS = 100, (0, 1, 2)


class Contender(NamedTuple):
    """An optimizer with its trials.

    Attributes:
        make: the optimizer from a setting.
        settings: the settings to try.
        kind: what ``update`` receives: ``"gradient"``, ``"rows"``, or ``"line search"`` for a
            gradient with the value and the function.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    settings: tuple[tuple[float, ...], ...]
    kind: str = "gradient"


def natural(rate: float, damping: float, momentum: float = 0.0, center: bool = False) -> Any:
    """A natural gradient with a limit on the length of the update."""
    return optax.chain(
        natural_gradient(relative_damping=damping, momentum=momentum, center=center),
        optax.scale_by_learning_rate(rate),
        optax.clip_by_global_norm(0.3),
    )


def spring(rate: float, damping: float, center: bool = False) -> Any:
    """SPRING."""
    return natural(rate, damping, 0.95, center)


RATES = ((3e-4,), (1e-3,), (3e-3,), (1e-2,), (3e-2,), (1e-1,))
PAIRS = tuple((rate, damping) for rate in (0.3, 1.0) for damping in (1e-6, 1e-4, 1e-2))


class Poisson:
    """``-laplace u = 2 pi^2 sin(pi x) sin(pi y)``; the solution is ``sin(pi x) sin(pi y)``."""

    name = "Poisson equation"
    metric = "relative L2 error"
    contenders: ClassVar[dict[str, Contender]] = {
        "Adam": Contender(optax.adam, RATES),
        "L-BFGS": Contender(
            lambda memory: optax.lbfgs(memory_size=int(memory)),
            tuple((m,) for m in (5, 10, 20, 40, 80, 160)),
            "line search",
        ),
        "natural gradient": Contender(natural, PAIRS, "rows"),
        "SPRING": Contender(spring, PAIRS, "rows"),
    }

    def __init__(self, smoke: bool):
        self.steps = 20 if smoke else 1000
        self.inside, self.edge = (16, 8) if smoke else (400, 120)
        self.width = 8 if smoke else 32

    def init(self, seed: int) -> Any:
        """An MLP 2-w-w-1."""
        sizes = [(2, self.width), (self.width, self.width), (self.width, 1)]
        keys = jax.random.split(jax.random.key(seed), len(sizes))
        return [
            {"w": jax.random.normal(key, size) / np.sqrt(size[0]), "b": jnp.zeros(size[1])}
            for key, size in zip(keys, sizes, strict=True)
        ]

    def u(self, params: Any, x: jax.Array) -> jax.Array:
        """The value at one point."""
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return (x @ params[-1]["w"] + params[-1]["b"])[0]

    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Points inside and on the edge; new ones in every step."""
        first, second, third = jax.random.split(key, 3)
        inside = jax.random.uniform(first, (self.inside, 2))
        along = jax.random.uniform(second, (self.edge,))
        side = jax.random.randint(third, (self.edge,), 0, 4)
        fixed = (side % 2).astype(along.dtype)
        pair = jnp.where(
            (side < 2)[:, None], jnp.stack([along, fixed], 1), jnp.stack([fixed, along], 1)
        )
        return inside, pair

    def residual_inside(self, params: Any, x: jax.Array) -> jax.Array:
        """``-laplace u - f`` at one point."""
        second = jax.hessian(self.u, argnums=1)(params, x)
        return -jnp.trace(second) - 2 * np.pi**2 * jnp.prod(jnp.sin(np.pi * x))

    def rows(self, params: Any, sample: Any) -> tuple[Any, jax.Array]:
        """The gradients of all residuals, and the residuals; the edge has a weight of 10."""
        parts = []
        count = self.inside + self.edge
        for points, residual, weight in (
            (sample[0], self.residual_inside, 1.0),
            (sample[1], self.u, 10.0),
        ):
            scale = jnp.sqrt(weight * count / len(points))
            values, rows = jax.vmap(jax.value_and_grad(residual), (None, 0))(params, points)
            parts.append((jax.tree.map(lambda x, s=scale: s * x, rows), scale * values))
        rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts[0][0], parts[1][0])
        return rows, jnp.concatenate([parts[0][1], parts[1][1]])

    def loss(self, params: Any, sample: Any) -> jax.Array:
        """Half the mean square of the residuals."""
        inside = jax.vmap(self.residual_inside, (None, 0))(params, sample[0])
        edge = jax.vmap(self.u, (None, 0))(params, sample[1])
        return 0.5 * (jnp.mean(inside**2) + 10.0 * jnp.mean(edge**2))

    def error(self, params: Any) -> jax.Array:
        """The relative L2 error on a grid."""
        axis = (jnp.arange(40) + 0.5) / 40
        grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
        exact = jnp.prod(jnp.sin(np.pi * grid), axis=1)
        found = jax.vmap(self.u, (None, 0))(params, grid)
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)


class Ising:
    """A transverse-field Ising ring at its critical field, with samples drawn from ``psi^2``."""

    name = "Ising ground state"
    metric = "relative error of the energy"
    contenders: ClassVar[dict[str, Contender]] = {
        "SGD": Contender(optax.sgd, RATES),
        "Adam": Contender(optax.adam, RATES),
        "natural gradient": Contender(
            functools.partial(natural, center=True),
            tuple((r, d) for r in (0.03, 0.1) for d in (1e-4, 1e-3, 1e-2)),
            "rows",
        ),
        "SPRING": Contender(
            functools.partial(spring, center=True),
            tuple((r, d) for r in (0.03, 0.1) for d in (1e-4, 1e-3, 1e-2)),
            "rows",
        ),
    }

    def __init__(self, smoke: bool):
        self.spins = 6 if smoke else 10
        self.steps = 20 if smoke else 600
        self.count = 32 if smoke else 256
        states = np.arange(2**self.spins)
        bits = (states[:, None] >> np.arange(self.spins)) & 1
        self.states = jnp.asarray(1.0 - 2.0 * bits, jnp.float32)
        self.flips = jnp.asarray(states[:, None] ^ (1 << np.arange(self.spins)))
        self.coupling = -jnp.sum(self.states * jnp.roll(self.states, 1, axis=1), axis=1)
        dense = np.diag(np.asarray(self.coupling, np.float64))
        np.subtract.at(dense, (np.repeat(states, self.spins), np.asarray(self.flips).ravel()), 1.0)
        self.exact = float(np.linalg.eigvalsh(dense)[0])

    def init(self, seed: int) -> Any:
        """Two hidden units for each spin."""
        hidden = 2 * self.spins
        keys = jax.random.split(jax.random.key(seed), 2)
        return {
            "w": 0.1 * jax.random.normal(keys[0], (self.spins, hidden)),
            "b": 0.1 * jax.random.normal(keys[1], (hidden,)),
        }

    def log_psi(self, params: Any, spins: jax.Array) -> jax.Array:
        """The logarithm of the amplitude, which is positive."""
        return jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + params["b"])), axis=-1)

    def local_energies(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Of all states, and the logarithms of all amplitudes."""
        logs = self.log_psi(params, self.states)
        ratios = jnp.exp(logs[self.flips] - logs[:, None])
        return self.coupling - jnp.sum(ratios, axis=1), logs

    def sample(self, key: jax.Array) -> jax.Array:
        """The key itself: samples depend on the parameters."""
        return key

    def rows(self, params: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        """The gradients of the log-amplitude at sampled states, and the local energies."""
        energies, logs = self.local_energies(params)
        drawn = jax.random.categorical(key, 2 * logs, shape=(self.count,))
        rows = jax.vmap(jax.grad(self.log_psi), (None, 0))(params, self.states[drawn])
        return rows, energies[drawn]

    def loss(self, params: Any, key: jax.Array) -> jax.Array:
        """A function whose gradient is that of the energy, estimated from samples."""
        energies, logs = jax.lax.stop_gradient(self.local_energies(params))
        drawn = jax.random.categorical(key, 2 * logs, shape=(self.count,))
        centered = energies[drawn] - jnp.mean(energies[drawn])
        return jnp.mean(2 * centered * self.log_psi(params, self.states[drawn]))

    def error(self, params: Any) -> jax.Array:
        """The relative error of the energy, over all states."""
        energies, logs = self.local_energies(params)
        energy = jnp.sum(jax.nn.softmax(2 * logs) * energies)
        return (energy - self.exact) / abs(self.exact)


def train(task: Any, contender: Contender, setting: tuple[float, ...], seed: int) -> dict[str, Any]:
    """One training: the error along it, and the milliseconds of a step."""
    tx = contender.make(*setting)
    if contender.kind != "line search":
        decay = optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, task.steps))
        tx = optax.chain(tx, decay)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        sample = task.sample(key)
        if contender.kind == "rows":
            rows, residuals = task.rows(params, sample)
            updates, state = tx.update(rows, state, params, residuals=residuals)
        else:
            value, gradient = jax.value_and_grad(task.loss)(params, sample)
            extra = {}
            if contender.kind == "line search":
                extra = {
                    "value": value,
                    "grad": gradient,
                    "value_fn": lambda p: task.loss(p, sample),
                }
            updates, state = tx.update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return params, state, task.error(params)

    params = task.init(seed)
    state = tx.init(params)
    # A line search compares values, so L-BFGS keeps its first sample.
    keys = jax.random.split(jax.random.key(1000 + seed), task.steps)
    errors, seconds = [], []
    for key in keys:
        began = time.perf_counter()
        params, state, error = step(
            params, state, keys[0] if contender.kind == "line search" else key
        )
        errors.append(float(error))
        seconds.append(time.perf_counter() - began)
    return {
        "errors": errors[:: max(task.steps // 200, 1)],
        "final": errors[-1],
        "ms": 1e3 * float(np.median(seconds)),
    }


TASKS = {"poisson": Poisson, "ising": Ising}


@functools.cache
def task_of(name: str, smoke: bool) -> Any:
    """The task, made once in each process."""
    return TASKS[name](smoke)


def measure(name: str, smoke: bool, method: str, setting: tuple[float, ...], seed: int) -> Any:
    """One run."""
    task = task_of(name, smoke)
    return train(task, task.contenders[method], setting, seed)


def key_of(name: str, method: str, setting: tuple[float, ...], seed: int) -> str:
    """The name of a run in the results."""
    return f"{name}, {method}, {' '.join(f'{x:g}' for x in setting)}, seed {seed}"


def best_setting(results: dict[str, Any], name: str, method: str) -> tuple[float, ...]:
    """The setting with the smallest error in the trials."""
    found = {}
    for setting in TASKS[name].contenders[method].settings:
        run = results["runs"].get(key_of(name, method, setting, TRIAL_SEED))
        if run is not None:
            found[setting] = run["final"] if np.isfinite(run["final"]) else np.inf
    return min(found, key=found.__getitem__)


def finals(results: dict[str, Any], name: str, method: str) -> list[dict[str, Any]]:
    """The runs of the best setting, one for each seed."""
    setting = best_setting(results, name, method)
    return [results["runs"][key_of(name, method, setting, seed)] for seed in results["seeds"]]


def table(results: dict[str, Any]) -> str:
    """The final error of every optimizer, and the time of a step."""
    lines = ["| task | optimizer | setting | error, mean (worst) | ms a step |", "|---" * 5 + "|"]
    for name, task in TASKS.items():
        for method in task.contenders:
            setting = " ".join(f"{x:g}" for x in best_setting(results, name, method))
            found = finals(results, name, method)
            errors = [run["final"] for run in found]
            ms = np.median([run["ms"] for run in found])
            error = f"{np.mean(errors):.1e} ({max(errors):.1e})"
            lines.append(f"| {task.name} | {method} | {setting} | {error} | {ms:.1f} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """The error along the steps, for the tuned setting of each optimizer."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 4))
    for axis, (name, task) in zip(axes, TASKS.items(), strict=True):
        steps = task_of(name, results["smoke"]).steps
        for method in task.contenders:
            curve = np.mean([run["errors"] for run in finals(results, name, method)], axis=0)
            axis.semilogy(np.linspace(0, steps, len(curve)), curve, label=method)
        axis.set(title=task.name, xlabel="step", ylabel=task.metric)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Tunes, trains, and writes the results, the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("natural_gradients"), help="for the results"
    )
    parser.add_argument("--smoke", action="store_true", help="a quick try in small")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("smoke.json" if options.smoke else "results.json")
    results = parallel.open_results(path, parallel.environment())
    seeds = SEEDS[:1] if options.smoke else SEEDS
    results |= {"seeds": seeds, "smoke": options.smoke}
    workers = 1 if options.smoke else parallel.num_workers()
    pairs = [(name, method) for name, task in TASKS.items() for method in task.contenders]
    todo = {
        key_of(name, method, setting, TRIAL_SEED): (
            name,
            options.smoke,
            method,
            setting,
            TRIAL_SEED,
        )
        for name, method in pairs
        for setting in TASKS[name].contenders[method].settings[: 1 if options.smoke else None]
    }
    parallel.perform(measure, todo, results, path, workers=workers)
    todo = {}
    for name, method in pairs:
        setting = best_setting(results, name, method)
        for seed in seeds:
            todo[key_of(name, method, setting, seed)] = (name, options.smoke, method, setting, seed)
    parallel.perform(measure, todo, results, path, workers=workers)
    parallel.write_up(results, path, lambda found: {"errors": table(found)}, draw, "errors.png")
    return results


if __name__ == "__main__":
    main()
