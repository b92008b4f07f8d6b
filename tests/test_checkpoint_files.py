"""Files of weights are read without running code from them, and CIFAR-10 is found or asked for."""

import os
import pickle
import sys
import tarfile

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet20
from flax import nnx

# Flax promotes dtypes and ranks.
pytestmark = [pytest.mark.jax_defaults, pytest.mark.once]

ARRAYS = {
    "conv1.weight": np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3),
    "fc.bias": np.array([0.5, -1.0], np.float32),
}


class Hostile:
    """A pickle of it creates a folder when it is loaded by Python's own unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


def test_a_file_of_numpy_is_read(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **ARRAYS, **{"bn1.num_batches_tracked": np.int64(7)})
    assert_same(checkpoints.read(path), ARRAYS)


def test_a_common_prefix_is_removed_and_another_is_not(tmp_path):
    path = tmp_path / "weights.npz"
    prefixed = {f"module.{name}": x for name, x in ARRAYS.items()}
    np.savez(path, **prefixed)
    assert_same(checkpoints.read(path), ARRAYS)
    mixed = prefixed | {"other": ARRAYS["fc.bias"]}
    np.savez(path, **mixed)
    assert_same(checkpoints.read(path), mixed)


def test_a_file_that_is_not_there_says_where_checkpoints_are(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        checkpoints.read(tmp_path / "missing.npz")
    for part in (
        str(tmp_path / "missing.npz"),
        "github.com/IST-DASLab/M-FAC",
        "resnet20_cifar10.pth.tar",
        "github.com/akamaster/pytorch_resnet_cifar10",
        "resnet20-12fca82f.th",
    ):
        assert part in str(caught.value)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.touch()
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected a name in \.npz, \.pth"):
        checkpoints.read(path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_file_of_numpy_is_refused(tmp_path, kept):
    path = tmp_path / "weights.npz"
    np.savez(path, **ARRAYS)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"weights\.npz cannot be read: expected a whole file"):
        checkpoints.read(path)


def test_a_file_of_numpy_with_changed_bytes_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, weights=np.zeros(1000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.npz cannot be read.*CRC"):
        checkpoints.read(path)


def test_a_single_array_or_none_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        np.save(file, ARRAYS["fc.bias"])
    with pytest.raises(ValueError, match=r"a single array, as in a \.npy file"):
        checkpoints.read(path)
    np.savez(path)
    with pytest.raises(ValueError, match=r"weights\.npz has no arrays.*state_dict.*got nothing"):
        checkpoints.read(path)


@pytest.mark.parametrize("kind", ["pickle", "object array"])
def test_a_pickle_under_the_name_of_numpy_is_not_executed(tmp_path, kind):
    path, trace = tmp_path / "weights.npz", tmp_path / "executed"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(trace)))
    else:
        np.savez(path, weights=np.array([Hostile(trace)], dtype=object))
    with pytest.raises(ValueError, match=r"weights\.npz cannot be read.*pickle|Object arrays"):
        checkpoints.read(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.pth.tar", "weights.th", "weights.pt"])
def test_without_torch_its_files_ask_for_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch", None)
    path, trace = tmp_path / name, tmp_path / "executed"
    path.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(ImportError, match=rf"{name} is read by PyTorch.*pip install torch"):
        checkpoints.read(path)
    assert not trace.exists()


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_of_torch_is_read(tmp_path, key, is_zip):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.tensor(x) for name, x in ARRAYS.items()}
    tensors["module.fc.bias"] = torch.nn.Parameter(tensors["module.fc.bias"].double())
    tensors["module.conv1.weight"] = tensors["module.conv1.weight"].bfloat16()
    tensors["module.bn1.num_batches_tracked"] = torch.tensor(7)
    content = tensors | {"epoch": 3}
    if key is not None:
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}}
        content = {key: content, "epoch": 3, "best_prec1": 91.7, "optimizer": optimizer}
    path = tmp_path / "weights.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_same(checkpoints.read(path), ARRAYS)


@pytest.mark.parametrize("is_zip", [True, False])
def test_hostile_files_of_torch_are_not_executed(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    content = {"fc.bias": torch.ones(2), "other": Hostile(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read") as caught:
        checkpoints.read(path)
    assert not trace.exists()
    assert "mkdir" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file would have been able to


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_file_of_torch_is_refused(tmp_path, kept, is_zip):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.th"
    tensors = {name: torch.tensor(x) for name, x in ARRAYS.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"weights\.th cannot be read: expected a whole file"):
        checkpoints.read(path)


def test_files_of_torch_without_arrays_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pt"
    path.write_text("This is a page that says: file not found.")
    with pytest.raises(ValueError, match=r"weights\.pt cannot be read"):
        checkpoints.read(path)
    torch.save(torch.ones(2), path)
    with pytest.raises(ValueError, match="a Tensor instead of a dictionary"):
        checkpoints.read(path)
    torch.save({"epoch": 3, "optimizer": {}}, path)
    with pytest.raises(ValueError, match=r"weights\.pt has no arrays.*got epoch, optimizer"):
        checkpoints.read(path)


def pretrained(shortcut, head):
    """Random arrays under the names of a pretrained ResNet-20."""
    rng = np.random.default_rng(0)
    arrays = {}

    def conv(name, width_in, width, size):
        arrays[f"{name}.weight"] = rng.normal(size=(width, width_in, size, size))

    def norm(name, width):
        for field in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{name}.{field}"] = rng.random(width)

    conv("conv1", 3, 16, 3)
    norm("bn1", 16)
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            name, before = f"layer{stage}.{block}", width // 2 if stage > 1 and not block else width
            conv(f"{name}.conv1", before, width, 3)
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            if before != width and shortcut == "conv":
                conv(f"{name}.downsample.0", before, width, 1)
                norm(f"{name}.downsample.1", width)
    arrays[f"{head}.weight"], arrays[f"{head}.bias"] = rng.normal(size=(10, 64)), rng.random(10)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


@pytest.mark.parametrize(("shortcut", "head"), [("conv", "fc"), ("pad", "linear")])
def test_pretrained_weights_are_put_in_their_places(shortcut, head):
    arrays = pretrained(shortcut, head)
    model = resnet20.ResNet(nnx.Rngs(0), shortcut=shortcut)
    resnet20.load_weights(model, arrays)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in params) == sum(
        a.size for name, a in arrays.items() if "running" not in name
    )
    blocks = model.blocks.layers
    np.testing.assert_array_equal(
        np.transpose(blocks[4].conv2.kernel.get_value(), (3, 2, 0, 1)),
        arrays["layer2.1.conv2.weight"],
    )
    np.testing.assert_array_equal(
        blocks[8].norm2.var.get_value(), arrays["layer3.2.bn2.running_var"]
    )
    np.testing.assert_array_equal(model.norm.scale.get_value(), arrays["bn1.weight"])
    np.testing.assert_array_equal(model.dense.kernel.get_value().T, arrays[f"{head}.weight"])
    if shortcut == "conv":
        np.testing.assert_array_equal(
            blocks[6].norm3.var.get_value(), arrays["layer3.0.downsample.1.running_var"]
        )


def test_weights_of_another_architecture_change_nothing():
    model = resnet20.ResNet(nnx.Rngs(0), shortcut="pad")
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    arrays = pretrained("conv", "fc")
    del arrays["layer1.1.bn2.bias"]
    arrays["fc.weight"] = np.zeros((100, 64), np.float32)
    with pytest.raises(ValueError, match="another architecture") as caught:
        resnet20.load_weights(model, arrays)
    text = str(caught.value)
    assert "missing: layer1.1.bn2.bias;" in text
    assert "not known: layer2.0.downsample.0.weight, " in text
    assert "and 7 more" in text
    assert "of another shape: fc.weight (expected (10, 64), got (100, 64))" in text
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_each_kind_of_shortcut_refuses_the_weights_of_the_other():
    with pytest.raises(ValueError, match=r"missing: layer2.0.downsample.0.weight.* and 7 more"):
        resnet20.load_weights(resnet20.ResNet(nnx.Rngs(0)), pretrained("pad", "linear"))
    with pytest.raises(ValueError, match="expected shortcut conv or pad, got 'none'"):
        resnet20.ResNet(nnx.Rngs(0), shortcut="none")


def test_a_padded_shortcut_is_every_second_pixel_between_zeros():
    block = resnet20.Residual(4, 8, nnx.Rngs(0), "pad")
    block.norm2.scale.set_value(jnp.zeros(8))  # the shortcut alone
    block.eval()
    x = np.random.default_rng(0).random((2, 6, 6, 4), np.float32)  # positive, as behind a ReLU
    got = np.asarray(block(jnp.asarray(x)))
    assert got.shape == (2, 3, 3, 8)
    np.testing.assert_array_equal(got[..., 2:6], x[:, ::2, ::2])
    assert not got[..., :2].any()
    assert not got[..., 6:].any()
    assert not any("shortcut" in path for path, _ in nnx.to_flat_state(nnx.state(block)))


def test_colours_are_normalized_one_by_one():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    got = resnet20.normalize(images, (0.0, 0.2, 0.5), (1.0, 2.0, 0.25))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[[[0.0, 0.0, 2.0]]]], atol=1e-7)
    of_paper = resnet20.normalize(images, resnet20.MFAC_MEAN, resnet20.MFAC_STD)
    np.testing.assert_allclose(of_paper, [[[[-1.0, -0.6, 1.0]]]], rtol=1e-6)


def test_missing_data_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 in"):
        resnet20.load_cifar10(tmp_path)


def test_a_download_that_fails_is_said(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(resnet20, "CACHE", tmp_path / "cache" / "cifar.tar.gz")
    monkeypatch.setattr(resnet20.urllib.request, "urlretrieve", fail)
    with pytest.raises(OSError, match=r"no network.*--data-dir"):
        resnet20.load_cifar10(None)


def test_a_download_of_something_else_is_refused_and_removed(tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "cifar.tar.gz"
    monkeypatch.setattr(resnet20, "CACHE", cache)
    monkeypatch.setattr(
        resnet20.urllib.request, "urlretrieve", lambda _, path: path.write_text("a page")
    )
    with pytest.raises(OSError, match="is not the CIFAR-10 archive"):
        resnet20.load_cifar10(None)
    assert not list(cache.parent.iterdir())


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_batches_of_the_standard_archive_are_read(tmp_path, monkeypatch, kind):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({b"data": images, b"labels": [0, 1, 2, 3]}))
    data_dir = tmp_path
    if kind == "archive":
        data_dir, cache = None, tmp_path / "cifar.tar.gz"
        with tarfile.open(cache, "w:gz") as archive:
            archive.add(folder, folder.name)
        monkeypatch.setattr(resnet20, "CACHE", cache)
    data = resnet20.load_cifar10(data_dir)
    assert data.train.shape == (20, 32, 32, 3)
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    # A plane of 1,024 bytes a colour, rows first.
    assert data.test[1, 2, 3].tolist() == [images[1, c * 1024 + 2 * 32 + 3] for c in range(3)]
