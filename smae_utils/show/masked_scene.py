"""What can be looked at in one masked image: arrays, computed once a mask, and pictures cut from them.

To cut a picture is cheap enough for dragging. Arrays are channel first, 3D ones RAS+. Pictures are RGB arrays
as radiologists look at them: patient right on the left, front or head up.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder, paste_visible, pixel_mask, sanity_band
from smae_utils.method.masking import mask_noise
from smae_utils.method.patches import unpatchify
from smae_utils.show.plots import PALETTE, PLANES, plane

ROWS = ("original", "visible", "reconstruction", "visible + predicted", "error")
# Left, right, top and bottom of the picture.
SIDES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI", "": "RL"}
HIDDEN_COLOUR = (59, 95, 127)
ERROR_COLOURS = (np.asarray(matplotlib.colormaps["magma"](np.arange(256)))[:, :3] * 255).astype(np.uint8)


def hide_random(length: int, mask_ratio: float, seed: int) -> tuple[torch.Tensor, float]:
    """Noise (1, L) and ratio of a random mask."""
    return mask_noise([seed], length), mask_ratio


def hide_box(grid: Sequence[int], box: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, float]:
    """Noise (1, L) and ratio that hide exactly the patches of a box.

    The box is (first, last) along each axis, both inside.

    Raises:
        UserError: if the box holds no patch, or all of them.
    """
    inside = np.zeros(grid, bool)
    inside[tuple(slice(low, high + 1) for low, high in box)] = True
    count = int(inside.sum())
    if not 0 < count < inside.size:
        raise UserError(
            f"the box hides {count} of {inside.size} patches: at least one has to be hidden and one visible"
        )
    return torch.from_numpy(inside.reshape(1, -1)).float(), (count - 0.5) / inside.size


@dataclass
class Scene:
    """One image under one mask.

    Attributes:
        rows: name -> (C, *spatial) in the image's intensities.
        normalised: the same as the loss sees it; empty without `norm_pix_loss`.
        hidden: (*spatial) boolean.
        loss, baseline: of the hidden patches, by the model and by each patch's own mean.
        labels: name -> integer (*spatial), for outlines.
    """

    rows: dict[str, np.ndarray]
    normalised: dict[str, np.ndarray]
    hidden: np.ndarray
    loss: float = float("nan")
    baseline: float = float("nan")
    labels: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """(*spatial) of the image."""
        return self.hidden.shape


@torch.inference_mode()
def make_scene(
    model: MaskedAutoencoder | None,
    image: torch.Tensor,
    noise: torch.Tensor | None = None,
    ratio: float = 0.75,
) -> Scene:
    """Run the model once: image (C, *img_size) and noise (1, L) -> everything that is shown.

    Without a model, the image alone.
    """
    if model is None:
        return Scene({"original": image.float().numpy()}, {}, np.zeros(image.shape[1:], bool))
    model = model.eval()
    device = next(model.parameters()).device
    batch = image[None].float().to(device)
    out = model.predict_all(batch, noise.to(device), ratio)
    pred, mask, loss = out.pred, out.mask, float(out.loss)
    band = sanity_band(batch, mask, model.patch_size, model.norm_pix_loss, model.air_loss)
    shown = model.to_image(batch, pred)
    pairs = {"rows": (batch, shown)}
    if model.norm_pix_loss:
        pairs["normalised"] = tuple(
            unpatchify(p, model.patch_size, model.grid)
            for p in (model.target(model.encoder.cut(batch)), pred)
        )
    made: dict[str, dict[str, np.ndarray]] = {"rows": {}, "normalised": {}}
    for name, (original, predicted) in pairs.items():
        pasted = paste_visible(original, predicted, mask, model.patch_size)
        arrays = (original, original, predicted, pasted, (pasted - original).abs())
        made[name] = {row: array[0].cpu().numpy() for row, array in zip(ROWS, arrays)}
    covered = pixel_mask(mask, model.patch_size, batch.shape)[0, 0].cpu().numpy()
    return Scene(made["rows"], made["normalised"], covered, loss, band["patch_mean"])


@dataclass
class Look:
    """How a scene is drawn.

    `size` is that of a picture in pixels, `window` the range of grey values.
    """

    channel: int = 0
    window: tuple[float, float] = (0.0, 1.0)
    normalised: bool = False
    outlines: tuple[str, ...] = ()
    n_classes: int = 0
    size: int = 220
    spacing_mm: tuple[float, ...] = ()


def cut(array: np.ndarray, view: str, index: int) -> np.ndarray:
    """A slice of (*spatial), turned for looking at; a 2D array as it is."""
    return array if array.ndim == 2 else plane(array, view, index)


def picture(scene: Scene, row: str, view: str, index: int, look: Look) -> Image.Image:
    """One panel, with side labels, scale bar and outlines."""
    source = scene.normalised if look.normalised and scene.normalised else scene.rows
    values = cut(source[row][look.channel], view, index)
    low, high = (-2.0, 2.0) if source is scene.normalised else look.window
    width = max(high - low, 1e-9)
    if row == "error":
        rgb = ERROR_COLOURS[np.clip(values / width * 255, 0, 255).astype(np.uint8)]
    else:
        grey = np.clip((values - low) / width * 255, 0, 255).astype(np.uint8)
        rgb = np.repeat(grey[..., None], 3, -1)
        if row == "visible":
            rgb[cut(scene.hidden, view, index)] = HIDDEN_COLOUR
    mm = pixel_mm(scene.shape, view, look)
    panel = Image.fromarray(rgb).resize(_size(values.shape, mm, scene.shape, look), Image.Resampling.NEAREST)
    if row != "error":
        panel = _outline(panel, scene, view, index, look)
    _annotate(panel, row, view, mm, values.shape, look)
    return panel


def pixel_mm(shape: Sequence[int], view: str, look: Look) -> tuple[float, float]:
    """Height and width of a voxel in a view, in mm."""
    spacing = look.spacing_mm or (1.0,) * len(shape)
    if len(shape) == 2:
        return spacing[0], spacing[1]
    across, up = [a for a in range(3) if a != PLANES[view]]
    return spacing[up], spacing[across]


def _size(
    pixels: tuple[int, int], mm: tuple[float, float], shape: Sequence[int], look: Look
) -> tuple[int, int]:
    """(width, height) of a panel: the same pixels a mm in every view, the longest axis `look.size` long."""
    spacing = look.spacing_mm or (1.0,) * len(shape)
    scale = look.size / max(n * s for n, s in zip(shape, spacing))
    return max(1, round(pixels[1] * mm[1] * scale)), max(1, round(pixels[0] * mm[0] * scale))


def _outline(panel: Image.Image, scene: Scene, view: str, index: int, look: Look) -> Image.Image:
    """Borders of each label value in its colour; the second and later label images dotted."""
    if not look.outlines:
        return panel
    rgb = np.array(panel)
    for number, name in enumerate(look.outlines):
        values = np.array(
            Image.fromarray(cut(scene.labels[name], view, index).astype(np.uint8)).resize(
                panel.size, Image.Resampling.NEAREST
            )
        )
        border = np.zeros(values.shape, bool)
        for axis in (0, 1):
            differs = np.diff(values, axis=axis) != 0
            border[: differs.shape[0], : differs.shape[1]] |= differs
        if number:
            rows, columns = np.indices(values.shape)
            border &= (rows + columns) // 3 % 2 == 0
        inner = np.maximum(values, np.maximum(np.roll(values, -1, 0), np.roll(values, -1, 1)))
        for value in range(1, look.n_classes + 1):
            rgb[border & (inner == value)] = colour(value)
    return Image.fromarray(rgb)


def colour(value: int) -> tuple[int, ...]:
    """RGB of a class."""
    text = PALETTE[(value - 1) % len(PALETTE)]
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def _annotate(
    panel: Image.Image, row: str, view: str, mm: tuple[float, float], pixels: tuple[int, int], look: Look
) -> None:
    """What the panel shows, letters of the patient's sides, and a scale bar of 10, 20, 50 or 100 mm."""
    draw = ImageDraw.Draw(panel)
    width, height = panel.size

    def write(x: int, y: int, text: str) -> None:
        draw.text((x, y), text, fill=(255, 214, 90), stroke_width=1, stroke_fill=(0, 0, 0))

    write(3, 1, row)
    sides = SIDES[view]
    places = (
        (2, height // 2 - 6),
        (width - 9, height // 2 - 6),
        (width // 2 + 20, 12),
        (width // 2 + 20, height - 13),
    )
    for letter, (x, y) in zip(sides, places):
        write(x, y, letter)
    per_mm = width / (pixels[1] * mm[1])
    length = max((n for n in (10, 20, 50, 100) if n * per_mm <= width / 2), default=0)
    # Without a voxel size nothing is said in mm.
    if length and look.spacing_mm:
        draw.line([(4, height - 5), (4 + round(length * per_mm), height - 5)], fill=(255, 214, 90), width=2)
        write(4, height - 19, f"{length} mm")


def strip(scene: Scene, view: str, index: int, look: Look) -> Image.Image:
    """All rows of one view side by side, with a thin gap."""
    panels = [picture(scene, row, view, index, look) for row in scene.rows]
    gap = 4
    out = Image.new(
        "RGB", (sum(p.width for p in panels) + gap * (len(panels) - 1), panels[0].height), (127, 127, 127)
    )
    x = 0
    for panel in panels:
        out.paste(panel, (x, 0))
        x += panel.width + gap
    return out


def sheet(scene: Scene, at: Sequence[int], look: Look) -> Image.Image:
    """Contact sheet: a column each row of the scene, a line a view."""
    views = [("", 0)] if len(scene.shape) == 2 else [(name, at[axis]) for name, axis in PLANES.items()]
    strips = [strip(scene, view, index, look) for view, index in views]
    out = Image.new(
        "RGB", (max(s.width for s in strips), sum(s.height + 4 for s in strips) - 4), (127, 127, 127)
    )
    y = 0
    for image in strips:
        out.paste(image, (0, y))
        y += image.height + 4
    return out


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    """JPEG for the screen (a millisecond), PNG for keeping."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {"optimize": True}))
    return buffer.getvalue()
