"""A run's weights for other libraries: same outputs there, or a refusal.

The refusal says which settings would have fitted.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smae_utils.atomic import must_be_free, new_folder, write_text
from smae_utils.data.tasks import Task
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.other_libraries import MONAI_BLOCK
from smae_utils.work.rebuild import load_finetuned, load_pretrained
from smae_utils.work.run_folder import Run
from smae_utils.work.settings import FinetuneSettings, Settings, StageSettings

TARGETS = ("timm", "monai-vit", "monai-unetr")


def export(run_dir: str | Path, to: str, out: str | Path) -> Path:
    """Write `model.safetensors` and `arguments.json` (what to construct there) into a new folder.

    Args:
        to: "timm" (VisionTransformer), "monai-vit" or "monai-unetr". From pre-training, the encoder alone.

    Raises:
        UserError: where the target cannot hold the model, with the settings that it could.
    """
    if to not in TARGETS:
        raise UserError(f"unknown target {to!r}: expected one of {', '.join(TARGETS)}")
    run = Run.open(run_dir)
    run.need_finished()
    out = Path(out)
    must_be_free(out)
    model, task, settings = (load_finetuned if run.config["stage"] == "finetune" else load_pretrained)(run)
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    make = {"timm": _timm, "monai-vit": _monai_vit, "monai-unetr": _monai_unetr}[to]
    converted, arguments = make(tensors, task, settings)
    converted = _complete(converted, arguments)
    with new_folder(out) as part:
        save_file(
            {k: v.contiguous() for k, v in converted.items()},
            part / "model.safetensors",
            metadata={"format": "pt"},
        )
        write_text(part / "arguments.json", json.dumps(arguments, indent=1))
    return out


def construct(arguments: dict[str, Any]) -> torch.nn.Module:
    """The model that `arguments.json` describes, in the library it is for."""
    from smae_utils import timm_library  # noqa: F401 (makes timm importable beside a CPU-only torch)

    values = dict(arguments)
    module, name = values.pop("constructor").rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**values)


def _complete(converted: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Exactly the tensors that the installed target has.

    MONAI's blocks carry norms of a cross-attention that is not used.
    """
    model = construct(arguments)
    unused = {name: value for name, value in model.state_dict().items() if "cross_attn" in name}
    model.load_state_dict({**unused, **converted})
    return {**unused, **converted}


def _need(to: str, settings: Settings, wanted: dict[str, Any]) -> None:
    """Refuse unless the run's settings are those that the target can hold."""
    wrong = {k: v for k, v in wanted.items() if getattr(settings, k, v) != v}
    if wrong:
        has = ", ".join(f"{k}={getattr(settings, k)}" for k in wrong)
        fits = " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in wanted.items())
        raise UserError(f"{to} cannot hold this model (it has {has}): train with --set {fits}")


def _encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")}


def _shape(task: Task, settings: Settings) -> dict[str, Any]:
    return {"img_size": list(settings.crop_size), "patch_size": settings.patch_size}


def _timm(
    tensors: dict[str, Tensor], task: Task, settings: StageSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if task.spatial_dims != 2:
        raise UserError("timm's VisionTransformer is 2D, this run is 3D: use --to monai-vit or monai-unetr")
    tuned = isinstance(settings, FinetuneSettings)
    _need("timm", settings, {"norm_eps": 1e-6, **({"network": "vit"} if tuned else {})})
    out = _encoder(tensors)
    # There the class token has a row of the position table; ours is part of the token.
    if settings.class_token:
        out["pos_embed"] = torch.cat([torch.zeros_like(out["pos_embed"][:, :1]), out["pos_embed"]], 1)
    mean = isinstance(settings, FinetuneSettings) and settings.pool == "mean"
    out |= {k: v for k, v in tensors.items() if k.startswith(("head.", "fc_norm."))}
    arguments = {
        "constructor": "timm.models.vision_transformer.VisionTransformer",
        **_shape(task, settings),
        "in_chans": task.in_chans,
        "num_classes": len(task.classes) if tuned else 0,
        "embed_dim": settings.embed_dim,
        "depth": settings.depth,
        "num_heads": settings.num_heads,
        "class_token": settings.class_token,
        "global_pool": "avg" if mean else "token" if settings.class_token else "",
        "fc_norm": mean,
    }
    return out, arguments


def _monai_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in _encoder(tensors).items():
        for theirs, ours in MONAI_BLOCK.items():
            name = name.replace(ours, theirs)
        name = name.replace("patch_embed.proj.", "patch_embedding.patch_embeddings.").replace(
            "pos_embed", "patch_embedding.position_embeddings"
        )
        out[name] = value
    return out


def _monai_arguments(task: Task, settings: Settings) -> dict[str, Any]:
    return {
        "in_channels": task.in_chans,
        "img_size": list(settings.crop_size),
        "hidden_size": settings.embed_dim,
        "mlp_dim": 4 * settings.embed_dim,
        "num_heads": settings.num_heads,
        "proj_type": "conv",
        "spatial_dims": task.spatial_dims,
        "qkv_bias": True,
    }


def _monai_vit(
    tensors: dict[str, Tensor], task: Task, settings: StageSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tuned = isinstance(settings, FinetuneSettings)
    classifier = tuned and task.kind == "classification"
    if tuned and not classifier:
        raise UserError("this run is a UNETR: use --to monai-unetr, or export its pre-training run")
    wanted = {"norm_eps": 1e-5, "class_token": classifier}
    _need("monai-vit", settings, {**wanted, "pool": "cls", "network": "vit"} if classifier else wanted)
    out = _monai_encoder(tensors)
    if classifier:
        out |= {
            f"classification_head.{k.removeprefix('head.')}": v
            for k, v in tensors.items()
            if k.startswith("head.")
        }
    arguments = {
        "constructor": "monai.networks.nets.ViT",
        **_monai_arguments(task, settings),
        "patch_size": settings.patch_size,
        "num_layers": settings.depth,
        "classification": classifier,
        "post_activation": None,
        "num_classes": len(task.classes) if classifier else 2,
    }
    return out, arguments


def _monai_unetr(
    tensors: dict[str, Tensor], task: Task, settings: StageSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(settings, FinetuneSettings) or task.kind != "segmentation":
        raise UserError(
            "monai-unetr holds a fine-tuned UNETR: give the run of a segmentation task, or use --to "
            "monai-vit for the encoder"
        )
    wanted = {
        "patch_size": 16,
        "depth": 12,
        "class_token": False,
        "norm_eps": 1e-5,
        "network": "vit",
        "image_skip": True,
        "norm_skips": False,
    }
    _need("monai-unetr", settings, wanted)
    out = {f"vit.{k}": v for k, v in _monai_encoder(tensors).items()}
    for name, value in tensors.items():
        if name.startswith("image_skip."):
            out[name.replace("image_skip.", "encoder1.")] = value
        elif name.startswith("skips."):
            _, k, rest = name.split(".", 2)
            out[f"encoder{int(k) + 2}.{rest}"] = value
        elif name.startswith("ups."):
            _, k, rest = name.split(".", 2)
            out[f"decoder{5 - int(k)}.{rest}"] = value
        elif name.startswith("out."):
            out[name] = value
    arguments = {
        "constructor": "monai.networks.nets.UNETR",
        **_monai_arguments(task, settings),
        "out_channels": task.out_chans,
        "feature_size": settings.feature_size,
        "norm_name": "instance",
        "res_block": True,
        "conv_block": True,
    }
    return out, arguments
