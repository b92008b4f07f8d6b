"""What may be pruned in the trees of the usual libraries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mfac_jax import pruning


def selected(params, path_filter=None):
    flags = pruning.prunable(params, path_filter)
    assert jax.tree.structure(flags) == jax.tree.structure(params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(flags)
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, flag in leaves if flag]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 4)(x)
        x = nn.LayerNorm()(nn.Dense(3)(x))
        return nn.BatchNorm(use_running_average=False)(x)


def test_flax_linen():
    variables = LinenNet().init(jax.random.key(0), jnp.zeros(2, int))
    assert selected(variables) == ["params/Dense_0/kernel", "params/Embed_0/embedding"]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])


def test_flax_nnx():
    state = nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)
    assert selected(state) == ["conv/kernel/value", "layers/0/kernel/value"]


class Module:
    """A module whose parameters are attributes, as in Equinox."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


jax.tree_util.register_pytree_with_keys(
    Module,
    lambda m: ([(jax.tree_util.GetAttrKey(k), getattr(m, k)) for k in ("weight", "bias")], None),
    lambda _, children: Module(*children),
)


def test_attributes_and_biases_with_several_axes():
    params = {"layers": [Module(jnp.zeros((3, 2, 3, 3)), jnp.zeros((3, 1, 1)))]}
    assert selected(params) == ["layers/0/weight"]


def test_names_in_dictionaries():
    shapes = {
        "w1": (3, 2),
        "b1": (2, 1),
        "gamma": (2, 1),
        "ln_f": {"weight": (2, 1)},
        "layer_norm": {"w": (2, 2)},
        "InstanceNorm2d": {"w": (2, 2)},
        "prenorm_tower": {"dense": {"kernel": (2, 2)}},
        "normal": (2, 2),
        "rel_bias_table": (4, 4),
        "vector": (4,),
        "nothing": None,
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    assert selected(params) == ["normal", "prenorm_tower/dense/kernel", "w1"]


def test_filters_given():
    params = {"a": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, "head": {"w": jnp.zeros((2, 2))}}
    assert selected(params, r"^a/") == ["a/b", "a/w"]
    assert selected(params, lambda path, leaf: leaf.ndim == 2 and "head" not in path) == ["a/w"]
    assert selected(jnp.zeros((2, 2))) == [""]


@pytest.mark.parametrize(
    ("params", "path_filter", "error", "message"),
    [
        ({"b": jnp.zeros(2)}, None, ValueError, r"path_filter must select at least one.*\['b'\]"),
        ({"w": jnp.zeros((2, 2))}, "x", ValueError, r"path_filter must select .*'x'"),
        ({"w": jnp.zeros((2, 2))}, "(", ValueError, r"path_filter must be a regular expression"),
        ({"w": jnp.zeros((2, 2))}, lambda p, _: 1, TypeError, r"path_filter must return a bool"),
        ({"w": jnp.zeros((2, 2))}, 3, TypeError, r"path_filter"),
        ({"w": jnp.zeros((2, 2), int)}, None, TypeError, r"params\['w'\] must be a real"),
    ],
)
def test_bad_filters(params, path_filter, error, message):
    with pytest.raises(error, match=message):
        pruning.prunable(params, path_filter)
