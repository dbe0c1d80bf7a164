"""Other people's checkpoints: read safely, and turned into this package's names and shapes.

Known: the authors' SelfMedMAE (MAE and UNETR), facebookresearch/mae (pre-training and fine-tuning), timm
ViTs, MONAI's MaskedAutoEncoderViT, ViT and UNETR, and transformers' ViT and ViTMAE (the names of its files
and those in memory since version 5); each also inside other modules and dictionaries, see `WRAPPERS`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smae_utils.errors import UserError

PICKLED = (".pth", ".pt", ".tar", ".bin", ".ckpt")
PATCHES = "encoder.patch_embed.proj.weight"
TABLES = ("encoder.pos_embed", "decoder_pos_embed")

# Words that may stand before the names, in any nesting: of modules around the network, of dictionaries.
WRAPPERS = {
    *(
        "model",
        "module",
        "net",
        "network",
        "backbone",
        "encoder",
        "vit",
        "deit",
        "visual",
        "trunk",
        "base_model",
    ),
    *("mae", "image_encoder", "student", "teacher", "online", "target", "params", "weights"),
    *("state_dict", "model_state_dict", "model_state", "state"),
}
# What torch itself puts into names, also in their middle: compiled, data-parallel and sharded parts.
INSERTED = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Dictionaries of a checkpoint that are no network, or a second, averaged copy of it.
NO_NETWORK = re.compile(
    r"optim|sched|scaler|callback|loop|rng|args|hyper|config|(^|_)(ema|amp)($|_)", re.IGNORECASE
)

OWN_NAMES = [
    (r"^(decoder_(?:embed|blocks|norm|pred)|fc_norm|head|image_skip|skips|ups|out)\.", r"\1."),
    (r"^(mask_token|decoder_pos_embed)$", r"\1"),
]
# SelfMedMAE, facebookresearch/mae and timm, whose blocks have this package's names.
NAMES = [
    (r"^encoder_pos_embed$", "encoder.pos_embed"),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^decoder\.(blocks|norm)\.", r"decoder_\1."),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^decoder\.encoder1\.", "image_skip."),
    (r"^decoder\.encoder(\d)\.", lambda m: f"skips.{int(m[1]) - 2}."),
    (r"^decoder\.decoder(\d)\.", lambda m: f"ups.{5 - int(m[1])}."),
    (r"^decoder\.out\.", "out."),
    # What this encoder lacks (a norm before the blocks, registers, ...) is named too, so as to be refused.
    (r"^(patch_embed|blocks|norm|norm_pre|rope)\.", r"encoder.\1."),
    (r"^(cls_token|pos_embed|reg_token|dist_token)$", r"encoder.\1"),
    *OWN_NAMES,
]
# MONAI: the same blocks under other names; its MAE keeps the last norm as one more block.
MONAI_NAMES = [
    (r"^patch_embedding\.patch_embeddings\.(?:1\.)?", "encoder.patch_embed.proj."),
    (r"^patch_embedding\.position_embeddings$", "encoder.pos_embed"),
    (r"^cls_token$", "encoder.cls_token"),
    (r"^blocks\.(\d+)\.(weight|bias)$", r"encoder.norm.\2"),
    (r"^decoder_blocks\.(\d+)\.(weight|bias)$", r"decoder_norm.\2"),
    (r"^(blocks|norm)\.", r"encoder.\1."),
    (r"^mask_tokens$", "mask_token"),
    (r"^decoder_pos_embedding$", "decoder_pos_embed"),
    (r"^classification_head\.", "head."),
    (r"^encoder1\.", "image_skip."),
    (r"^encoder(\d)\.", lambda m: f"skips.{int(m[1]) - 2}."),
    (r"^decoder(\d)\.", lambda m: f"ups.{5 - int(m[1])}."),
    *OWN_NAMES,
]
MONAI_BLOCK = {".mlp.linear1.": ".mlp.fc1.", ".mlp.linear2.": ".mlp.fc2.", ".attn.out_proj.": ".attn.proj."}
# transformers: `layer` and `attention.attention.query` in files; since version 5 `layers` and
# `attention.q_proj` in memory. Its 5.24 writes the decoder's layers as `decoder_encoder.layer`.
TRANSFORMERS_NAMES = [
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embed"),
    (r"^embeddings\.cls_token$", "encoder.cls_token"),
    (r"^embeddings\.distillation_token$", "encoder.dist_token"),
    (r"^embeddings\.register_tokens$", "encoder.reg_token"),
    (r"^layers?\.(\d+)\.", r"encoder.blocks.\1."),
    (r"^layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_(?:encoder\.)?layers?\.", "decoder_blocks."),
    (r"^decoder\.(decoder_\w+|mask_token)", r"\1"),
    (r"^classifier\.", "head."),
]
# In this order: the third name is a part of the first.
TRANSFORMERS_BLOCK = {
    ".attention.output.dense.": ".attn.proj.",
    ".attention.attention.": ".attn.",
    ".output.dense.": ".mlp.fc2.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".attention.o_proj.": ".attn.proj.",
    ".attention.": ".attn.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
}
QUERY_KEY_VALUE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))

# What this package writes beside the tensors, each as JSON.
HEADER = ("grid", "norm_eps", "encoder", "decoder", "facts")
TIMM = "timm:"
MONAI_EPS, TRANSFORMERS_EPS, OTHERS_EPS = 1e-5, 1e-12, 1e-6


class Checkpoint(NamedTuple):
    """A checkpoint in this package's terms.

    Attributes:
        tensors: by this package's names, floating-point ones in fp32.
        grid: of the patches; None where the file does not say it.
        norm_eps: epsilon of its layer norms; None where neither the file nor its maker's habit says it.
        class_row: whether position tables begin with a row for the class token; None if unknown.
        encoder: arguments of its encoder; empty in files of others.
        decoder: `num_heads` of its MAE decoder; empty in files of others.
        facts: of its training (channels, spacing_mm, ...); empty in files of others.
    """

    tensors: dict[str, Tensor]
    grid: tuple[int, ...] | None
    norm_eps: float | None
    class_row: bool | None
    encoder: Mapping[str, Any] = MappingProxyType({})
    decoder: Mapping[str, Any] = MappingProxyType({})
    facts: Mapping[str, Any] = MappingProxyType({})


def read_timm(name: str) -> Checkpoint:
    """Weights of a timm model, kept or downloaded by timm; only when the user says `--init timm:NAME`."""
    from smae_utils.timm_library import pretrained_tensors

    return convert(pretrained_tensors(name), f"{TIMM}{name}")


def read_file(file: Path) -> Checkpoint:
    """A checkpoint of this package, or of one of the sources named above.

    Raises:
        UserError: for a damaged file, one that holds two different encoders, or a pickle that holds more than
            tensors and plain values; such a file is never executed.
    """
    if file.name.lower().endswith(PICKLED):
        return convert(_read_pickle(file), str(file))
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None
    header = read_header(file)
    if "grid" not in header:
        return convert(tensors, str(file))
    # This package wrote it: its names and its table are its own.
    told = {key: header.get(key) or {} for key in ("encoder", "decoder", "facts")}
    return Checkpoint(
        _as_fp32(tensors), tuple(header["grid"]) or None, header.get("norm_eps"), class_row=False, **told
    )


def read_header(file: Path) -> dict[str, Any]:
    """What this package wrote beside the tensors (see `HEADER`); {} for files of others.

    Raises:
        UserError: for a damaged file.
    """
    if file.name.lower().endswith(PICKLED):
        return {}
    try:
        with safe_open(file, framework="pt") as handle:
            header = handle.metadata() or {}
        if "grid" not in header:
            return {}
        return {key: json.loads(header[key]) for key in HEADER if key in header}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    line = " ".join(str(error).split())[:160]
    return UserError(
        f"{file} is no whole safetensors file ({line}): save the weights again or copy them again"
    )


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # facebookresearch/mae stores its command line beside the weights; such a namespace is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it wants to run {wanted[1]}" if wanted else "it is no checkpoint of tensors, or damaged"
        advice = "Only tensors and plain values are read; ask its maker for safetensors"
        raise UserError(f"{file} was not loaded: {what}. {advice}") from None
    # Whatever a damaged file makes torch's reader stumble over; it executes nothing.
    except Exception as error:
        line = " ".join(str(error).split())[:160]
        raise UserError(
            f"{file} is no whole PyTorch checkpoint ({line}): copy or download it again"
        ) from None
    tensors = dict(_walk(content, ""))
    if not tensors:
        expected = "a state dict, or one under 'state_dict' or 'model'"
        raise UserError(f"{file} holds no tensors by name: expected {expected}")
    return tensors


def _walk(content: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """All named tensors of nested dictionaries; the levels of dictionaries are set apart by a slash."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if torch.is_tensor(value):
            yield f"{path}{key}", value
        elif isinstance(value, dict) and not NO_NETWORK.search(str(key)):
            yield from _walk(value, f"{path}{key}/")


def convert(tensors: dict[str, Tensor], source: str) -> Checkpoint:
    """Names of any known source -> this package's names.

    Position tables stay as they are, see `adapt.fold_class_rows`.

    Raises:
        UserError: if two different tensors get one name, as a student's and a teacher's do.
    """
    if any("patch_embedding." in name for name in tensors):
        # MONAI's blocks carry a cross-attention that its ViT does not use.
        used = {name: value for name, value in tensors.items() if "cross_attn" not in name}
        return Checkpoint(_renamed(used, MONAI_BLOCK, MONAI_NAMES, source), None, MONAI_EPS, False)
    if any("layernorm_before." in name for name in tensors):
        out = _joined_qkv(_renamed(tensors, TRANSFORMERS_BLOCK, TRANSFORMERS_NAMES, source))
        return Checkpoint(out, None, TRANSFORMERS_EPS, True)
    return Checkpoint(_renamed(tensors, {}, NAMES, source), None, OTHERS_EPS, None)


def _as_fp32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _renamed(
    tensors: dict[str, Tensor], block: dict[str, str], table: list, source: str
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for theirs, value in _as_fp32(tensors).items():
        name = theirs
        for old, new in block.items():
            name = name.replace(old, new)
        name = _own_name(name, table)
        if name in out and not torch.equal(out[name], value):
            both = f"{origin[name]} and {theirs} would both be {name}"
            raise UserError(
                f"{source} holds two encoders or heads: {both}. Save one of the two in a file of its own"
            )
        out[name], origin[name] = value, theirs
    return out


def _own_name(name: str, table: list) -> str:
    """The name in this package, found behind any number of wrapper words; one that no table knows stays."""
    levels = [[part for part in level.split(".") if part not in INSERTED] for level in name.split("/")]
    parts = [part for level in levels for part in level]
    for start, part in enumerate(parts):
        for pattern, new in table:
            renamed, count = re.subn(pattern, new, ".".join(parts[start:]))
            if count:
                return renamed
        if part not in WRAPPERS:
            break
    *outer, last = levels
    return ".".join([*(part for level in outer for part in level if part not in WRAPPERS), *last])


def _joined_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate maps (D, D) for query, key and value -> one of (3D, D), as timm has it."""
    out = dict(tensors)
    for first, *others in QUERY_KEY_VALUE:
        for name in [n for n in out if f".attn.{first}." in n]:
            names = [name, *(name.replace(f".attn.{first}.", f".attn.{other}.") for other in others)]
            if all(n in out for n in names):
                out[name.replace(f".attn.{first}.", ".attn.qkv.")] = torch.cat([out.pop(n) for n in names])
    return out
