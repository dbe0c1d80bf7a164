"""The explorer: what is on screen is what the model says, in patient orientation; only masks and cases run
the model. No browser here.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from smae_utils.errors import UserError
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.masking import mask_noise, split_by_noise
from smae_utils.method.patches import patch_statistics, patchify, unpatchify
from smae_utils.show import explorer as module
from smae_utils.show.explorer import explore
from smae_utils.show.masked_scene import HIDDEN_COLOUR, Look, hide_box, make_scene, picture
from smae_utils.work.finetune import finetune
from smae_utils.work.pretrain import pretrain


def model(size=(16, 16, 24), patch=8, chans=2, **more) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(size, patch, chans, 24, 2, 2, 24, 1, 2, **more)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def panels(data: bytes, count: int = 5, gap: int = 4) -> list[np.ndarray]:
    image = decode(data)
    width = (image.shape[1] - gap * (count - 1)) // count
    return [image[:, i * (width + gap) : i * (width + gap) + width] for i in range(count)]


@pytest.fixture
def counting(monkeypatch):
    calls = []
    original = module.make_scene
    monkeypatch.setattr(module, "make_scene", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def test_slices_and_window_only_cut_arrays_and_a_mask_runs_the_model_once(counting):
    e = explore(model(), torch.rand(2, 16, 16, 24))
    assert len(counting) == 1
    before = e.images["axial"].value
    e.slices["axial"].value = 3
    assert e.images["axial"].value != before and len(counting) == 1
    e.window.value = (0.2, 0.4)
    e.channel.value = 1
    e.mode.value = True
    assert len(counting) == 1
    e.ratio.value = 0.5
    assert len(counting) == 2
    e.renew.click()
    assert len(counting) == 3 and e.seed.value == 1


def test_a_slice_moves_its_own_view_only():
    e = explore(model(), torch.rand(2, 16, 16, 24))
    before = {view: image.value for view, image in e.images.items()}
    e.slices["coronal"].value = 2
    changed = {view for view, image in e.images.items() if image.value != before[view]}
    assert changed == {"coronal"}


def test_the_slice_on_screen_is_that_slice_of_the_image():
    image = torch.zeros(1, 16, 16, 16)
    image[0, :, :, 5] = 1.0
    e = explore(model((16, 16, 16), chans=1), image)
    e.window.value = (0, 1)
    for index, bright in ((4, False), (5, True), (6, False)):
        e.slices["axial"].value = index + 1  # slices are counted from 1
        grey = np.median(panels(e.images["axial"].value)[0])
        assert (grey > 200) == bright


@pytest.mark.parametrize(
    ("axis", "view", "where"),
    [
        (0, "axial", "left"),
        (1, "axial", "top"),
        (2, "coronal", "top"),
        (1, "sagittal", "left"),
        (0, "coronal", "left"),
        (2, "sagittal", "top"),
    ],
)
def test_patient_right_front_and_head_are_where_radiologists_expect_them(axis, view, where):
    image = torch.zeros(1, 16, 16, 16)
    image.transpose(1, axis + 1)[0, 12:] = 1.0  # the high end of a RAS axis: right, anterior, superior
    e = explore(model((16, 16, 16), chans=1), image)
    e.window.value = (0, 1)
    panel = panels(e.images[view].value)[0].mean(-1)
    half = panel.shape[0] // 4
    parts = {"left": panel[:, :half], "right": panel[:, -half:], "top": panel[:half], "bottom": panel[-half:]}
    means = {name: float(np.median(part)) for name, part in parts.items()}
    opposite = {"left": "right", "top": "bottom"}[where]
    assert means[where] > 200 and means[opposite] < 50


def test_voxels_keep_their_aspect():
    look = Look(spacing_mm=(1.0, 1.0, 3.0), size=240)
    scene = make_scene(None, torch.rand(1, 16, 16, 16))
    axial, coronal = (picture(scene, "original", view, 8, look) for view in ("axial", "coronal"))
    assert axial.size == (80, 80) and coronal.size == (80, 240)


def test_rows_hold_what_the_model_says_and_the_loss_is_its_own():
    net, image = model().eval(), torch.rand(2, 16, 16, 24)
    noise = mask_noise([3], 12)
    scene = make_scene(net, image, noise, 0.75)
    with torch.inference_mode():
        out = net.predict_all(image[None], noise)
    assert scene.loss == pytest.approx(float(out.loss), rel=1e-5)
    assert scene.hidden.mean() == pytest.approx(9 / 12)
    hidden = scene.hidden
    assert np.array_equal(scene.rows["visible + predicted"][:, ~hidden], image.numpy()[:, ~hidden])
    mean, std = patch_statistics(patchify(image[None], (8, 8, 8)))
    expected = unpatchify(out.pred * std + mean, (8, 8, 8), (2, 2, 3))[0].numpy()
    np.testing.assert_allclose(scene.rows["reconstruction"][:, hidden], expected[:, hidden], atol=1e-5)
    assert np.array_equal(scene.rows["error"][:, ~hidden], np.zeros_like(image.numpy())[:, ~hidden])
    np.testing.assert_allclose(
        scene.normalised["reconstruction"], unpatchify(out.pred, (8, 8, 8), (2, 2, 3))[0].numpy(), atol=1e-6
    )


def test_hidden_patches_are_painted_and_visible_ones_are_not():
    e = explore(model((16, 16, 16), chans=1), torch.rand(1, 16, 16, 16))
    e.slices["axial"].value = 5
    visible = panels(e.images["axial"].value)[1]
    painted = (np.abs(visible - np.array(HIDDEN_COLOUR)).max(-1) < 20).mean()
    assert painted == pytest.approx(e.scene.hidden[:, :, 4].mean(), abs=0.12)


def test_a_box_by_hand_hides_exactly_these_patches():
    noise, ratio = hide_box((2, 3, 4), [(0, 0), (1, 2), (0, 3)])
    _, hidden, mask = split_by_noise(noise, ratio)
    expected = np.zeros((2, 3, 4))
    expected[0, 1:3] = 1
    assert np.array_equal(mask.reshape(2, 3, 4).numpy(), expected) and hidden.shape[1] == 8
    for grid in ((2, 2), (7, 9), (4, 4, 4)):  # every size of a box, however the ratio is rounded
        for count in range(1, int(np.prod(grid))):
            box = np.zeros(int(np.prod(grid)))
            box[:count] = 1
            _, inside, _ = split_by_noise(torch.from_numpy(box)[None].float(), (count - 0.5) / len(box))
            assert sorted(inside[0].tolist()) == list(range(count))
    e = explore(model(), torch.rand(2, 16, 16, 24))
    assert all(slider.disabled for slider in e.box)
    e.by_hand.value = True
    e.box[0].value, e.box[1].value, e.box[2].value = (0, 0), (0, 0), (1, 2)
    expected = np.zeros((16, 16, 24), bool)
    expected[:8, :8, 8:] = True
    assert np.array_equal(e.scene.hidden, expected) and "17% hidden" in e.text()
    assert e.slices["sagittal"].value <= 8 and e.slices["axial"].value > 8  # the slices cut the box


def test_the_text_says_what_is_on_screen():
    e = explore(model(), torch.rand(2, 16, 16, 24), spacing_mm=(2, 2, 5))
    e.slices["axial"].value = 8
    text = e.text()
    assert "axial slice 8 of 24 (35 mm)" in text and "75% hidden" in text
    assert f"loss on hidden patches {e.scene.loss:.3f}" in text and "each patch's mean 1.000" in text
    assert text.split(" · ")[0] in e.line.value and 'aria-live="polite"' in e.line.value


def test_the_switch_says_whose_brightness_is_shown():
    e = explore(model(), torch.rand(2, 16, 16, 24))
    assert "true" in e.note.value and "mean and contrast" in e.note.value
    before = e.images["axial"].value
    e.mode.value = True
    assert "loss compares" in e.note.value and e.images["axial"].value != before
    raw = explore(model(norm_pix_loss=False), torch.rand(2, 16, 16, 24))
    assert raw.note.value == "" and raw.scene.normalised == {}


def test_the_static_twin_is_a_picture_with_a_text():
    for net, image in ((model(), torch.rand(2, 16, 16, 24)), (model((32, 16), 8, 1), torch.rand(1, 32, 16))):
        bundle = explore(net, image, static=True)._repr_mimebundle_()
        assert set(bundle) == {"image/png", "text/plain"} and "loss on hidden patches" in bundle["text/plain"]
        sheet = decode(bundle["image/png"])
        assert sheet.std() > 20
    live = explore(net, image)._repr_mimebundle_()
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(live)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["brats", "cxr14"])
def test_runs_are_shown_with_label_prediction_and_the_states_they_kept(task, data, tiny, bare, tmp_path):
    quiet = [].append
    mae = pretrain(
        task, data[task], tmp_path / "mae", bare, {**tiny[task, "pretrain"], "keep_every": 2}, report=quiet
    )
    fine = finetune(task, data[task], tmp_path / "fine", mae.path, bare, tiny[task, "finetune"], report=quiet)
    e = explore(mae.path, finetuned=[fine.path])
    assert [label for label, _ in e.step.options] == ["2 steps", "4 steps", "last"]
    last = e.images[e.views[0]].value
    e.step.value = e.step.options[0][1]
    assert e.images[e.views[0]].value != last
    e.step.value = ""
    assert e.images[e.views[0]].value == last
    if task == "brats":
        assert list(e.outlines.options) == ["label", "fine"] and "WT" in e.legend.value
        shown = e.images["axial"].value
        e.outlines.value = ()
        assert e.images["axial"].value != shown and e.legend.value == ""
        alone = explore(fine.path)
        assert list(alone.scene.rows) == ["original"] and "hidden" not in alone.text()
    else:
        assert "labelled: " in e.text() and "fine: " in e.text()
    if len(e.case.options) > 1:
        before = e.line.value
        e.case.value = 1
        assert e.line.value != before


def test_what_cannot_be_shown_is_refused_with_what_was_expected(brats, tiny, bare, tmp_path):
    net = model()
    with pytest.raises(UserError, match=r"\(2, 16, 16, 24\).*\(1, 8, 8, 8\)"):
        explore(net, torch.rand(1, 8, 8, 8))
    with pytest.raises(UserError, match="NaN"):
        explore(net, torch.full((2, 16, 16, 24), float("nan")))
    with pytest.raises(UserError, match="give an array"):
        explore(net)
    with pytest.raises(UserError, match="no run folder"):
        explore(tmp_path / "nowhere")
    mae = pretrain("brats", brats, tmp_path / "mae", bare, tiny["brats", "pretrain"], report=[].append)
    with pytest.raises(UserError, match="nowhere.nii.gz does not exist"):
        explore(mae.path, tmp_path / "nowhere.nii.gz")
    with pytest.raises(UserError, match="finetune run was expected"):
        explore(mae.path, finetuned=[mae.path])


def test_a_case_that_cannot_be_shown_leaves_no_picture_of_another_under_its_name():
    good, bad = torch.rand(2, 16, 16, 24), torch.full((2, 16, 16, 24), float("nan"))
    e = explore(model(), [good, bad, good])
    e.case.value = 1
    assert "NaN" in e.line.value and e.images["axial"].value == b""
    e.case.value = 2
    assert "image 3" in e.text() and e.images["axial"].value and "NaN" not in e.line.value
    e.slices["axial"].value = 2
    assert "axial slice 2 of 24" in e.line.value


def test_a_box_over_everything_is_said_to_be_impossible():
    e = explore(model(), torch.rand(2, 16, 16, 24))
    e.by_hand.value = True
    for slider in e.box:
        slider.value = (0, slider.max)
    assert "at least one has to be hidden and one visible" in e.line.value
