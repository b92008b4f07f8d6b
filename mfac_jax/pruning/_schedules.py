"""Schedules: the sparsity after each of several steps."""

from __future__ import annotations

from mfac_jax import _checks

SCHEDULES = ("geometric", "cubic", "linear")


def sparsity_schedule(
    final: float, steps: int, *, kind: str = "geometric", initial: float = 0.0
) -> tuple[float, ...]:
    """The sparsity after each of ``steps`` pruning steps, from ``initial`` to ``final``.

    Args:
        final: the sparsity in the end, in [0, 1).
        steps: how many steps there are.
        kind:
            - ``"geometric"``: every step leaves the same fraction of what is alive, as in the
              paper's recomputations: ``1 - s_t = (1 - s_0) ((1 - s_T) / (1 - s_0))^(t/T)``;
            - ``"cubic"``: ``s_T + (s_0 - s_T) (1 - t/T)^3``, fast at first (Zhu, Gupta, "To
              prune, or not to prune", 2017), usual in gradual pruning;
            - ``"linear"``: the same number of weights in every step.
        initial: the sparsity before the first step.

    Returns:
        The sparsities; the last is ``final`` exactly.

    Raises:
        ValueError: a sparsity lies outside [0, 1], they fall, or ``kind`` is unknown.
        TypeError: ``steps`` is not an int, or a sparsity is not a number.

    Example:
        >>> from mfac_jax.pruning import sparsity_schedule
        >>> [round(s, 3) for s in sparsity_schedule(0.875, 3)]
        [0.5, 0.75, 0.875]
    """
    _checks.positive_int(steps, "steps")
    _checks.one_of(kind, "kind", SCHEDULES)
    _checks.unit_interval(initial, "initial")
    _checks.unit_interval(final, "final")
    if not initial <= final:
        raise ValueError(f"final must be at least initial={initial}, got {final}.")

    def after(step: int) -> float:
        part = step / steps
        if step == steps or initial == final:
            return float(final)
        if kind == "linear":
            return initial + (final - initial) * part
        if kind == "cubic":
            return final + (initial - final) * (1 - part) ** 3
        return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** part

    return tuple(after(step) for step in range(1, steps + 1))
