"""Weights of this package: one safetensors file with what a reader must know in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from smae_utils.atomic import new_file

WEIGHTS = "model.safetensors"


def save_weights(model: nn.Module, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Write the parameters of `model`; never leaves half a file.

    The file's metadata hold, as JSON, `grid` (patches along each axis), `norm_eps`, `encoder`
    (`encoder_arguments`), `decoder` (its `num_heads`, of an MAE) and `facts`.

    Args:
        facts: what the model was trained on: `channels` (names in order), `spacing_mm`, `window`,
            `normalisation`, and `seen` (the training cases, each as `hash_case` gives it).
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    header = {
        "grid": list(grid_of(model)),
        "norm_eps": norm_eps(model),
        "encoder": encoder_arguments(model),
        "decoder": {"num_heads": heads} if (heads := decoder_heads(model)) else {},
        "facts": facts or {},
    }
    with new_file(path) as part:
        save_file(tensors, part, metadata={key: json.dumps(value) for key, value in header.items()})


def grid_of(model: nn.Module) -> tuple[int, ...]:
    """Patches along each axis of a model's encoder; () without an encoder."""
    return tuple(getattr(getattr(model, "encoder", None), "grid", ()))


def encoder_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of `vit.ViTEncoder` that rebuild a model's encoder, without `norm_eps`; {} if it has none."""
    encoder = getattr(model, "encoder", None)
    if encoder is None or not grid_of(model):
        return {}
    block = encoder.blocks[0]
    return {
        "img_size": list(encoder.img_size),
        "patch_size": list(encoder.patch_size),
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "class_token": encoder.cls_token is not None,
    }


def decoder_heads(model: nn.Module) -> int | None:
    """Attention heads of an MAE's decoder; None for other models."""
    blocks = getattr(model, "decoder_blocks", None)
    return blocks[0].attn.num_heads if blocks else None


def norm_eps(model: nn.Module) -> float | None:
    """Epsilon of the layer norms of a model's encoder; None without an encoder."""
    encoder = getattr(model, "encoder", None)
    return next((m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)), None) if encoder else None
