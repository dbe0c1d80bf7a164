"""The masked autoencoder (He et al. 2111.06377), trained on a task's own images (Zhou et al. 2203.05573)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smae_utils.errors import UserError
from smae_utils.method.masking import split_by_noise, visible_count
from smae_utils.method.patches import (
    as_tuple,
    gather_tokens,
    grid_size,
    patch_statistics,
    patchify,
    sincos_positions,
    unpatchify,
)
from smae_utils.method.vit import ViTEncoder, init_transformer, transformer_blocks


@dataclass
class MAEOutput:
    """What one forward pass gives, for B images of L patches of p^d pixels and C channels each.

    Attributes:
        loss: scalar, mean squared error of the hidden patches in the units of the target. With
            `air_loss=False`, patches of one single value are left out.
        pred: (B, H, p^d * C), the predicted hidden patches in the order of `hidden`, in the units of
            the target (normalised with `norm_pix_loss`). From `predict_all`: all patches, in their places
            (B, L, p^d * C).
        hidden: (B, H) indices of the hidden patches.
        mask: (B, L) float, 1 = hidden.
    """

    loss: Tensor
    pred: Tensor
    hidden: Tensor
    mask: Tensor


class MaskedAutoencoder(nn.Module):
    """Hide most patches, encode the visible ones, predict the hidden ones (He et al. 2111.06377, section 3).

    Args:
        img_size: spatial size; two numbers make a 2D model, three a 3D one.
        patch_size: an int, or one an axis.
        in_chans: channels of the image.
        embed_dim, depth, num_heads: width D, blocks and attention heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same sizes of the decoder, usually smaller.
        mask_ratio: share of the patches that are hidden.
        norm_pix_loss: True compares with each patch normalised by its own mean and biased variance (+ 1e-6),
            as the released 3D code does (facebookresearch/mae takes the unbiased variance); False compares
            with the intensities as they are.
        air_loss: False leaves hidden patches of one single value, such as air, out of the loss.
        encoder: further arguments of `ViTEncoder` (class_token, qkv_bias, mlp_ratio, norm_eps).

    Raises:
        UserError: if the patch size does not divide the image, the heads do not divide the width, or no
            patch would be hidden or none visible.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        air_loss: bool = True,
        **encoder,
    ):
        super().__init__()
        self.encoder = ViTEncoder(img_size, patch_size, in_chans, embed_dim, depth, num_heads, **encoder)
        self.patch_size, self.grid = self.encoder.patch_size, self.encoder.grid
        self.mask_ratio, self.norm_pix_loss, self.air_loss = mask_ratio, norm_pix_loss, air_loss
        length = self.encoder.pos_embed.shape[1]
        visible_count(length, mask_ratio)

        mlp_ratio, qkv_bias = encoder.get("mlp_ratio", 4.0), encoder.get("qkv_bias", True)
        norm_eps = encoder.get("norm_eps", 1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim).normal_(std=0.02))
        positions = sincos_positions(self.grid, decoder_embed_dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = transformer_blocks(
            decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio, qkv_bias, norm_eps, of="decoder_"
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=norm_eps)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.encoder.patch_embed.proj.weight[0].numel())
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_transformer)

    def forward(
        self, image: Tensor, noise: Tensor | None = None, mask_ratio: float | None = None
    ) -> MAEOutput:
        """One step of pre-training: hide, encode what is visible, predict what is hidden, compare.

        Args:
            image: (B, C, *img_size).
            noise: (B, L); the `int(L * (1 - mask_ratio))` patches with the smallest values stay visible.
                None: drawn anew, uniform in 0..1.
            mask_ratio: of this call; None: the model's own.

        Raises:
            UserError: for an image or noise of another shape, or a ratio that leaves none hidden or visible.
        """
        patches = self.encoder.cut(image)  # (B, L, p^d * C)
        visible, hidden, mask = self.split(patches, noise, mask_ratio)
        latent = self.encode(patches, visible)  # the encoder never sees a hidden patch
        tokens = self.decode(latent, visible, hidden)
        pred = self.predict(gather_tokens(tokens, hidden))
        loss = self.loss(pred, gather_tokens(patches, hidden))
        return MAEOutput(loss, pred, hidden, mask)

    @torch.no_grad()
    def predict_all(
        self, image: Tensor, noise: Tensor | None = None, mask_ratio: float | None = None
    ) -> MAEOutput:
        """As `forward`, for pictures: without gradients, and `pred` (B, L, p^d * C) holds all patches."""
        patches = self.encoder.cut(image)
        visible, hidden, mask = self.split(patches, noise, mask_ratio)
        pred = self.predict(self.decode(self.encode(patches, visible), visible, hidden))
        loss = self.loss(gather_tokens(pred, hidden), gather_tokens(patches, hidden))
        return MAEOutput(loss, pred, hidden, mask)

    def split(
        self, patches: Tensor, noise: Tensor | None = None, mask_ratio: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, L, N) -> visible (B, V), hidden (B, H), mask (B, L), see `split_by_noise`.

        Raises:
            UserError: for noise of another shape than (B, L).
        """
        shape = patches.shape[:2]
        if noise is None:
            noise = torch.rand(shape, device=patches.device)
        if noise.shape != shape:
            raise UserError(f"noise must be (images, patches) {tuple(shape)}, got {tuple(noise.shape)}")
        return split_by_noise(noise, self.mask_ratio if mask_ratio is None else mask_ratio)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Patches (B, L, p^d * C), indices (B, V) -> normed visible tokens (B, prefix_tokens + V, D)."""
        tokens = self.encoder.embed(gather_tokens(patches, visible), visible)
        for block in self.encoder.blocks:
            tokens = block(tokens)
        return self.encoder.norm(tokens)

    def decode(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Visible tokens (B, prefix_tokens + V, D) -> decoder tokens of all patches (B, L, D_decoder).

        `visible` (B, V) and `hidden` (B, H) say where each of them stands.
        """
        prefix = self.encoder.prefix_tokens
        tokens = self.decoder_embed(latent)
        # A learned token stands for each hidden patch; the positions tell which patch it is.
        patches = unshuffle(tokens[:, prefix:], self.mask_token, visible, hidden) + self.decoder_pos_embed
        # The class token goes along, without a position, as in facebookresearch/mae and the authors' code.
        tokens = torch.cat([tokens[:, :prefix], patches], 1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return tokens[:, prefix:]

    def predict(self, tokens: Tensor) -> Tensor:
        """Decoder tokens (B, K, D_decoder) -> patches (B, K, p^d * C), in the units of the target."""
        return self.decoder_pred(self.decoder_norm(tokens))

    def target(self, patches: Tensor) -> Tensor:
        """The target: patches (B, K, p^d * C) as they are, or normalised each by its own mean and std."""
        if not self.norm_pix_loss:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def loss(self, pred: Tensor, patches: Tensor) -> Tensor:
        """Predicted and true hidden patches (B, H, p^d * C) -> mean squared error, a scalar in fp32."""
        patches = patches.float()
        error = (pred.float() - self.target(patches)).square().mean(-1)
        if self.air_loss:
            return error.mean()
        body = holds_something(patches)
        return (error * body).sum() / body.sum().clamp(min=1)

    def to_image(self, image: Tensor, pred: Tensor) -> Tensor:
        """Predicted patches (B, L, p^d * C) -> an image like `image` (B, C, *img_size), in its intensities.
        With `norm_pix_loss` the network does not predict a patch's mean and std. The **true** ones
        are used, also for hidden patches, so the picture shows contrast that the network did not
        predict: say so beside it.
        """
        patches = patchify(image, self.patch_size)
        if self.norm_pix_loss:
            mean, std = patch_statistics(patches)
            pred = pred * std + mean
        return unpatchify(pred, self.patch_size, self.grid)


def unshuffle(tokens: Tensor, mask_token: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    """Visible tokens (B, V, D) in their places, the mask token (1, 1, D) in all others -> (B, L, D)."""
    together = torch.cat([tokens, mask_token.expand(*hidden.shape, -1).to(tokens.dtype)], 1)
    places = torch.cat([visible, hidden], 1).argsort(1)
    return gather_tokens(together, places)


def paste_visible(
    image: Tensor, reconstruction: Tensor, mask: Tensor, patch_size: int | Sequence[int]
) -> Tensor:
    """Visible patches from `image`, hidden ones from `reconstruction`: all (B, C, *spatial), mask (B, L)."""
    hidden = pixel_mask(mask, patch_size, image.shape)
    return torch.where(hidden, reconstruction, image)


def pixel_mask(mask: Tensor, patch_size: int | Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, L) -> boolean (B, 1, *spatial), True = hidden, for an image of `shape` (B, C, *spatial)."""
    out = mask.bool().reshape(len(mask), 1, *grid_size(shape[2:], patch_size))
    for axis, size in enumerate(as_tuple(patch_size, len(shape) - 2)):
        out = out.repeat_interleave(size, axis + 2)
    return out


def holds_something(patches: Tensor) -> Tensor:
    """Patches (B, K, p^d * C) -> boolean (B, K), False where a patch has one single value, as air has."""
    return patches.amax(-1) > patches.amin(-1)


def sanity_band(
    image: Tensor,
    mask: Tensor,
    patch_size: int | Sequence[int],
    norm_pix_loss: bool = True,
    air_loss: bool = True,
) -> dict[str, float]:
    """Losses that need no network, on the hidden patches: what a trained network has to beat.

    They are counted as `MaskedAutoencoder` counts its loss with the same `norm_pix_loss` and `air_loss`.

    Args:
        image: (B, C, *spatial).
        mask: (B, L), 1 = hidden.

    Returns:
        `patch_mean`: predicting each patch's own mean (1 for normalised targets, apart from flat patches);
        `nearest_visible`: copying the nearest visible patch. Both in the units of the target.
    """
    patches = patchify(image, patch_size)
    mean, std = patch_statistics(patches)
    target = (patches - mean) / std if norm_pix_loss else patches
    axes = [torch.arange(n, dtype=torch.float32) for n in grid_size(image.shape[2:], patch_size)]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    distance = torch.cdist(place, place).to(image.device) + 1e9 * mask.unsqueeze(1)
    copied = gather_tokens(target, distance.argmin(-1))
    flat = torch.zeros_like(target) if norm_pix_loss else mean.expand_as(target)
    counted = mask if air_loss else mask * holds_something(patches)

    def loss(pred: Tensor) -> float:
        return float(((pred - target).square().mean(-1) * counted).sum() / counted.sum().clamp(min=1))

    return {"patch_mean": loss(flat), "nearest_visible": loss(copied)}
