"""Look through a masked image in JupyterLab: the one place that knows ipywidgets.

Nothing is loaded from outside.

    from smae_utils import explore
    explore("runs/pre")                                  # the run's own held-out images
    explore("runs/pre", finetuned=["runs/self"])         # with the label and the fine-tuned network's mask
    explore(model, image, spacing_mm=(1.5, 1.5, 2.0))    # any masked autoencoder, any array (C, *img_size)
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.places import need_notebook_packages
from smae_utils.show.explorer_source import Source, open_source
from smae_utils.show.masked_scene import (
    PALETTE,
    Look,
    Scene,
    encode,
    hide_box,
    hide_random,
    make_scene,
    sheet,
    strip,
)
from smae_utils.show.plots import PLANES
from smae_utils.work.run_folder import Run

# One clear line, where the import would give a traceback.
need_notebook_packages("ipywidgets")
import ipywidgets as widgets  # noqa: E402

NOTES = {
    False: "Intensities: the network predicts normalised patches; the <b>true</b> mean and contrast of "
    "each patch, also of hidden ones, are put back in.",
    True: "Normalised target: what the loss compares, each patch without its own mean and contrast. "
    "Grey runs from -2 to 2.",
}


def explore(
    model_or_run: MaskedAutoencoder | Run | str | Path,
    cases: Any = None,
    *,
    finetuned: Sequence[str | Path] = (),
    data_dir: str | Path | None = None,
    spacing_mm: Sequence[float] = (),
    static: bool = False,
    seed: int = 0,
) -> Explorer | Still:
    """Explorer of masked images and what a masked autoencoder makes of them.

    Args:
        model_or_run: a model, or a run (folder). A fine-tuning run shows label and prediction, unmasked.
        cases: for a model an image (C, *img_size) or a list of them. For a run a path, a case of a split, or
            a list of them; their middle is shown at the model's input size. None: the run's held-out cases.
        finetuned: fine-tuning runs whose predictions are outlined beside the label.
        data_dir: where the data lies now, if it was moved since the run.
        spacing_mm: voxel size of arrays, one an axis; a run knows its own.
        static: return a picture with text instead of controls, as executed notebooks and web pages show it.

    Raises:
        UserError: if the run or an image cannot be used, saying what was expected.
    """
    explorer = Explorer(open_source(model_or_run, cases, finetuned, data_dir, spacing_mm), seed)
    return explorer.still() if static else explorer


class Still:
    """A contact sheet and the text that says what it shows."""

    def __init__(self, png: bytes, text: str):
        self.png, self.text = png, text

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        return {"image/png": self.png, "text/plain": self.text}


class Explorer(widgets.VBox):
    """The controls; `scene` and `look` are what is on screen.

    Slices and window only cut cached arrays; the model runs when mask or case change.
    """

    def __init__(self, source: Source, seed: int = 0):
        self.source, self.scene, self.look = source, Scene({}, {}, np.zeros(())), Look()
        self.image, self.verdict, self.seconds, self._busy = torch.zeros(0), "", 0.0, True
        names = [source.name(i) for i in range(len(source))]
        self.case = widgets.Dropdown(
            options=[(n, i) for i, n in enumerate(names)], value=0, description="case"
        )
        self.channel = widgets.Dropdown(
            options=[(n, i) for i, n in enumerate(source.channels)], value=0, description="channel"
        )
        steps = source.checkpoints()
        self.step = widgets.SelectionSlider(
            options=steps or [("last", "")], value=(steps or [("last", "")])[-1][1], description="trained for"
        )
        slow = {"continuous_update": False}
        self.ratio = widgets.FloatSlider(
            value=source.mask_ratio, min=0.05, max=0.95, step=0.05, description="mask ratio", **slow
        )
        self.seed = widgets.BoundedIntText(value=seed, min=0, max=10**6, description="mask seed")
        self.renew = widgets.Button(description="new mask", tooltip="draw another random mask")
        self.by_hand = widgets.Checkbox(
            value=False, description="hide a box by hand: what does it think is under here?", indent=False
        )
        axes = (
            ("left to right", "back to front", "foot to head")
            if len(source.grid) == 3
            else ("rows", "columns")
        )
        self.box = [
            widgets.IntRangeSlider(
                value=(g // 4, max(g // 4, g // 2)), min=0, max=g - 1, description=name, disabled=True, **slow
            )
            for g, name in zip(source.grid, axes)
        ]
        self.window = widgets.FloatRangeSlider(
            value=(0, 1), min=-1, max=2, step=0.01, description="grey window", readout_format=".2f"
        )
        self.mode = widgets.ToggleButtons(
            options=[("intensities", False), ("normalised target", True)], value=False
        )
        self.outlines = widgets.SelectMultiple(options=[], description="outlines", rows=2)
        self.views = list(PLANES) if source.ndim == 3 else [""]
        self.slices = {
            view: widgets.IntSlider(value=1, min=1, max=1, description=view) for view in self.views
        }
        self.images = {view: widgets.Image(format="jpeg") for view in self.views}
        self.note, self.line, self.legend = widgets.HTML(), widgets.HTML(), widgets.HTML()
        super().__init__(self._arrange())
        self._connect()
        self._open_case()

    def _arrange(self) -> list[widgets.Widget]:
        for control in (
            self.case,
            self.channel,
            self.step,
            self.ratio,
            self.window,
            *self.box,
            *self.slices.values(),
        ):
            control.style.description_width = "7em"
        self.window.layout.width, self.by_hand.layout.width = "32em", "max-content"
        rows: list[widgets.Widget] = [
            widgets.HBox(
                [w for w in (self.case, self.channel, self.step) if len(w.options) > 1 or w is self.case]
            )
        ]
        if self.source.model is not None:
            rows += [
                widgets.HBox([self.ratio, self.seed, self.renew]),
                widgets.HBox([self.by_hand, *self.box]),
                self.mode,
            ]
        rows += [
            widgets.HBox(
                [self.window, *([self.outlines] if self.source.finetuned or self.source.classes else [])]
            ),
            self.note,
        ]
        for view in self.views:
            if view:
                back, forward = (
                    widgets.Button(description=d, tooltip=f"{t} {view} slice")
                    for d, t in (("<", "previous"), (">", "next"))
                )
                for button, by in ((back, -1), (forward, 1)):
                    button.layout.width = "3em"
                    button.on_click(lambda _, view=view, by=by: self._go(view, by))
                rows.append(widgets.HBox([self.slices[view], back, forward]))
            rows.append(self.images[view])
        return [*rows, self.legend, self.line]

    def _connect(self) -> None:
        def on(control: widgets.Widget, action) -> None:
            control.observe(lambda change: action(), "value")

        on(self.case, self._open_case)
        for control in (self.step, self.ratio, self.seed, *self.box):
            on(control, self._mask)
        self.renew.on_click(lambda _: self._another_seed())
        on(self.by_hand, self._switch_hand)
        for control in (self.channel, self.window, self.mode, self.outlines):
            on(control, self._draw_all)
        for view, slider in self.slices.items():
            on(slider, lambda view=view: self._draw(view))

    def _go(self, view: str, by: int) -> None:
        slider = self.slices[view]
        slider.value = min(max(slider.value + by, 1), slider.max)

    def _another_seed(self) -> None:
        self.by_hand.value = False
        self.seed.value = (self.seed.value + 1) % 10**6

    def _switch_hand(self) -> None:
        for slider in self.box:
            slider.disabled = not self.by_hand.value
        self.ratio.disabled = self.by_hand.value
        self._mask()

    def _open_case(self) -> None:
        """Load the case and put sliders where there is something to see."""
        self._busy = True
        try:
            self.image, labels, self.verdict = self.source.load(self.case.value)
        except UserError as error:
            if not self.images[self.views[0]].value:
                raise  # nothing was ever shown: the caller has to know
            # No picture of another case may stand under this name.
            for image in self.images.values():
                image.value = b""
            self._tell(str(error))
            return
        self.labels = labels
        low, high = (float(v) for v in np.percentile(self.image.numpy(), (1, 99.5)))
        span = max(high - low, 1e-3)
        # Wide limits first, so that no order of the next lines crosses.
        self.window.max, self.window.min = 1e9, -1e9
        self.window.value = (low, high)
        self.window.min, self.window.max, self.window.step = low - span, high + span, span / 100
        for view, axis in PLANES.items():
            if view in self.slices:
                self.slices[view].max = self.image.shape[1 + axis]
                self.slices[view].value = self.image.shape[1 + axis] // 2 + 1
        # The label and one prediction: more at a time cannot be told apart.
        self.outlines.options, self.outlines.value = (
            list(labels),
            tuple(dict.fromkeys([*list(labels)[:1], *list(labels)[-1:]])),
        )
        self._busy = False
        self._mask()

    def _mask(self) -> None:
        """Run the model under the mask that the controls ask for."""
        if self._busy:
            return
        started = time.perf_counter()
        noise, ratio = None, 0.0
        if self.source.model is not None:
            self.source.use_checkpoint(self.step.value)
            grid = self.source.grid
            if self.by_hand.value:
                try:
                    noise, ratio = hide_box(grid, [slider.value for slider in self.box])
                except UserError as error:
                    self._tell(str(error))
                    return
                self._show_box()
            else:
                length = int(np.prod(grid))
                noise, ratio = hide_random(
                    length, min(max(self.ratio.value, 1 / length), 1 - 1 / length), self.seed.value
                )
        self.scene = make_scene(self.source.model, self.image, noise, ratio)
        self.scene.labels = self.labels
        self.seconds = time.perf_counter() - started
        self._draw_all()

    def _tell(self, text: str) -> None:
        self.line.value = f'<div role="status" aria-live="polite">{html.escape(text)}</div>'

    def _show_box(self) -> None:
        """Move slices that do not cut the hidden box into its middle."""
        self._busy = True
        for view, axis in PLANES.items():
            if view in self.slices:
                size = self.image.shape[1 + axis] // self.source.grid[axis]
                low, high = self.box[axis].value
                if not low * size < self.slices[view].value <= (high + 1) * size:
                    self.slices[view].value = (low + high + 1) * size // 2 + 1
        self._busy = False

    def _draw_all(self) -> None:
        if self._busy:
            return
        self.look = Look(
            self.channel.value,
            tuple(self.window.value),
            self.mode.value,
            tuple(self.outlines.value),
            len(self.source.classes),
            220 if self.source.ndim == 3 else 260,
            self.source.spacing_mm,
        )
        self.note.value = f"<i>{NOTES[self.mode.value]}</i>" if self.scene.normalised else ""
        for view in self.views:
            self._draw(view)
        self.legend.value = self._legend()

    def _draw(self, view: str) -> None:
        if self._busy:
            return
        index = self.slices[view].value - 1 if view else 0
        self.images[view].value = encode(strip(self.scene, view, index, self.look))
        self._tell(self.text())

    def _legend(self) -> str:
        if not self.look.outlines:
            return ""
        present = sorted(
            {int(v) for name in self.look.outlines for v in np.unique(self.scene.labels[name]) if v}
        )
        chips = " &nbsp; ".join(
            f'<span style="color:{PALETTE[(v - 1) % len(PALETTE)]}">&#9632;</span> '
            f"{html.escape(self.source.classes[v - 1])}"
            for v in present
        )
        dotted = f" &nbsp; (solid: {html.escape(self.look.outlines[0])}" + (
            f"; dotted: {html.escape(', '.join(self.look.outlines[1:]))})"
            if len(self.look.outlines) > 1
            else ")"
        )
        return chips + dotted

    def text(self) -> str:
        """One line that says what is on screen."""
        parts = [f"{self.source.name(self.case.value)}, {self.source.channels[self.channel.value]}"]
        spacing, unit = (
            self.source.spacing_mm or (1.0,) * self.source.ndim,
            "mm" if self.source.spacing_mm else "voxels",
        )
        for view in self.views:
            if view:
                slider = self.slices[view]
                parts.append(
                    f"{view} slice {slider.value} of {slider.max} "
                    f"({(slider.value - 1) * spacing[PLANES[view]]:.0f} {unit})"
                )
        if self.source.model is not None:
            parts.append(f"{self.scene.hidden.mean():.0%} hidden")
            parts.append(
                f"loss on hidden patches {self.scene.loss:.3f}, "
                f"predicting each patch's mean {self.scene.baseline:.3f}"
            )
        return " · ".join(parts + ([self.verdict] if self.verdict else []))

    def still(self) -> Still:
        """The static twin: a contact sheet and a text."""
        at = (
            [self.slices[view].value - 1 for view in ("sagittal", "coronal", "axial")]
            if self.source.ndim == 3
            else [0, 0]
        )
        columns = ", ".join(self.scene.rows)
        text = (
            f"Contact sheet, columns {columns}; lines "
            f"{', '.join(v for v in self.views if v) or 'one image'}. {self.text()}"
        )
        return Still(encode(sheet(self.scene, at, self.look), "PNG"), text)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(include=include, exclude=exclude)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**data, **self.still()._repr_mimebundle_()}
