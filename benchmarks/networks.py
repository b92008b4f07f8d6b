"""The shapes of the parameters of well-known networks, without arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shapes = dict[str, Any]


def _of(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _norm(width: int) -> Shapes:
    return {"scale": _of(width), "bias": _of(width)}


def _dense(inputs: int, outputs: int) -> Shapes:
    return {"kernel": _of(inputs, outputs), "bias": _of(outputs)}


def resnet20() -> Shapes:
    """ResNet-20 for CIFAR-10, with projections where the width changes."""
    params = {"stem": _of(3, 3, 3, 16), "norm": _norm(16), "head": _dense(64, 10)}
    before = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(3):
            layers = {f"conv{i}": _of(3, 3, (before, width)[i], width) for i in range(2)}
            layers |= {f"norm{i}": _norm(width) for i in range(2)}
            if before != width:
                layers |= {"projection": _of(1, 1, before, width), "norm": _norm(width)}
            params[f"block{stage}{block}"] = layers
            before = width
    return params


def resnet50() -> Shapes:
    """ResNet-50 for ImageNet."""
    params = {"stem": _of(7, 7, 3, 64), "norm": _norm(64), "head": _dense(2048, 1000)}
    before = 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(count):
            layers = {
                "conv0": _of(1, 1, before, width),
                "conv1": _of(3, 3, width, width),
                "conv2": _of(1, 1, width, 4 * width),
                **{f"norm{i}": _norm((width, width, 4 * width)[i]) for i in range(3)},
            }
            if block == 0:
                layers |= {"projection": _of(1, 1, before, 4 * width), "norm": _norm(4 * width)}
            params[f"block{stage}{block}"] = layers
            before = 4 * width
    return params


def _encoder(layers: int, width: int) -> Shapes:
    def layer() -> Shapes:
        attention = {name: _dense(width, width) for name in ("query", "key", "value", "out")}
        feed = {"up": _dense(width, 4 * width), "down": _dense(4 * width, width)}
        return attention | feed | {"norm0": _norm(width), "norm1": _norm(width)}

    return {f"layer{i}": layer() for i in range(layers)}


def vit_b() -> Shapes:
    """ViT-B/16 for ImageNet."""
    width = 768
    return _encoder(12, width) | {
        "patches": {"kernel": _of(16, 16, 3, width), "bias": _of(width)},
        "class": _of(1, 1, width),
        "positions": _of(1, 197, width),
        "norm": _norm(width),
        "head": _dense(width, 1000),
    }


def bert_base() -> Shapes:
    """BERT-base, uncased."""
    width = 768
    return _encoder(12, width) | {
        "words": _of(30522, width),
        "positions": _of(512, width),
        "types": _of(2, width),
        "norm": _norm(width),
        "pooler": _dense(width, width),
    }


def decoder() -> Shapes:
    """A decoder of 1.24 billion parameters: 16 layers, grouped queries, gated feed-forward."""
    width, hidden, keys, vocabulary = 2048, 8192, 512, 128256

    def layer() -> Shapes:
        return {
            "query": _of(width, width),
            "key": _of(width, keys),
            "value": _of(width, keys),
            "out": _of(width, width),
            "gate": _of(width, hidden),
            "up": _of(width, hidden),
            "down": _of(hidden, width),
            "norm0": _of(width),
            "norm1": _of(width),
        }

    layers = {f"layer{i}": layer() for i in range(16)}
    return layers | {"words": _of(vocabulary, width), "norm": _of(width)}


NETWORKS: dict[str, Callable[[], Shapes]] = {
    "ResNet-20": resnet20,
    "ResNet-50": resnet50,
    "ViT-B": vit_b,
    "BERT-base": bert_base,
    "decoder, 1.2 B": decoder,
}
