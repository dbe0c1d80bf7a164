"""AdamW as masked autoencoders are fine-tuned with it: what decays, which layer learns at which rate, and the
schedule of the rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from smae_utils.timm_library import CosineLRScheduler


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
    depth: int,
    layer_decay: float = 1.0,
    encoder_lr: float = 1.0,
) -> torch.optim.AdamW:
    """Groups of parameters with a decay and a share of the rate each, `lr_scale`, which timm's scheduler
    multiplies in. Biases, norms, tokens and positions are not decayed.

    (timm's `param_groups_layer_decay` gives the same groups but for the encoder's own share of the rate.)

    Args:
        lr: of the parameters behind the encoder.
        depth: blocks of the encoder.
        layer_decay: factor of the rate from one layer to the one before it, see `layer_of`.
        encoder_lr: factor of the whole encoder's rate, on top of layer decay.
    """
    groups: dict[tuple[int, bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(("pos_embed", "cls_token", "mask_token"))
        layer = layer_of(name, depth) if layer_decay != 1 else depth + 1
        slow = encoder_lr != 1 and name.startswith("encoder.")
        scale = layer_decay ** (depth + 1 - layer) * (encoder_lr if slow else 1)
        group = groups.setdefault(
            (layer, plain, slow),
            {"params": [], "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=lr, betas=(betas[0], betas[1]), fused=True)


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter for layer decay: 0 embeddings, 1 .. depth blocks, depth + 1 all else (as in BEiT
    and MAE).
    """
    if name.startswith(("encoder.patch_embed", "encoder.pos_embed", "encoder.cls_token")):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> CosineLRScheduler:
    """Learning rates of steps 1 .. `steps`: up on a line for `warmup` steps, then down as half a cosine,
    which would reach 0 one step after the last.
    """
    return CosineLRScheduler(
        optimizer, t_initial=steps - warmup + 1, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
