"""2D image files to what every viewer shows: upright, white as white, in 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from monai import transforms as mt
from PIL import Image, ImageOps, UnidentifiedImageError

from smae_utils.data import dicom
from smae_utils.errors import UserError
from smae_utils.paths import is_dicom

WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
PHOTOMETRIC = 262


class ReadRadiograph(mt.Transform):
    """PNG, JPEG, TIFF or DICOM -> 8-bit PIL image (grey, or RGB for three channels), rows from the top.

    `mean` and `std` of the whole image, in 0..1, are added. PIL reads it, not MONAI's PILReader, which
    transposes: left and right would change places with up and down.
    """

    def __init__(self, in_chans: int = 1):
        if in_chans not in (1, 3):
            raise UserError(f"2D images have 1 channel (grey) or 3 (RGB), the task wants {in_chans}")
        self.mode = "L" if in_chans == 1 else "RGB"

    def __call__(self, data: dict) -> dict:
        image = read_image(data["image"]).convert(self.mode)
        pixels = np.asarray(image, np.float32) / 255
        return {**data, "image": image, "mean": float(pixels.mean()), "std": float(max(pixels.std(), 1e-3))}


def read_image(path: str | Path) -> Image.Image:
    """A 2D image file as 8-bit PIL image ("L" or "RGB").

    EXIF's orientation, TIFF's WhiteIsZero, palettes and transparency (over black) are applied; 16 bits and
    floats are scaled by their own range.

    Raises:
        UserError: if it cannot be read, or is no single 2D image.
    """
    path = str(path)
    if is_dicom(path):
        return _from_dicom(path)
    try:
        with Image.open(path) as file:
            _one_page(file, path)
            inverted = (
                file.format == "TIFF"
                and file.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
                and file.mode.startswith(("I", "F"))
            )
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):
                values = np.asarray(image, np.float64)
                return _to_8_bit(-values if inverted else values, path)
            if image.has_transparency_data:
                shown = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", shown.size, (0, 0, 0, 255)), shown).convert(
                    "RGB"
                )
            return image.convert("L" if image.mode in ("L", "1") else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from error


def read_flat_mask(path: str | Path) -> np.ndarray:
    """A mask of a 2D image: (H, W) label values as stored. A palette picture's values are its indices.

    Raises:
        UserError: if it cannot be read, or holds colours.
    """
    path = str(path)
    if is_dicom(path):
        return dicom.read_stored(path)
    try:
        with Image.open(path) as file:
            _one_page(file, path)
            # PIL has inverted 8 bits of a WhiteIsZero TIFF already; a mask's numbers are meant
            # as they are stored.
            turned = (
                file.format == "TIFF"
                and file.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
                and file.mode in ("L", "1")
            )
            image = ImageOps.exif_transpose(file)
            values = np.asarray(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, error) from error
    if values.dtype == bool:
        values = values.astype(np.uint8)
        return 1 - values if turned else values
    if turned:
        values = 255 - values
    if values.ndim == 3:
        colours = values[..., :3] if values.shape[-1] in (3, 4) else values[..., :1]
        if (colours != colours[..., :1]).any():
            raise UserError(
                f"{path} holds colours ({image.mode}): a mask holds one label value a pixel; save it as grey "
                "or with a palette"
            )
        values = colours[..., 0]
    return values


def _one_page(file: Image.Image, path: str) -> None:
    # Some phones write a second picture behind the first (MPO).
    if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
        raise UserError(
            f"{path} holds {file.n_frames} pages or frames: expected one image a file; save the one that is "
            "meant"
        )


def _unreadable(path: str, error: Exception) -> UserError:
    line = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot read {path}: {line}. Download, copy or unpack it again")


def _to_8_bit(values: np.ndarray, path: str, padding: np.ndarray | None = None) -> Image.Image:
    """Grey values (H, W) of any range -> 8 bits by that range; padding is left out and becomes black."""
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(
            f"cannot read {path}: expected a grey 2D image of finite values, got shape {values.shape}"
        )
    inside = values if padding is None or not padding.any() else values[~padding]
    low, high = inside.min(), inside.max()
    grey = ((values - low) / max(high - low, 1e-9) * 255).clip(0, 255).round().astype(np.uint8)
    if padding is not None:
        grey[padding] = 0
    return Image.fromarray(grey)


def _from_dicom(path: str) -> Image.Image:
    values, padding, windowed = dicom.read_image(path)
    if values.ndim == 3:
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if not windowed:
        return _to_8_bit(values, path, padding)
    return Image.fromarray(np.where(padding, 0, values).round().clip(0, 255).astype(np.uint8))
