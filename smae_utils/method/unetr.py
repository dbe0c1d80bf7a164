"""UNETR (Hatamizadeh et al. 2103.10504) around the shared encoder, for patch sizes that are powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from smae_utils.errors import UserError
from smae_utils.method.norms import keep_channels_last
from smae_utils.method.vit import ViTEncoder


class UNETR(nn.Module):
    """ViT encoder and a convolutional decoder with skips, from an image to logits of the same size.

    With patch size 2^n the decoder has n stages, each up-sampling by 2. Skip k (1 .. n-1) is taken after
    the block of index k * depth / n (12 blocks, patch 16: 3, 6, 9) and brought to 1 / 2^k of the image.
    The decoder's blocks are MONAI's.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads: of the encoder, see `ViTEncoder`.
        out_chans: logits of each pixel.
        feature_size: channels at full resolution; they double at each stage down.
        use_image: False leaves out the skip from the image itself, so that all the decoder knows went
            through the encoder.
        norm_skips: True norms the hidden states of the blocks before the decoder reads them, as the last
            block's already are: a pre-trained encoder's are several times larger than a random one's.
        encoder: further arguments of `ViTEncoder` (class_token, qkv_bias, mlp_ratio, norm_eps, drop_path).

    Raises:
        UserError: if the patch size is not the same power of two (4 or more) on every axis, or the encoder
            has too few blocks for the skips.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        out_chans: int,
        feature_size: int = 16,
        use_image: bool = True,
        norm_skips: bool = False,
        **encoder,
    ):
        super().__init__()
        encoder = {"learn_positions": True, **encoder}
        self.encoder = ViTEncoder(img_size, patch_size, in_chans, embed_dim, depth, num_heads, **encoder)
        ndim, patch = len(self.encoder.img_size), self.encoder.patch_size[0]
        stages = int(log2(patch))
        if len(set(self.encoder.patch_size)) > 1 or 2**stages != patch or stages < 2:
            raise UserError(
                "UNETR needs the same power of two (4, 8, 16, ...) as patch size on every axis, got "
                f"{self.encoder.patch_size}"
            )
        if depth < stages:
            raise UserError(
                f"UNETR at patch size {patch} takes {stages - 1} skips and needs at least {stages} blocks, "
                f"got depth={depth}"
            )
        self.skip_blocks = [k * depth // stages for k in range(1, stages)]

        def width(level: int) -> int:
            return feature_size * 2**level

        self.feature_size, self.norm_skips = feature_size, norm_skips
        self.image_skip = (
            UnetrBasicBlock(ndim, in_chans, feature_size, 3, stride=1, norm_name="instance", res_block=True)
            if use_image
            else None
        )
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(
                spatial_dims=ndim,
                in_channels=embed_dim,
                out_channels=width(k),
                num_layer=stages - k - 1,
                kernel_size=3,
                stride=1,
                upsample_kernel_size=2,
                norm_name="instance",
                conv_block=True,
                res_block=True,
            )
            for k in range(1, stages)
        )
        widths = [width(level) for level in range(stages)] + [embed_dim]
        self.ups = nn.ModuleList(
            UnetrUpBlock(
                ndim,
                widths[level + 1],
                widths[level],
                kernel_size=3,
                upsample_kernel_size=2,
                norm_name="instance",
                res_block=True,
            )
            for level in reversed(range(stages))
        )
        self.out = UnetOutBlock(spatial_dims=ndim, in_channels=feature_size, out_channels=out_chans)
        keep_channels_last(self)

    def to_map(self, tokens: Tensor) -> Tensor:
        """Tokens (B, prefix_tokens + L, D) -> feature map (B, D, *grid), without the class token."""
        return tokens[:, self.encoder.prefix_tokens :].transpose(1, 2).unflatten(2, self.encoder.grid)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, in_chans, *img_size) -> logits (B, out_chans, *img_size).

        Raises:
            UserError: for an image of another size or number of channels.
        """
        tokens, taken = self.encoder(image, take=self.skip_blocks)
        if self.norm_skips:
            taken = [layer_norm(t, t.shape[-1:]) for t in taken]
        shown = (
            self.image_skip(image)
            if self.image_skip
            else image.new_zeros(len(image), self.feature_size, *image.shape[2:])
        )
        skips = [shown] + [block(self.to_map(t)) for block, t in zip(self.skips, taken)]
        x = self.to_map(tokens)
        for up, skip in zip(self.ups, reversed(skips)):
            x = up(x, skip)
        return self.out(x)
