"""The vision transformer that masked autoencoder, classifier and UNETR share by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smae_utils.errors import UserError
from smae_utils.method.patches import as_tuple, gather_tokens, grid_size, patchify, sincos_positions
from smae_utils.timm_library import Block, CpuAttention


def transformer_blocks(
    dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    norm_eps: float,
    drop_path: float = 0.0,
    of: str = "",
) -> nn.ModuleList:
    """`depth` pre-norm blocks of timm, each (B, N, dim) -> (B, N, dim).

    Args:
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        of: goes before the names of arguments in errors.

    Raises:
        UserError: if the heads do not divide the width.
    """
    if dim % num_heads:
        raise UserError(f"{of}embed_dim {dim} does not divide into {of}num_heads {num_heads}")
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    # timm's types want a class; it calls whatever makes a norm.
    norm: Any = partial(nn.LayerNorm, eps=norm_eps)
    return nn.ModuleList(
        Block(
            dim,
            num_heads,
            mlp_ratio,
            qkv_bias=qkv_bias,
            drop_path=rate,
            norm_layer=norm,
            attn_layer=CpuAttention,
        )
        for rate in rates
    )


def init_transformer(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers (the patch projection is one), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Patches (B, K, p^d * C) -> one token each (B, K, D).

    The weights are those of a convolution whose stride is its kernel. They are applied as a linear map of
    patches, which in 3D and bf16 is many times faster than torch's convolution.
    """

    def __init__(self, in_chans: int, patch_size: tuple[int, ...], embed_dim: int):
        super().__init__()
        convs: dict[int, Callable[..., nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
            1: nn.Conv1d,
            2: nn.Conv2d,
            3: nn.Conv3d,
        }
        self.proj = convs[len(patch_size)](in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(embed_dim, -1))

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, K, p^d * C), in the order of `patchify` -> tokens (B, K, embed_dim)."""
        kernel = self.proj.weight.movedim(1, -1).flatten(1)  # channel last, as in a patch
        return F.linear(patches, kernel, self.proj.bias)


class ViTEncoder(nn.Module):
    """Patch embedding, positions, class token, blocks, norm.

    `pos_embed` (1, L, D) holds the patches' positions only; the class token needs none.

    Args:
        img_size: spatial size; two numbers make a 2D model, three a 3D one.
        patch_size: an int, or one an axis.
        in_chans: channels of the image.
        embed_dim, depth, num_heads: width D, blocks and attention heads.
        mlp_ratio: hidden width of the blocks' MLPs over D.
        qkv_bias: whether query, key and value have a bias.
        norm_eps: epsilon of the layer norms.
        class_token: False leaves the class token out.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        learn_positions: True trains the sine-cosine table (fine-tuning), False does not (pre-training).
        final_norm: False leaves the last norm out (for a head that brings its own).

    Raises:
        UserError: if the patch size does not divide the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        class_token: bool = True,
        drop_path: float = 0.0,
        learn_positions: bool = False,
        final_norm: bool = True,
    ):
        super().__init__()
        self.img_size = tuple(img_size)
        self.patch_size = as_tuple(patch_size, len(self.img_size))
        self.grid = grid_size(self.img_size, self.patch_size)
        self.in_chans, self.embed_dim, self.depth = in_chans, embed_dim, depth
        self.blocks = transformer_blocks(
            embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_eps, drop_path
        )
        self.blocks.apply(init_transformer)
        self.patch_embed = PatchEmbed(in_chans, self.patch_size, embed_dim)
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, embed_dim), requires_grad=learn_positions)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02)) if class_token else None
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()

    @property
    def prefix_tokens(self) -> int:
        """Tokens that stand before the patches' tokens: 1 with a class token, else 0."""
        return 0 if self.cls_token is None else 1

    def cut(self, image: Tensor) -> Tensor:
        """(B, C, *img_size) -> patches (B, L, p^d * C), see `patchify`.

        Raises:
            UserError: for an image of another size or number of channels.
        """
        expected = (self.in_chans, *self.img_size)
        if tuple(image.shape[1:]) != expected:
            raise UserError(
                f"the model expects images of (channels, *size) {expected}, got {tuple(image.shape[1:])}: "
                "crop, pad or rebuild the model"
            )
        return patchify(image, self.patch_size)

    def embed(self, patches: Tensor, places: Tensor | None = None) -> Tensor:
        """Patches (B, K, p^d * C) -> tokens with positions, behind the class token (B, prefix_tokens + K, D).

        Args:
            places: (B, K) which patches these are; None: all of them, in order.
        """
        positions = (
            self.pos_embed
            if places is None
            else gather_tokens(self.pos_embed.expand(len(patches), -1, -1), places)
        )
        tokens = self.patch_embed(patches) + positions
        if self.cls_token is None:
            return tokens
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)

    def forward(self, image: Tensor, take: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Image (B, C, *img_size) -> normed tokens (B, prefix_tokens + L, D), and a list of hidden states.

        The list holds the un-normed tokens, of the same shape, after each block index in `take`.

        Raises:
            UserError: for an image of another size or number of channels.
        """
        tokens = self.embed(self.cut(image))
        taken = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in take:
                taken.append(tokens)
        return self.norm(tokens), taken


class ViTClassifier(nn.Module):
    """ViT encoder and a linear head: an image to one logit a class.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads: of the encoder, see `ViTEncoder`.
        num_classes: number of logits, one a class; classes do not exclude each other.
        pool: "cls" takes the normed class token; "mean" averages the patch tokens and then norms, as timm's
            `global_pool="avg"` and MAE's fine-tuning do.
        encoder: further arguments of `ViTEncoder` (class_token, qkv_bias, mlp_ratio, norm_eps, drop_path).

    Raises:
        UserError: for another `pool`, or "cls" without a class token.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        pool: str = "cls",
        **encoder,
    ):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise UserError(f"pool must be 'cls' or 'mean', got {pool!r}")
        if pool == "cls" and not encoder.get("class_token", True):
            raise UserError("pool='cls' needs class_token=True; use pool='mean'")
        self.pool = pool
        encoder = {"learn_positions": True, **encoder, "final_norm": pool == "cls"}
        self.encoder = ViTEncoder(img_size, patch_size, in_chans, embed_dim, depth, num_heads, **encoder)
        self.fc_norm = (
            nn.LayerNorm(embed_dim, eps=encoder.get("norm_eps", 1e-6)) if pool == "mean" else nn.Identity()
        )
        self.head = nn.Linear(embed_dim, num_classes)
        # Small weights start every class near p = .5, so the first steps move the encoder little.
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_chans, *img_size) -> logits (B, num_classes).

        Raises:
            UserError: for an image of another size or number of channels.
        """
        tokens, _ = self.encoder(image)
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.encoder.prefix_tokens :].mean(1)
        return self.head(self.fc_norm(pooled))
