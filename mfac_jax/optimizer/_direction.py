"""What a step does in the n x n space: momentum, weights, powers and lengths, without a scan of G.

Every direction is a combination ``G^T c`` of the window's own gradients, and ``c`` follows from
``K = G G^T`` and, for a given length, from that of ``G^T c``:

- momentum: the right-hand side ``v = sum_j a_j g_j`` with ``a_j`` falling with the age of ``g_j``,
  so no momentum is stored;
- weights: ``F = lambda I + (1/n) sum_j w_j g_j g_j^T`` and ``v = sum_j s_j a_j g_j``;
- powers: ``F^-1/2 v = G^T h(lambda I + K / n) a`` with ``h(x) = x^-1/2``;
- lengths: that of ``v`` is ``sqrt(a^T K a)``. That of ``u = G^T c`` is taken from ``u`` itself:
  ``c^T K c`` would cancel, because the coefficients of similar gradients have both signs.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks, algebra

# The smallest weight, as a fraction of the largest one. A solution is divided by the roots of the
# weights and multiplied by them again.
_LEAST_WEIGHT = 1e-12


class Held(NamedTuple):
    """The gradients of a window, as weights see them; in blocks, those of one block.

    Attributes:
        norms: ``|g_j|`` in the metric of the window; 0 in empty slots; (m,).
        ages: the number of gradients that came after; (m,) int32. Large in empty slots.
        values: the ``value`` that ``update`` received with each gradient; (m,). NaN where there
            was none, and if the weights do not read values.
    """

    norms: Float[Array, " m"]
    ages: Int[Array, " m"]
    values: Float[Array, " m"]

    @property
    def is_held(self) -> Bool[Array, " m"]:
        """Whether there is a gradient in the slot; its norm may be 0."""
        return self.ages < jnp.iinfo(jnp.int32).max


class System(NamedTuple):
    """The system ``(lambda I + K / n) c = a`` of one window, or of a batch of windows.

    Attributes:
        gram: ``K``, with the weights of the gradients in it; (m, m).
        rhs: ``a``; (m,).
        root: the roots of the weights, by which ``c`` is multiplied; (m,).
    """

    gram: Float[Array, "*b m m"]
    rhs: Float[Array, "*b m"]
    root: Float[Array, "*b m"]

    @property
    def trace(self) -> Float[Array, "*b"]:
        """The trace of ``K``."""
        return jnp.trace(self.gram, axis1=-2, axis2=-1)


class Solution(NamedTuple):
    """The direction ``u = G^T c`` of one window, or of a batch of windows, before its length.

    Attributes:
        coefficients: ``c``; (m,). If the length is to be that of ``v``, they are those of
            ``(lambda F^-1)^power v``, which is at most as long as ``v``, so nothing overflows.
        plain: ``|v|^2`` in the metric, ``v`` the right-hand side; scalar.
        image: ``|G u|^2 / n``, so ``u^T F u = lambda |u|^2 + image``; scalar.
    """

    coefficients: Float[Array, "*b m"]
    plain: Float[Array, "*b"]
    image: Float[Array, "*b"]


class Weights(abc.ABC):
    """How much each gradient counts; a small immutable value.

    Attributes:
        reads_values: whether the weights read :attr:`Held.values`. Every ``update`` then needs
            ``value=``.
    """

    reads_values: bool = False

    @abc.abstractmethod
    def __call__(self, held: Held) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        """The weights ``w`` in the Fisher, positive, and ``s`` in the right-hand side.

        Args:
            held: the gradients of the window. What is returned for empty slots does not count.
        """


@dataclass(frozen=True)
class Direction:
    """How a step follows from the gradients held; the default is the paper's ``F^-1 g``.

    Attributes:
        momentum: ``beta`` in [0, 1); a number or a scalar array. The right-hand side is the mean of
            the gradients held with weights ``beta^age``. This is Adam's bias-corrected momentum,
            cut off after m gradients.
        nesterov: whether the newest gradient counts once more, as in NAdam.
        power: 1 for ``F^-1 v``, or 0.5 for ``F^-1/2 v``, a full-matrix Adagrad over the window. The
            root has an error of about the rounding error times the largest ``|g_i|^2`` over
            ``lambda``: with a relative damping that is small.
        length: ``"natural"`` leaves the length as it is. ``"graft"`` gives the direction the
            length that ``D^-1 v``, the direction without the window, has in the metric: then the
            learning rate means what it means to SGD or, with
            :class:`~mfac_jax.optimizer.SecondMoments`, to Adam. In blocks, each parameter has its
            own length. A number is the root mean square of all entries of the direction.
        weights: how much each gradient counts: :class:`UnitNorm`, :class:`ByAge`,
            :class:`ByValue` or :class:`Weights` of your own. All count alike by default.
        limit: the largest ``sqrt(u^T F u)`` of a direction ``u``; None for no limit. A longer
            direction is shortened. A step ``t u`` changes the local model of the predictions by
            ``t^2 u^T F u / 2``, so the limit bounds this change, as in a trust region. It is taken
            over all blocks together.

    Raises:
        TypeError: an attribute has the wrong type.
        ValueError: an attribute has an impossible value.
    """

    momentum: ArrayLike = 0.0
    nesterov: bool = False
    power: float = 1.0
    length: str | float = "natural"
    weights: Weights | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        _checks.decay(self.momentum, "momentum")
        if self.power not in (0.5, 1.0):
            raise ValueError(f"power must be 1 or 0.5, got {self.power}.")
        if isinstance(self.length, str):
            _checks.one_of(self.length, "length", ("natural", "graft"))
        else:
            _checks.positive_scalar(self.length, "length")
        _checks.instance(self.weights, "weights", Weights | None)
        if self.limit is not None:
            _checks.positive_scalar(self.limit, "limit")
            if not isinstance(self.length, str):
                raise ValueError(
                    f"limit={self.limit} and a length that is a number exclude each other, got "
                    f"length={self.length}."
                )

    @property
    def is_newest(self) -> bool:
        """Whether the direction is ``F^-1 g`` for the newest gradient, up to a given RMS."""
        is_plain = self.power == 1 and self.weights is None and not self.is_scaled
        return not self.has_momentum and is_plain

    @property
    def has_momentum(self) -> bool:
        """Whether there is momentum; an array counts as such."""
        return isinstance(self.momentum, jax.Array) or self.momentum != 0

    @property
    def is_scaled(self) -> bool:
        """Whether the length follows from that of each window's direction."""
        return self.length == "graft" or self.limit is not None


@dataclass(frozen=True)
class UnitNorm(Weights):
    """Every gradient counts as if it had the same norm, so that no outlier owns the window.

    Example:
        >>> from mfac_jax.optimizer import Direction, UnitNorm, mfac_precondition
        >>> tx = mfac_precondition(16, direction=Direction(momentum=0.9, weights=UnitNorm()))
    """

    def __call__(self, held: Held) -> tuple[Array, Array]:
        is_held = held.norms > 0  # a zero gradient stays zero
        norms = jnp.where(is_held, held.norms, jnp.ones_like(held.norms))
        count = jnp.maximum(jnp.sum(is_held, dtype=norms.dtype), 1)
        # The geometric mean: one outlier hardly moves it.
        logs = jnp.where(is_held, jnp.log(norms), jnp.zeros_like(norms))
        relative = jnp.exp(jnp.sum(logs) / count) / norms
        return relative * relative, relative


@dataclass(frozen=True)
class ByAge(Weights):
    """Older gradients count less in the Fisher: ``w_j = decay^age``.

    Attributes:
        decay: in (0, 1].

    Raises:
        TypeError: ``decay`` is not a number.
        ValueError: ``decay`` is out of range.
    """

    decay: float

    def __post_init__(self) -> None:
        _checks.positive_scalar(self.decay, "decay")
        _checks.unit_interval(self.decay, "decay")

    def __call__(self, held: Held) -> tuple[Array, Array]:
        decay = jnp.asarray(self.decay, held.norms.dtype)
        return decay ** held.ages.astype(decay.dtype), jnp.ones_like(held.norms)


@dataclass(frozen=True)
class ByValue(Weights):
    """Gradients count in the right-hand side by the ``value`` that ``update`` received with them.

    With losses as values this is the improved empirical Fisher for mini-batches: a batch that the
    network already fits does not ask for the same decrease of the loss as the others. The weights
    are the values over the mean of their magnitudes.

    Reference: Wu et al., "An Improved Empirical Fisher Approximation for Natural Gradient
    Descent", NeurIPS 2024.
    """

    reads_values = True

    def __call__(self, held: Held) -> tuple[Array, Array]:
        values = jnp.where(held.is_held, held.values, jnp.zeros_like(held.values))
        mean = jnp.sum(jnp.abs(values)) / jnp.maximum(jnp.sum(held.is_held, dtype=values.dtype), 1)
        return jnp.ones_like(values), values / jnp.where(mean == 0, jnp.ones_like(mean), mean)


def right_hand_side(direction: Direction, stamps: Int[Array, " m"]) -> Float[Array, " m"]:
    """``a``: the weight of each gradient in the right-hand side; they add up to 1."""
    ages, is_held = _ages(stamps)
    newest = ((ages == 0) & is_held).astype(jnp.float32)
    if not direction.has_momentum:
        return newest
    beta = jnp.asarray(direction.momentum, jnp.float32)
    powers = jnp.where(is_held, beta ** ages.astype(jnp.float32), jnp.zeros_like(newest))
    mean = powers / jnp.maximum(jnp.sum(powers), jnp.finfo(jnp.float32).tiny)
    if direction.nesterov:
        mean = beta * mean + (1 - beta) * newest
    return mean


def system(
    direction: Direction,
    gram: Float[Array, "m m"],
    stamps: Int[Array, " m"],
    values: Float[Array, " m"] | None,
) -> System:
    """The system of one window, before its damping.

    Args:
        direction: what the direction is.
        gram: ``K``, zero in the rows and columns of empty slots.
        stamps: the order in which the slots were filled, -1 where a slot is empty.
        values: the values of the gradients held; None if no weights read them.
    """
    a = right_hand_side(direction, stamps).astype(gram.dtype)
    if direction.weights is None:
        return System(gram, a, jnp.ones_like(a))
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    values = jnp.full_like(norms, jnp.nan) if values is None else values
    weights = direction.weights(Held(norms, _ages(stamps)[0], values))
    # Empty slots may have any weight, and zero gradients do not count.
    in_fisher, in_vector = (
        jnp.where(norms > 0, jnp.asarray(w).astype(gram.dtype), 0) for w in weights
    )
    root = jnp.sqrt(jnp.maximum(in_fisher, _LEAST_WEIGHT * jnp.max(in_fisher)))
    a = a * in_vector / jnp.where(root > 0, root, 1)
    return System(gram * root[:, None] * root[None, :], a, root)


def solve(
    direction: Direction,
    system: System,
    lam: Float[Array, ""],
    denominator: Float[Array, ""],
) -> Solution:
    """The direction of one window before its length. O(m^3).

    Args:
        direction: what the direction is.
        system: the system of the window.
        lam: ``lambda``.
        denominator: ``n``, the divisor of the sum of outer products.
    """
    gram, a, root = system
    if direction.power == 1:
        factor = algebra.factor(gram, denominator * lam)
        c = denominator * algebra.shared_solve(factor, gram, denominator * lam, a)
    else:
        c = _inverse_root(gram / denominator, lam, a)
    if direction.length == "graft":
        c = c * (lam if direction.power == 1 else jnp.sqrt(lam))
    plain = jnp.maximum(jnp.dot(a, _image(gram, a), precision="highest"), 0)
    image = _image(gram, c)
    image = jnp.dot(image, image, precision="highest") / denominator
    return Solution(c * root, plain, image)


def lengths(
    direction: Direction,
    plain: Float[Array, " p"],
    squares: Float[Array, " p"],
    fisher: Float[Array, " p"],
) -> Float[Array, " p"]:
    """The factors that give the direction its length in each of p parts of the parameters.

    Args:
        direction: what the direction is.
        plain: ``|v|^2`` in the metric, for each part.
        squares: ``|u|^2`` in the metric, for each part.
        fisher: ``u^T F u``, for each part.
    """
    factors = jnp.ones_like(squares)
    if direction.length == "graft":
        got = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        factors = jnp.where(squares > 0, jnp.sqrt(plain) / got, 0)
    if direction.limit is not None:
        total = jnp.sum(factors**2 * fisher)
        most = jnp.square(jnp.asarray(direction.limit, total.dtype))
        # A sum that underflows is below every limit.
        is_long = total > most
        shorter = jnp.sqrt(most) * jax.lax.rsqrt(jnp.where(is_long, total, 1))
        factors = jnp.where(is_long, factors * shorter, factors)
    return factors


def _inverse_root(
    fisher: Float[Array, "m m"], lam: Float[Array, ""], a: Float[Array, " m"]
) -> Float[Array, " m"]:
    """``(lambda I + K / n)^-1/2 a``."""
    values, vectors = jnp.linalg.eigh(fisher)
    damped = lam + jnp.maximum(values, 0)
    is_positive = damped > 0  # it is not if all gradients of a block are zero
    root = jnp.where(is_positive, jax.lax.rsqrt(jnp.where(is_positive, damped, 1)), 0)
    inner = jnp.dot(a, vectors, precision="highest") * root
    return jnp.dot(vectors, inner, precision="highest")


def _image(gram: Float[Array, "m m"], c: Float[Array, " m"]) -> Float[Array, " m"]:
    """``G G^T c``."""
    return jnp.dot(gram, c, precision="highest")


def _ages(stamps: Int[Array, " m"]) -> tuple[Int[Array, " m"], Array]:
    """The age of each gradient, and which slots hold one."""
    is_held = stamps >= 0
    return jnp.where(is_held, jnp.max(stamps) - stamps, jnp.iinfo(jnp.int32).max), is_held
