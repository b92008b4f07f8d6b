"""Which trees fit a layout, and what is said of those that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax._layout import AnyLayout, Layout

TREE = {"w": jnp.ones((2, 3)), "b": None, "s": jnp.ones(())}


def test_coordinates():
    layout = Layout(TREE)
    assert layout.size == 7
    assert layout.sizes == (1, 6)
    assert layout.shapes == ((), (2, 3))
    assert "w" in layout.describe()
    assert "float32[2, 3]" in layout.describe()
    assert repr(layout).startswith("Layout(d=7")


def test_shapes_without_arrays_will_do():
    assert Layout(jax.eval_shape(lambda: TREE)) == Layout(TREE)


def test_flatten_and_unflatten_are_inverse():
    layout = Layout(TREE)
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "b": None, "s": jnp.float32(9)}
    flat = layout.flatten(tree, jnp.dtype("float32"), "tree")
    np.testing.assert_array_equal(flat, [9, 0, 1, 2, 3, 4, 5])
    back = layout.unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_a_tree_without_leaves_has_no_coordinates():
    layout = Layout({"a": None})
    assert layout.size == 0
    assert layout.flatten({"a": None}, jnp.dtype("float32"), "tree").shape == (0,)
    assert layout.unflatten(jnp.zeros(0)) == {"a": None}


@pytest.mark.parametrize("leaf", [jnp.arange(3), np.arange(3), 1, True, jnp.ones(3, jnp.complex64)])
def test_leaves_that_are_not_real_are_refused(leaf):
    with pytest.raises(TypeError, match=r"params\['a'\] must be a real floating-point array"):
        Layout({"a": leaf})
    with pytest.raises(TypeError, match=r"gradient\['a'\] must be a real floating-point array"):
        Layout({"a": jnp.zeros(np.shape(leaf))}).check({"a": leaf}, "gradient")


def test_a_leaf_that_is_no_array_is_refused():
    with pytest.raises(TypeError, match=r"params\['a'\] must be an array, got str"):
        Layout({"a": "text"})


def test_another_structure_is_refused_and_both_are_shown():
    with pytest.raises(ValueError, match="structure") as error:
        Layout(TREE).check({"w": TREE["w"]}, "gradient")
    message = str(error.value)
    assert str(jax.tree.structure(TREE)) in message
    assert str(jax.tree.structure({"w": 0})) in message


def test_of_large_trees_only_the_leaves_that_differ_are_named():
    params = {f"layer{i}": {"kernel": 0.0, "bias": 0.0} for i in range(30)}
    layout = Layout(params)
    with pytest.raises(ValueError, match="structure") as error:
        layout.check(params | {"layer7": {"kernel": 0.0, "scale": 0.0}}, "gradient")
    assert str(error.value) == (
        "gradient does not have the structure of the parameters: "
        "missing: 1 (['layer7']['bias']); unexpected: 1 (['layer7']['scale'])."
    )
    with pytest.raises(ValueError, match=r"missing: 60 \(\['layer0'\].*, \.\.\.\); unex"):
        layout.check([0.5, 0.5], "gradient")
    with pytest.raises(ValueError, match=r"missing: 60 .*; unexpected: 1 \(no path\)"):
        layout.check(0.5, "gradient")


def test_the_same_size_in_another_shape_is_refused_and_both_are_shown():
    turned = TREE | {"w": TREE["w"].T}
    with pytest.raises(ValueError, match=r"gradient\['w'\].*expected \(2, 3\), got \(3, 2\)"):
        Layout(TREE).check(turned, "gradient")


def test_masks():
    layout = Layout(TREE)
    mask = {"w": np.array([[True, False, True]] * 2), "b": None, "s": True}
    scalar, matrix = layout.check_mask(mask)
    assert scalar.shape == ()
    np.testing.assert_array_equal(matrix, mask["w"])
    whole, _ = layout.check_mask(mask | {"w": jnp.bool_(True)})[::-1]
    assert whole.shape == (2, 3)
    with pytest.raises(TypeError, match=r"mask\['w'\] must be boolean, got float32"):
        layout.check_mask(TREE | {"s": True})
    with pytest.raises(ValueError, match=r"mask\['w'\].*expected \(2, 3\) or \(\), got \(3, 2\)"):
        layout.check_mask(mask | {"w": mask["w"].T})
    with pytest.raises(ValueError, match="mask does not have the structure"):
        layout.check_mask({"w": mask["w"]})
    np.testing.assert_array_equal(
        layout.flat_mask(mask), [True, True, False, True, True, False, True]
    )
    assert Layout({"a": None}).flat_mask({"a": None}).shape == (0,)


def test_equality_and_hash():
    layout = Layout(TREE)
    same = Layout(jax.tree.map(jnp.zeros_like, TREE))
    assert layout == same
    assert hash(layout) == hash(same)
    for other in (
        TREE | {"w": jnp.ones((3, 2))},
        TREE | {"w": jnp.ones((2, 3), jnp.bfloat16)},
        {"v": jnp.ones((2, 3)), "b": None, "s": jnp.ones(())},
    ):
        assert layout != Layout(other)
    assert layout != "layout"


def test_layouts_without_leaves_differ_from_others():
    empty = Layout(optax.MaskedNode())
    assert empty == Layout(optax.MaskedNode())
    assert empty != Layout(TREE)
    assert empty != Layout({"a": None})
    assert jax.tree.structure(empty) != jax.tree.structure(Layout(TREE))


def test_any_layout_is_a_prefix_of_every_layout():
    for layout in (Layout(TREE), Layout({})):
        pairs = jax.tree.map(lambda prefix, held: (prefix, held), [AnyLayout()], [layout])
        [(_, held)] = pairs
        assert held is layout


def test_flat_vectors_stand_for_trees():
    layout = Layout(TREE)
    flat = jnp.arange(7.0)
    assert layout.is_flat(flat)
    assert not layout.is_flat(flat[:6])
    assert not layout.is_flat(TREE)
    tree = layout.as_tree(flat, "vector")
    assert tree["w"].shape == (2, 3)
    np.testing.assert_array_equal(layout.like(tree, flat), flat)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)
    assert layout.like(tree, low)["w"].dtype == jnp.bfloat16
    # For parameters that are one vector, that vector is the tree.
    assert not Layout(flat).is_flat(flat)
    np.testing.assert_array_equal(Layout(flat).as_tree(flat, "vector"), flat)
    with pytest.raises(TypeError, match="vector must be a real floating-point array"):
        layout.as_tree(jnp.arange(7), "vector")
    with pytest.raises(ValueError, match="vector does not have the structure"):
        layout.as_tree(flat[:6], "vector")
