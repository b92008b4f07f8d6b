"""MiniLM's files: what is put where, and what is refused."""

import sys

import jax
import minilm
import numpy as np
import pytest
from flax import nnx

pytestmark = [pytest.mark.jax_defaults, pytest.mark.once]


def small(layers=2):
    return minilm.MiniLM(nnx.Rngs(0), width=8, layers=layers, heads=2, vocabulary=50)


@pytest.fixture
def write(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")

    def write(layers=2, **more):
        rng = np.random.default_rng(1)
        places = minilm._places(small(layers))
        arrays = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in places.items()}
        arrays |= {"pooler.dense.bias": np.zeros(8, np.float32)} | more
        numpy.save_file(arrays, tmp_path / "model.safetensors")
        return arrays

    return write


def test_weights_are_put_in_the_order_of_flax(tmp_path, write):
    arrays, model = write(), small()
    minilm.load_weights(model, tmp_path)
    for name, variable in {
        "embeddings.word_embeddings.weight": model.words.embedding,
        "embeddings.token_type_embeddings.weight": model.segments.embedding,
        "encoder.layer.1.attention.output.LayerNorm.weight": model.layers[1].norm1.scale,
        "encoder.layer.0.output.dense.bias": model.layers[0].down.bias,
    }.items():
        np.testing.assert_array_equal(variable.get_value(), arrays[name])
    for name, variable in {
        "encoder.layer.1.attention.self.key.weight": model.layers[1].key.kernel,
        "encoder.layer.0.intermediate.dense.weight": model.layers[0].up.kernel,
    }.items():
        np.testing.assert_array_equal(variable.get_value().T, arrays[name])


@pytest.mark.parametrize(
    ("layers", "more", "words"),
    [
        (3, {}, r"not known: encoder\.layer\.2\..* and 13 more"),
        (1, {}, r"missing: encoder\.layer\.1\."),
        (
            2,
            {"embeddings.LayerNorm.bias": np.zeros(9, np.float32)},
            r"of another shape: embeddings.LayerNorm.bias \(expected \(8,\), got \(9,\)\)",
        ),
    ],
)
def test_weights_of_another_architecture_change_nothing(tmp_path, write, layers, more, words):
    write(layers, **more)
    model = small()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*another architecture; {words}"):
        minilm.load_weights(model, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


def test_a_damaged_file_is_said(tmp_path, write):
    write()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*a whole file"):
        minilm.load_weights(small(), tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install safetensors tokenizers"):
        minilm.load_weights(small(), tmp_path)
    with pytest.raises(ImportError, match="pip install safetensors tokenizers"):
        minilm.tokenize(["a"], tmp_path, 8)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("sentence\tlabel\na fine film\t1\nnot\t0\n", ["a fine film", "not"]),
        (
            "\ufeffQuality\t#1 ID\t#1 String\t#2 String\n1\t3\tone\tsame\n0\t5\ta\tb\n",
            [("one", "same"), ("a", "b")],
        ),
    ],
)
def test_tables_of_glue_are_read(tmp_path, text, sentences):
    (tmp_path / "dev.tsv").write_text(text)
    found, labels = minilm.read_glue(tmp_path, "dev")
    assert found == sentences
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "got"),
    [("", "no rows"), ("sentence\tlabel\n", "no rows"), ("index\tsentence\n1\ta\n", "sentence")],
)
def test_other_tables_are_refused(tmp_path, text, got):
    (tmp_path / "dev.tsv").write_text(text)
    with pytest.raises(ValueError, match=rf"dev\.tsv: expected the columns sentence.*got .*{got}"):
        minilm.read_glue(tmp_path, "dev")
