"""The one place that imports timm, and works around its import of torchvision on CPU-only installations."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from smae_utils.errors import UserError


def _import_torchvision() -> None:
    """Import torchvision where its compiled operators cannot load, as a CUDA build beside a CPU-only torch.

    timm needs only torchvision's pure-Python part. That part registers shape functions for operators
    which do not exist without the compiled library. Those registrations alone are ignored, and only
    when the plain import fails.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return
    import sys

    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    register_fake = torch.library.register_fake

    def skip_missing(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = skip_missing
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register_fake


if importlib.util.find_spec("torchvision"):
    _import_torchvision()

import timm  # noqa: E402
from timm.data import auto_augment, rand_augment_transform  # noqa: E402
from timm.data.transforms import RandomResizedCropAndInterpolation  # noqa: E402
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402


def _keep_a_bit(image, bits_to_keep, **_):
    """timm's posterize, but with at least one bit: at a large magnitude it asks Pillow for 0, an error."""
    return auto_augment.posterize(image, max(1, bits_to_keep))


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = _keep_a_bit


class CpuAttention(Attention):
    """timm's attention, whose core a CPU computes in fp32 also under bf16 autocast.

    torch's bf16 kernel took four to nine times as long backward as the fp32 one at 17 to 65 tokens; at 217
    tokens it was no faster.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: bool) -> Tensor:
        """(B, N, D) -> (B, N, D); newer releases of timm say `is_causal` too."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x, attn_mask, **more)
        q, k, v = self.qkv(x).float().unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, **more)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def pretrained_tensors(name: str) -> dict[str, Tensor]:
    """Weights of a timm model by its name, as "vit_base_patch16_224.mae", from timm's cache or downloaded.

    Raises:
        UserError: for an unknown name, or when they can neither be found nor downloaded.
    """
    if not timm.is_model(name.split(".")[0]):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]) or "vit_base_patch16_224.mae"
        raise UserError(f"timm knows no model {name!r}: did you mean {close}?")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # whatever the network, the hub or the name's tag does
        line = " ".join(str(error).split())[:160]
        raise UserError(
            f"timm could not get the weights of {name} ({line}): "
            "download them where there is a network, and give the file"
        ) from None


__all__ = [
    "Block",
    "CpuAttention",
    "CosineLRScheduler",
    "RandomResizedCropAndInterpolation",
    "pretrained_tensors",
    "rand_augment_transform",
]
