"""Other people's checkpoints: how their files are read safely, and their names and shapes turned into this package's.

Known: the authors' SelfMedMAE (MAE and UNETR), facebookresearch/mae (pre-training and fine-tuning), timm ViTs, MONAI's
MaskedAutoEncoderViT, ViT and UNETR.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smae_utils.errors import UserError

PICKLED = (".pth", ".pt", ".tar", ".bin", ".ckpt")

# SelfMedMAE, facebookresearch/mae and timm, whose blocks have this package's names.
NAMES = [
    (r"^encoder_pos_embed$", "encoder.pos_embed"),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^decoder\.blocks\.", "decoder_blocks."),
    (r"^decoder\.norm\.", "decoder_norm."),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^decoder\.encoder1\.", "image_skip."),
    (r"^decoder\.encoder(\d)\.", lambda m: f"skips.{int(m[1]) - 2}."),
    (r"^decoder\.decoder(\d)\.", lambda m: f"ups.{5 - int(m[1])}."),
    (r"^decoder\.out\.", "out."),
    # What this encoder lacks (a norm before the blocks, registers, a distillation token, rotary positions) is named too, so as to be refused.
    (r"^(patch_embed|blocks|norm|norm_pre|rope)\.", r"encoder.\1."),
    (r"^(cls_token|pos_embed|reg_token|dist_token)$", r"encoder.\1"),
]
# MONAI: the same blocks under other names; its MAE keeps the last norm as one more block.
MONAI_NAMES = [
    (r"^(?:vit\.)?patch_embedding\.patch_embeddings\.(?:1\.)?", "encoder.patch_embed.proj."),
    (r"^(?:vit\.)?patch_embedding\.position_embeddings$", "encoder.pos_embed"),
    (r"^(?:vit\.)?cls_token$", "encoder.cls_token"),
    (r"^blocks\.(\d+)\.(weight|bias)$", r"encoder.norm.\2"),
    (r"^decoder_blocks\.(\d+)\.(weight|bias)$", r"decoder_norm.\2"),
    (r"^(?:vit\.)?(blocks|norm)\.", r"encoder.\1."),
    (r"^mask_tokens$", "mask_token"),
    (r"^decoder_pos_embedding$", "decoder_pos_embed"),
    (r"^classification_head\.", "head."),
    (r"^encoder1\.", "image_skip."),
    (r"^encoder(\d)\.", lambda m: f"skips.{int(m[1]) - 2}."),
    (r"^decoder(\d)\.", lambda m: f"ups.{5 - int(m[1])}."),
]
MONAI_BLOCK = {".mlp.linear1.": ".mlp.fc1.", ".mlp.linear2.": ".mlp.fc2.", ".attn.out_proj.": ".attn.proj."}


TIMM = "timm:"
MONAI_EPS, OTHERS_EPS = 1e-5, 1e-6


class Checkpoint(NamedTuple):
    """A checkpoint in this package's terms.

    Attributes:
        tensors: by this package's names.
        grid: of the patches; None where the file does not say it.
        norm_eps: epsilon of the layer norms it was trained with; None where neither the file nor its maker's habit says it.
    """

    tensors: dict[str, Tensor]
    grid: tuple[int, ...] | None
    norm_eps: float | None


def read_timm(name: str) -> Checkpoint:
    """Weights of a timm model that timm itself keeps or downloads; only ever on the user's own word, `--init timm:NAME`."""
    from smae_utils.timm_glue import pretrained_tensors

    return to_own(pretrained_tensors(name))


def read_file(file: Path) -> Checkpoint:
    """A checkpoint of this package, or of one of the sources named above.

    Raises:
        UserError: for a damaged file, or a pickle that holds more than tensors and plain values; such a file is never executed.
    """
    if file.name.lower().endswith(PICKLED):
        return to_own(_read_pickle(file))
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            facts = handle.metadata() or {}
            grid, norm_eps = tuple(json.loads(facts.get("grid", "[]"))), json.loads(facts.get("norm_eps", "null"))
            own = "grid" in facts  # this package writes it, and its names and its table are its own
    except (SafetensorError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:160]
        raise UserError(f"{file} is no whole safetensors file ({line}): save the weights again or copy them again") from None
    return Checkpoint(tensors, grid or None, norm_eps) if own else to_own(tensors)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # facebookresearch/mae stores its command line beside the weights; a namespace of plain values can do nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it wants to run {wanted[1]}" if wanted else "it is no checkpoint of tensors, or damaged"
        raise UserError(f"{file} was not loaded: {what}. Only tensors and plain values are read; ask its maker for safetensors") from None
    except Exception as error:  # whatever a damaged file makes torch's reader stumble over; it executes nothing
        line = " ".join(str(error).split())[:160]
        raise UserError(f"{file} is no whole PyTorch checkpoint ({line}): copy or download it again") from None
    for key in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(k).removeprefix("module."): v for k, v in content.items() if torch.is_tensor(v)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{file} holds no tensors by name: expected a state dict, or one under 'state_dict' or 'model'")
    return tensors


def to_own(tensors: dict[str, Tensor]) -> Checkpoint:
    """Names of whichever known source -> this package's names; a class token's position becomes part of the token."""
    if any("patch_embedding." in name for name in tensors):
        return Checkpoint(_from_monai(tensors), None, MONAI_EPS)
    out = {}
    for name, value in tensors.items():
        out[_renamed(name, NAMES)] = value
    return Checkpoint(_fold_class_position(out), None, OTHERS_EPS)


def _renamed(name: str, table: list) -> str:
    for pattern, new in table:
        name, count = re.subn(pattern, new, name)
        if count:
            break
    return name


def _from_monai(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in tensors.items():
        if "cross_attn" in name:  # older MONAI stores a branch that is never used
            continue
        for theirs, ours in MONAI_BLOCK.items():
            name = name.replace(theirs, ours)
        out[_renamed(name, MONAI_NAMES)] = value
    for name in [n for n in out if n.endswith(".attn.qkv.weight")]:  # no bias is a bias of zero
        out.setdefault(name.removesuffix("weight") + "bias", out[name].new_zeros(len(out[name])))
    return out


def _fold_class_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Others give the class token a row of the position table: add that row to the token, which is the same sum.

    The decoder's class row is fixed at zero in facebookresearch/mae, so it is dropped.
    """
    patch = tensors.get("encoder.patch_embed.proj.weight")
    if "encoder.cls_token" not in tensors or patch is None:
        return tensors
    for table in ("encoder.pos_embed", "decoder_pos_embed"):
        positions = tensors.get(table)
        if positions is None or not _has_class_row(positions.shape[1], patch.ndim - 2):
            continue
        if table == "encoder.pos_embed":
            tensors["encoder.cls_token"] = tensors["encoder.cls_token"] + positions[:, :1]
        elif positions[:, 0].any():
            raise UserError("this MAE decoder has a position for the class token that is not zero: it cannot be represented here")
        tensors[table] = positions[:, 1:]
    return tensors


def _has_class_row(length: int, ndim: int) -> bool:
    """Whether a table is a square or cubic grid plus one."""
    return round((length - 1) ** (1 / ndim)) ** ndim == length - 1


def as_convolution(weight: Tensor, shape: torch.Size) -> Tensor:
    """A patch embedding stored as a matrix (D, p^d * C), channel last, as the convolution (D, C, *p) it is."""
    if weight.ndim == 2 and prod(shape[1:]) == weight.shape[1] and len(shape) > 2:
        return weight.reshape(len(weight), *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    return weight


def adapt_patches(weight: Tensor, shape: torch.Size) -> Tensor:
    """A patch embedding (D, C, p, p[, p]) for other channels or one more dimension.

    Channels as timm does it: summed for one, else repeated and scaled by C / n. From 2D to 3D as in I3D (Carreira and
    Zisserman, arXiv 1705.07750): repeated along the new last axis and divided by its length, so that a stack of equal
    slices gives the response of one.
    """
    chans, wanted = weight.shape[1], shape[1]
    if chans != wanted:
        repeated = weight.repeat(1, -(-wanted // chans), *[1] * (weight.ndim - 2))[:, :wanted] * (chans / wanted)
        weight = weight.sum(1, keepdim=True) if wanted == 1 else repeated
    if weight.ndim == len(shape) - 1:
        weight = weight.unsqueeze(-1).repeat(*[1] * weight.ndim, shape[-1]) / shape[-1]
    return weight


def adapt_positions(positions: Tensor, grid: tuple[int, ...], new: tuple[int, ...], resize) -> Tensor:
    """A 2D table (1, L, D) on a 3D grid: resized in plane and repeated along the new last axis."""
    plane = resize(positions, grid, new[:2])
    return plane.unflatten(1, new[:2]).unsqueeze(3).repeat(1, 1, 1, new[2], 1).flatten(1, 3)
