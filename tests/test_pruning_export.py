"""Files of pruned networks, and JAX's sparse arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import pruning


@pytest.fixture
def pruned():
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(3, 3)), jnp.float16),
        "bias": jnp.ones(4),
    }
    mask = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape) > 0.5), params)
    mask["bias"] = jnp.asarray(True)
    return params, mask


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file_gives_back_what_went_in(pruned, suffix, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    params, mask = pruned
    pruning.save(tmp_path / f"net.{suffix}", params, mask)
    likes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    back, back_mask = pruning.load(tmp_path / f"net.{suffix}", likes)
    for got, want, alive, got_alive in zip(
        *map(jax.tree.leaves, (back, params, mask, back_mask)), strict=True
    ):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, np.where(alive, want, 0))
        np.testing.assert_array_equal(got_alive, np.broadcast_to(alive, want.shape))


def test_a_file_can_be_read_without_the_library(pruned, tmp_path):
    params, mask = pruned
    pruning.save(tmp_path / "net.npz", params, mask)
    with np.load(tmp_path / "net.npz") as file:
        assert set(file) == {
            "bias", "dense/kernel", "half", "mask/bias", "mask/dense/kernel", "mask/half",
        }  # fmt: skip


def test_sparse_arrays_compute_the_same(pruned):
    params, mask = pruned
    sparse = pruning.to_bcoo(params, mask)
    kernel = jnp.where(mask["dense"]["kernel"], params["dense"]["kernel"], 0.0)
    x = jnp.arange(6.0)
    assert sparse["dense"]["kernel"].nse == int(mask["dense"]["kernel"].sum())
    np.testing.assert_allclose(
        jax.jit(lambda a, x: x @ a)(sparse["dense"]["kernel"], x), x @ kernel
    )
    np.testing.assert_array_equal(
        sparse["half"].todense(), np.where(mask["half"], params["half"], 0)
    )
    assert isinstance(sparse["bias"], jax.Array)


def test_what_is_wrong_is_said(pruned, tmp_path):
    params, mask = pruned
    with pytest.raises(ValueError, match=r"\.npz or \.safetensors, got .*net\.bin"):
        pruning.save(tmp_path / "net.bin", params, mask)
    pruning.save(tmp_path / "net.npz", params, mask)
    with pytest.raises(ValueError, match="'more'"):
        pruning.load(tmp_path / "net.npz", {**params, "more": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"'bias' .*\(5,\).*\(4,\)"):
        pruning.load(tmp_path / "net.npz", {**params, "bias": jnp.ones(5)})


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_every_dtype_comes_back_exactly(tmp_path, suffix):
    params = {
        "file": jnp.asarray([1.0, 1 / 3, -2.0], jnp.bfloat16),
        "allow_pickle": jnp.asarray([[1 / 3]], jnp.float16),
    }
    mask = {"file": jnp.asarray([True, True, False]), "allow_pickle": jnp.ones((1, 1), bool)}
    pruning.save(tmp_path / f"a{suffix}", params, mask)
    got, got_mask = pruning.load(tmp_path / f"a{suffix}", params)
    assert got["file"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["file"], params["file"].at[2].set(0))
    np.testing.assert_array_equal(got["allow_pickle"], params["allow_pickle"])
    np.testing.assert_array_equal(got_mask["file"], mask["file"])


@pytest.mark.parametrize(
    "params",
    [
        {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}},
        {"w": jnp.ones(1), "mask": {"w": jnp.ones(1)}},
    ],
)
def test_names_that_collide_are_refused(tmp_path, params):
    with pytest.raises(ValueError, match="two arrays would have the name"):
        pruning.save(tmp_path / "a.npz", params, pruning.initial_mask(params))
    assert not (tmp_path / "a.npz").exists()


def test_a_scalar_is_not_made_sparse():
    assert float(pruning.to_bcoo(jnp.float32(2.0), jnp.asarray(False))) == 2.0
