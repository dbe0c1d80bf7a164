"""Figures of the notebooks.

Arrays are channel first. 3D ones are RAS+, shown as radiologists do: patient right on the
left, anterior or head up.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from smae_utils.data.case import IGNORE
from smae_utils.method.mae import MaskedAutoencoder, paste_visible, pixel_mask
from smae_utils.method.masking import mask_noise, split_by_noise
from smae_utils.method.patches import patchify, unpatchify
from smae_utils.work.run_folder import Run

# Okabe and Ito's palette and Tol's muted one: told apart by colour-blind readers too.
PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#332288", "#88CCEE",
    "#44AA99", "#999933", "#882255", "#AA4499",
)  # fmt: skip
ARM_COLOURS = {"scratch": "#999999", "self": "#0072B2"}
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}


def plane(volume: np.ndarray, name: str, index: int | None = None) -> np.ndarray:
    """One slice (H, W) of (X, Y, Z) in RAS+, turned for `imshow`.

    Rows run from the top; patient right, or anterior, is on the left.
    """
    axis = PLANES[name]
    index = volume.shape[axis] // 2 if index is None else index
    picture = np.take(volume, index, axis)
    # Right, anterior and head are the high ends of their axes. A sagittal view has anterior on the left.
    return picture.T[::-1, ::-1]


def pictures(
    image: np.ndarray, planes: Sequence[str] = tuple(PLANES), at: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Name -> picture: an image (H, W) as it is, or `planes` of a volume (X, Y, Z).

    `at` is the slice along each axis; None: the middle.
    """
    if image.ndim == 2:
        return {"": image}
    at = at or [n // 2 for n in image.shape]
    return {name: plane(image, name, at[PLANES[name]]) for name in planes}


def axes_grid(rows: int, columns: int, size: float = 2.2) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), without ticks and frames; `size` is inches of one of them."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, size * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def show_cases(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    labels: Sequence[np.ndarray] | None = None,
    classes: Sequence[str] = (),
) -> Figure:
    """A row a case (2D: a column), the planes side by side, label outlines on top.

    Args:
        images: (*spatial) each.
        labels: integer labels on the same grids; a class has its own colour in the legend.
        classes: names of label numbers 1, 2, ...
    """
    flat = images[0].ndim == 2
    columns = min(len(images), 4) if flat else 3
    rows = -(-len(images) // columns) if flat else len(images)
    figure, axes = axes_grid(rows, columns)
    for i, (image, title) in enumerate(zip(images, titles)):
        at = centre_of(labels[i]) if labels is not None and labels[i].any() else None
        row = axes.flat[i : i + 1] if flat else axes[i]
        low, high = np.percentile(image, (1, 99.5))
        for axis, (name, picture) in zip(row, pictures(image, at=at).items()):
            axis.imshow(picture, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.set_title(f"{title} {name}".strip(), fontsize=8)
        if labels is not None:
            for axis, picture in zip(row, pictures(labels[i], at=at).values()):
                draw_outlines(axis, picture, len(classes))
    if classes and labels is not None:
        used = sorted({int(v) for label in labels for v in np.unique(label) if 0 < v <= len(classes)})
        handles = [Patch(color=PALETTE[(v - 1) % len(PALETTE)], label=classes[v - 1]) for v in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def centre_of(label: np.ndarray) -> list[int]:
    """The slice along each axis of a label (*spatial) that holds most labelled voxels."""
    inside = (label > 0) & (label != IGNORE)
    return [
        int(inside.sum(tuple(a for a in range(label.ndim) if a != axis)).argmax())
        for axis in range(label.ndim)
    ]


def draw_outlines(axis, label: np.ndarray, n_classes: int, style: str = "solid") -> None:
    """Outline the values 1 .. `n_classes` of an integer label picture (H, W), each in its colour."""
    for value in range(1, n_classes + 1):
        if (label == value).any():
            axis.contour(
                label == value,
                levels=[0.5],
                colors=[PALETTE[(value - 1) % len(PALETTE)]],
                linewidths=1.0,
                linestyles=style,
            )


def draw_mask(image: torch.Tensor, mask: torch.Tensor, patch_size: Sequence[int]) -> np.ndarray:
    """Image (1, C, *spatial), mask (1, L) -> channel 0 (*spatial), with hidden patches NaN (drawn blank)."""
    hidden = pixel_mask(mask, patch_size, image.shape)[0, 0].numpy()
    return np.where(hidden, np.nan, image[0, 0].numpy())


def show_masks(
    image: torch.Tensor, patch_size: Sequence[int], mask_ratios: Sequence[float], seed: int = 0
) -> Figure:
    """One image (C, *spatial) under several mask ratios; hidden patches are blank."""
    length = patchify(image[None], patch_size).shape[1]
    noise = mask_noise([seed], length)
    shown = {"original": image[0].numpy()}
    for ratio in mask_ratios:
        mask = split_by_noise(noise, ratio)[2]
        shown[f"{ratio:.0%} hidden"] = draw_mask(image[None], mask, patch_size)
    return _show_columns(shown, scale_of(image[0].numpy()))


def scale_of(image: np.ndarray) -> tuple[float, float]:
    """Grey values for black and white: the 1st and the 99.5th percentile of an image of any shape."""
    return tuple(np.percentile(image, (1, 99.5)))


def _show_columns(shown: dict[str, np.ndarray], scale: tuple[float, float]) -> Figure:
    """Columns of pictures on one grey scale, a row a plane.

    Those whose name starts with 'error' have a scale of their own.
    """
    flat = next(iter(shown.values())).ndim == 2
    figure, axes = axes_grid(1 if flat else 3, len(shown))
    for column, (name, image) in enumerate(shown.items()):
        for row, (view, picture) in enumerate(pictures(image).items()):
            axis = axes[row, column]
            if name.startswith("error"):
                axis.imshow(picture, cmap="magma", vmin=0, vmax=scale[1] - scale[0], interpolation="nearest")
            else:
                axis.imshow(picture, cmap="gray", vmin=scale[0], vmax=scale[1], interpolation="nearest")
            axis.set_facecolor("#3b5f7f")
            if row == 0:
                axis.set_title(name, fontsize=9)
            if column == 0:
                axis.set_ylabel(view, fontsize=8)
    return figure


@torch.inference_mode()
def show_reconstruction(
    model: MaskedAutoencoder, image: torch.Tensor, seed: int = 0, channel: int = 0
) -> Figure:
    """original | visible | reconstruction | pasted | error of one image (C, *spatial), on one grey scale.

    With `norm_pix_loss` the model predicts normalised patches. The picture then uses the **true** mean and
    std of each patch, also of hidden ones.
    """
    model = model.eval()
    batch = image[None].to(next(model.parameters()).device)
    noise = mask_noise([seed], model.encoder.pos_embed.shape[1]).to(batch.device)
    out = model.predict_all(batch, noise)
    full = model.to_image(batch, out.pred).cpu()
    batch, mask = batch.cpu(), out.mask.cpu()
    pasted = paste_visible(batch, full, mask, model.patch_size)
    pick = slice(channel, channel + 1)
    shown = {
        "original": batch[0, channel].numpy(),
        f"visible ({1 - mask.mean():.0%})": draw_mask(batch[:, pick], mask, model.patch_size),
        "reconstruction": full[0, channel].numpy(),
        "visible + predicted": pasted[0, channel].numpy(),
        "error": (pasted - batch).abs()[0, channel].numpy(),
    }
    figure = _show_columns(shown, scale_of(batch[0, channel].numpy()))
    note = "true patch mean and std put back in" if model.norm_pix_loss else "predicted intensities"
    figure.supxlabel(f"loss on hidden patches {out.loss:.3f}; {note}", fontsize=8)
    return figure


def show_target(model: MaskedAutoencoder, image: torch.Tensor) -> Figure:
    """The image (C, *spatial) beside the target of the loss, both of channel 0.

    With `norm_pix_loss` the target has each patch's own mean and contrast taken out.
    """
    target = unpatchify(model.target(model.encoder.cut(image[None])), model.patch_size, model.grid)[
        0, 0
    ].numpy()
    original = image[0].numpy()
    low, high = scale_of(original)
    # Both on one scale: the target's -2 .. 2 is stretched over the image's range.
    stretched = (np.clip(target, -2, 2) + 2) / 4 * (high - low) + low
    return _show_columns({"image": original, "what the loss sees": stretched}, (low, high))


def show_positions(model: MaskedAutoencoder, patch: int | None = None) -> Figure:
    """Cosine similarity of one patch's position with all others, over the grid (3D: its middle slice)."""
    table = model.encoder.pos_embed[0].detach()
    table = table / table.norm(dim=1, keepdim=True)
    grid = model.grid
    patch = int(np.ravel_multi_index([g // 2 for g in grid], grid)) if patch is None else patch
    similarity = (table @ table[patch]).reshape(grid).numpy()
    figure, axes = axes_grid(1, 1, 3)
    picture = similarity if similarity.ndim == 2 else plane(similarity, "axial")
    drawn = axes[0, 0].imshow(picture, cmap="cividis")
    axes[0, 0].set_title(f"positions: similarity to patch {patch}", fontsize=9)
    figure.colorbar(drawn, shrink=0.8)
    return figure


def show_curves(
    runs: dict[str, Run],
    keys: Sequence[str] = ("loss", "val_loss"),
    band: dict[str, float] | None = None,
    ylabel: str = "loss",
) -> Figure:
    """Curves of log.jsonl against steps.

    Args:
        runs: name -> run.
        keys: entries of the log; the first is drawn solid, the second dashed.
        band: name -> value of a horizontal line, as of `sanity_band`.
        ylabel: with the unit, where there is one.
    """
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    for name, run in runs.items():
        for key, style in zip(keys, ("-", "--")):
            points = [(line["step"], line[key]) for line in run.read_log() if key in line]
            if points:
                axis.plot(*zip(*points), style, label=f"{name} {key}".strip(), color=ARM_COLOURS.get(name))
    for name, value in (band or {}).items():
        axis.axhline(value, color="#D55E00", linewidth=1, linestyle=":")
        axis.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#D55E00",
        )
    axis.set(xlabel="step", ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return figure
