"""Float32 directions against float64, for gradients from easy to hopeless.

    python benchmarks/accuracy.py [--render]

Fills windows by pushes, as the optimizer does, and compares four methods for ``F^-1 v``.
Writes ``results/accuracy.json`` and the table of ``docs/accuracy.md``; ``--render``
only writes the table. Takes about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import report
from jax import lax
from numpy.typing import NDArray
from tqdm import tqdm

from mfac_jax import reference, window

PAGE = report.ROOT / "docs" / "accuracy.md"
ROWS, SIZE, SEEDS = 128, 20_000, (0, 1, 2)
DAMPINGS = (1e-3, 1e-5, 1e-7)
COLUMNS = {
    "identity_1": "identity 1",
    "identity_2": "identity 2",
    "refined": "identity 2, refined",
    "recursion": "paper's recursion",
}
SCALE = 0.01

Matrix = NDArray[np.float64]


def _independent(rng: np.random.Generator, n: int, d: int) -> Matrix:
    return SCALE * rng.normal(size=(n, d))


def _correlated(rng: np.random.Generator, n: int, d: int) -> Matrix:
    # Two gradients have cosine 0.8.
    return SCALE * (np.sqrt(0.8) * rng.normal(size=d) + np.sqrt(0.2) * rng.normal(size=(n, d)))


def _duplicated(rng: np.random.Generator, n: int, d: int) -> Matrix:
    rows = _correlated(rng, n, d)
    rows[-1] = rows[n // 2] = rows[3]
    return rows


def _one_huge(rng: np.random.Generator, n: int, d: int) -> Matrix:
    rows = _correlated(rng, n, d)
    rows[3] *= 1e6
    return rows


def _zero_rows(rng: np.random.Generator, n: int, d: int) -> Matrix:
    rows = _correlated(rng, n, d)
    rows[1:-1:3] = 0
    return rows


WINDOWS: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "independent": _independent,
    "correlated": _correlated,
    "newest one three times": _duplicated,
    "one row 1e6 times the others": _one_huge,
    "all times 1e-12": lambda rng, n, d: 1e-12 * _correlated(rng, n, d),
    "all times 1e8": lambda rng, n, d: 1e8 * _correlated(rng, n, d),
    "a third of the rows zero": _zero_rows,
}


def vectors(n: int) -> dict[str, NDArray[np.float64]]:
    """The coefficients ``a`` of the vectors ``v = G^T a``."""
    return {"newest": np.eye(n)[-1], "mean": np.full(n, 1 / n)}


@jax.jit
def _fill(gradients: jax.Array) -> window.Window:
    n, d = gradients.shape
    empty = window.init(jnp.zeros(d, gradients.dtype), n)
    return lax.scan(lambda w, g: (window.push(w, g)[0], None), empty, gradients)[0]


@jax.jit
def _directions(
    held: window.Window, gradients: jax.Array, coefficients: jax.Array, damping: jax.Array
) -> dict[str, list[jax.Array]]:
    """``F^-1 G^T a`` for each ``a`` in ``coefficients``, by every method."""
    recursion = reference.static_recursion(gradients, damping)
    out: dict[str, list[jax.Array]] = {name: [] for name in COLUMNS}
    for a in coefficients:
        v = jnp.dot(a, gradients, precision="highest")
        out["identity_1"].append(window.ihvp(held, v, damping))
        out["identity_2"].append(window.ihvp_combination(held, a, damping))
        out["refined"].append(window.ihvp_combination(held, a, damping, refinements=1))
        out["recursion"].append(reference.static_ihvp(recursion, v))
    return out


def measure(
    n: int = ROWS,
    d: int = SIZE,
    seeds: Sequence[int] = SEEDS,
    dampings: Sequence[float] = DAMPINGS,
    windows: Sequence[str] = tuple(WINDOWS),
) -> dict:
    """Median relative errors over the seeds, for every window, damping and vector."""
    errors: dict[tuple[str, float, str], dict[str, list[float]]] = {}
    for name in tqdm(windows, desc="windows", disable=None):
        for seed in seeds:
            rows = WINDOWS[name](np.random.default_rng(seed), n, d).astype(np.float32)
            u, s, vt = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
            held = _fill(jnp.asarray(rows))
            named = vectors(n)
            coefficients = jnp.asarray(np.stack(list(named.values())), jnp.float32)
            for damping in dampings:
                lam = np.float32(damping)
                got = _directions(held, jnp.asarray(rows), coefficients, jnp.asarray(lam))
                for i, vector in enumerate(named):
                    a = np.asarray(coefficients[i], np.float64)
                    exact = (n * s / (s**2 + n * float(lam)) * (u.T @ a)) @ vt
                    cell = errors.setdefault((name, damping, vector), {c: [] for c in COLUMNS})
                    for column, results in got.items():
                        error = np.asarray(results[i], np.float64) - exact
                        cell[column].append(float(np.linalg.norm(error) / np.linalg.norm(exact)))
    measured = [
        {"window": name, "damping": damping, "vector": vector}
        | {column: float(np.median(values)) for column, values in cell.items()}
        for (name, damping, vector), cell in errors.items()
    ]
    return report.environment() | {"n": n, "d": d, "seeds": len(seeds), "rows": measured}


def table(results: dict) -> str:
    """The table of ``docs/accuracy.md``."""
    lines = [
        "| window | $\\lambda$ | $v$ | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    lines += [
        f"| {row['window']} | {row['damping']:.0e} | {row['vector']} | "
        + " | ".join(f"{row[column]:.1e}" for column in COLUMNS)
        + " |"
        for row in results["rows"]
    ]
    setting = (
        f"n = {results['n']}, d = {results['d']:,}, median of {results['seeds']} windows; "
        f"{results['device'].upper()}, jax {results['jax']}, Python {results['python']}, "
        f"{results['date']}."
    )
    return "\n".join(lines) + "\n\n" + setting


def main() -> None:
    """Measures (unless ``--render`` is given) and writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only write the table")
    if not parser.parse_args().render:
        report.save("accuracy", measure())
    report.write_table(PAGE, "accuracy", table(report.load("accuracy")))


if __name__ == "__main__":
    main()
