"""Weights are handed over whole and by name, or not at all."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import smae_utils.method.checkpoints.save as weights_module
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import (
    hash_case,
    load_weights,
    parameter_count,
    read_weights,
    resize_positions,
    seen_cases,
    weights_file,
)
from smae_utils.method.checkpoints.save import encoder_arguments, save_weights
from smae_utils.method.mae import MaskedAutoencoder
from smae_utils.method.unetr import UNETR
from smae_utils.method.vit import ViTClassifier, ViTEncoder
from smae_utils.work.build import build_cnn

SIZE = (16, 24)


def mae(size=SIZE, patch=4, chans=1, width=24, depth=3):
    return MaskedAutoencoder(size, patch, chans, width, depth, 3, 12, 1, 2)


def classifier(size=SIZE, patch=4, chans=1, width=24, depth=3, classes=2, **more):
    return ViTClassifier(size, patch, chans, width, depth, 3, classes, **more)


def unetr(size=SIZE):
    return UNETR(size, 4, 1, 24, 3, 3, 2, feature_size=2)


@pytest.fixture
def pretrained(tmp_path):
    """A masked autoencoder none of whose tensors, positions included, is what a new model starts with, and
    its run folder.
    """
    torch.manual_seed(0)
    model = mae()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    save_weights(model, tmp_path / "model.safetensors")
    return model, tmp_path


def rewrite(folder, change):
    """The weights of `folder` after `change(tensors)`, with their grid."""
    tensors, grid, *_ = read_weights(folder)
    change(tensors)
    path = folder / "changed.safetensors"
    save_file(tensors, path, metadata={"grid": str(list(grid))})
    return path


def test_the_weights_of_a_cnn_which_has_no_encoder_are_kept_too(tmp_path):
    one, two = (build_cnn(get_task("brats")) for _ in range(2))
    save_weights(one, tmp_path / "model.safetensors")
    assert load_weights(two, tmp_path, require="").notes == []
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize(
    "target, new", [(classifier, {"head"}), (unetr, {"image_skip", "skips", "ups", "out"})]
)
def test_mae_hands_every_encoder_tensor_over_positions_included_and_reports_what_is_new(
    pretrained, target, new
):
    source, folder = pretrained
    model = target()
    report = load_weights(model, folder)
    encoder = source.encoder.state_dict()
    assert "pos_embed" in encoder and "cls_token" in encoder
    assert set(report.loaded) == {f"encoder.{name}" for name in encoder}
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    assert {name.split(".")[0] for name in report.missing} == new
    assert set(report.missing) | set(report.loaded) == set(model.state_dict())
    assert set(report.unexpected) == {name for name in source.state_dict() if not name.startswith("encoder.")}
    assert report.resized == []
    for word in (*new, f"loaded {len(encoder)}", f"new in this model {len(report.missing)}"):
        assert word in str(report)


def test_a_mean_pooling_classifier_takes_the_encoder_without_its_norm_and_says_so(pretrained):
    source, folder = pretrained
    model = classifier(pool="mean")
    report = load_weights(model, folder)
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert {"encoder.norm.weight", "encoder.norm.bias"} <= set(report.unexpected)
    assert torch.equal(model.encoder.blocks[2].mlp.fc2.weight, source.encoder.blocks[2].mlp.fc2.weight)


def test_saved_weights_come_back_bit_for_bit_with_their_grid(pretrained):
    source, folder = pretrained
    again = mae()
    report = load_weights(again, folder, require="")
    assert report.missing == [] and report.unexpected == []
    for name, value in source.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert read_weights(folder).grid == (4, 6)


def test_positions_stay_fixed_or_learnable_as_the_model_says_after_loading(pretrained):
    _, folder = pretrained
    for model, learnable in [(mae(), False), (classifier(), True)]:
        load_weights(model, folder)
        assert model.encoder.pos_embed.requires_grad is learnable


def test_a_run_folder_and_its_file_are_the_same_source(pretrained):
    _, folder = pretrained
    assert weights_file(folder) == weights_file(folder / "model.safetensors") == folder / "model.safetensors"


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no weights at .*absent"):
        load_weights(classifier(), tmp_path / "absent")


def test_a_run_folder_without_weights_is_an_error_that_says_to_pretrain(tmp_path):
    with pytest.raises(UserError, match="run pretrain first"):
        load_weights(classifier(), tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_truncated_file_is_an_error(pretrained, keep):
    _, folder = pretrained
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="no whole safetensors"):
        load_weights(classifier(), folder)


@pytest.mark.parametrize(
    "other, says",
    [
        ({"width": 36}, "encoder"),
        ({"depth": 4}, "blocks.3"),
        ({"chans": 3}, "patch_embed"),
        ({"patch": 8}, "patch_embed"),
    ],
    ids=lambda value: str(value),
)
def test_another_width_depth_channels_or_patch_size_is_an_error_that_names_a_tensor_and_loads_nothing(
    pretrained, other, says
):
    _, folder = pretrained
    model = classifier(**other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"does not fit.*{says}"):
        load_weights(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_with_more_blocks_than_the_model_is_an_error(pretrained):
    _, folder = pretrained
    with pytest.raises(UserError, match="does not fit.*blocks"):
        load_weights(classifier(depth=2), folder)


def test_2d_weights_in_a_3d_model_are_an_error(pretrained):
    _, folder = pretrained
    with pytest.raises(UserError, match="does not fit.*patch_embed"):
        load_weights(classifier((8, 8, 8)), folder)


@pytest.mark.parametrize(
    "lost",
    ["encoder.pos_embed", "encoder.cls_token", "encoder.blocks.1.attn.qkv.bias", "encoder.norm.weight"],
)
def test_a_file_with_one_encoder_tensor_removed_is_an_error_that_names_it(pretrained, lost):
    _, folder = pretrained
    path = rewrite(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(UserError, match=lost):
        load_weights(classifier(), path)


def test_weights_that_are_required_whole_may_not_lack_a_head(pretrained):
    _, folder = pretrained
    with pytest.raises(UserError, match="head"):
        load_weights(classifier(), folder, require="")


def test_a_head_for_other_classes_is_left_new_and_reported(tmp_path):
    save_weights(classifier(classes=5), tmp_path / "model.safetensors")
    assert set(load_weights(classifier(classes=2), tmp_path).missing) == {"head.weight", "head.bias"}


# Grids (8, 8), (2, 3) and (6, 4), which has as many patches as (4, 6).
@pytest.mark.parametrize("size", [(32, 32), (8, 12), (24, 16)], ids=str)
def test_positions_are_resized_to_another_grid_and_reported(pretrained, size):
    source, folder = pretrained
    model = classifier(size)
    report = load_weights(model, folder)
    assert report.resized == ["encoder.pos_embed"]
    assert "resized 1" in str(report)
    expected = resize_positions(source.encoder.pos_embed, (4, 6), model.encoder.grid)
    assert torch.equal(model.encoder.pos_embed, expected)
    assert torch.equal(model.encoder.cls_token, source.encoder.cls_token)


def test_a_constant_table_stays_constant_on_any_grid(pretrained):
    _, folder = pretrained

    def flatten(tensors):
        tensors["encoder.pos_embed"] = torch.arange(24.0).expand(1, 24, 24).clone()

    model = classifier((32, 40))
    load_weights(model, rewrite(folder, flatten))
    torch.testing.assert_close(model.encoder.pos_embed.detach(), torch.arange(24.0).expand(1, 80, 24).clone())


def test_resized_positions_are_interpolated_along_their_own_axis():
    ramp = np.arange(4.0)
    table = torch.from_numpy(np.broadcast_to(ramp[:, None], (4, 6)).reshape(1, 24, 1).copy())
    resized = resize_positions(table, (4, 6), (8, 3))[0, :, 0].reshape(8, 3).numpy()
    centres = (np.arange(8) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(resized, np.repeat(np.interp(centres, ramp, ramp)[:, None], 3, 1), atol=1e-6)
    cube = torch.randn(1, 27, 5)
    torch.testing.assert_close(resize_positions(cube, (3, 3, 3), (3, 3, 3)), cube)


def test_saving_leaves_one_file_under_its_own_name(pretrained):
    model, folder = pretrained
    save_weights(model, folder / "model.safetensors")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_saving_that_is_cut_off_leaves_the_old_weights_whole(pretrained, monkeypatch):
    model, folder = pretrained
    before = load_file(folder / "model.safetensors")

    def dies(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights_module, "save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        save_weights(classifier(), folder / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.keys() == model.state_dict().keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_foreign_file_without_a_class_token_loads_into_a_model_without_one(tmp_path):
    # 9 + 1 = 10 patches: a 2 x 5 grid that looks like a 3 x 3 one with a row for the class token
    source = classifier((8, 20), class_token=False, pool="mean")
    save_file(
        {name: value.contiguous() for name, value in source.encoder.state_dict().items()},
        tmp_path / "foreign.safetensors",
    )
    model = classifier((8, 20), class_token=False, pool="mean")
    load_weights(model, tmp_path / "foreign.safetensors")
    assert torch.equal(model.encoder.patch_embed.proj.weight, source.encoder.patch_embed.proj.weight)


def test_parameter_count_counts_trainable_numbers_only():
    model = classifier(width=24, depth=1, classes=2)
    block = (24 * 72 + 72) + (24 * 24 + 24) + (24 * 96 + 96) + (96 * 24 + 24) + 4 * 24
    own = (16 * 24 + 24) + 24 * 24 + 24 + 2 * 24 + (24 * 2 + 2)  # patches, positions, class token, norm, head
    assert parameter_count(model) == block + own
    model.encoder.pos_embed.requires_grad_(False)
    assert parameter_count(model) == block + own - 24 * 24


@pytest.mark.parametrize(
    "more", [{}, {"class_token": False, "pool": "mean", "qkv_bias": False, "mlp_ratio": 2.0}]
)
def test_the_file_tells_every_argument_of_its_encoder(more, tmp_path):
    one = classifier(**more)
    save_weights(one, tmp_path / "model.safetensors")
    told = read_weights(tmp_path).encoder
    assert told == encoder_arguments(one)
    again = ViTEncoder(**told)
    assert [(k, v.shape) for k, v in again.state_dict().items() if "norm" not in k.split(".")[0]] == [
        (k, v.shape) for k, v in one.encoder.state_dict().items() if "norm" not in k.split(".")[0]
    ]
    assert again.blocks[0].attn.num_heads == one.encoder.blocks[0].attn.num_heads == 3


def test_what_a_model_was_trained_on_comes_back_from_the_file(tmp_path):
    facts = {
        "channels": ["T1", "T2"],
        "spacing_mm": [1.5, 1.5, 2.0],
        "window": None,
        "normalisation": "z-score",
        "seen": [hash_case("a")],
    }
    for model in (classifier(chans=2), build_cnn(get_task("brats"))):
        save_weights(model, tmp_path / "model.safetensors", facts)
        assert read_weights(tmp_path).facts == facts
    save_weights(mae(), tmp_path / "model.safetensors")
    assert read_weights(tmp_path).facts == {}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert {key: json.loads(value) for key, value in handle.metadata().items()}["grid"] == [4, 6]


def test_another_number_of_heads_is_refused_though_all_shapes_fit(pretrained):
    _, folder = pretrained
    other = ViTClassifier(SIZE, 4, 1, 24, 3, 4, 2)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        UserError, match=r"3 attention heads \(num_heads\), this model has 4.*num_heads=3"
    ) as error:
        load_weights(other, folder)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_another_number_of_heads_of_the_decoder_is_refused_where_the_decoder_is_loaded(pretrained):
    _, folder = pretrained
    other = MaskedAutoencoder(SIZE, 4, 1, 24, 3, 3, 12, 1, 4)
    with pytest.raises(UserError, match="2 attention heads .*has 4.*--set decoder_num_heads=2"):
        load_weights(other, folder)
    assert load_weights(classifier(), folder).notes == []


def test_a_file_that_does_not_say_its_heads_is_loaded_and_said_so(pretrained):
    _, folder = pretrained
    said = "does not say its number of attention heads; this model has 3"
    assert said in str(load_weights(classifier(), rewrite(folder, lambda tensors: None)))
    assert said not in str(load_weights(classifier(), folder))


FACTS = {
    "channels": ["T1", "T2", "FLAIR"],
    "spacing_mm": [1.0, 1.0],
    "window": None,
    "normalisation": "z-score",
}


def swapped(model, folder, names=("FLAIR", "T1", "T2")):
    """`model` randomly filled and saved as trained on T1, T2, FLAIR; what `expect` says for a task with
    `names`.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    save_weights(model.eval(), folder / "model.safetensors", FACTS)
    return {**FACTS, "channels": list(names)}


@pytest.mark.parametrize("size", [(16, 24), (8, 12, 8)], ids=str)
def test_the_same_channels_in_another_order_are_put_in_order_and_said_so(size, tmp_path):
    source = mae(size, chans=3)
    expect = swapped(source, tmp_path)
    image = torch.rand(2, 3, *size)  # T1, T2, FLAIR
    there = image[:, [2, 0, 1]]  # FLAIR, T1, T2
    target = classifier(size, chans=3).eval()
    report = load_weights(target, tmp_path, expect=expect)
    assert "channels T1, T2, FLAIR were put in this model's order FLAIR, T1, T2" in str(report)
    torch.testing.assert_close(target.encoder(there)[0], source.encoder(image)[0], atol=1e-5, rtol=1e-4)
    again = mae(size, chans=3).eval()
    load_weights(again, tmp_path, require="", expect=expect)
    noise = torch.rand(2, source.encoder.pos_embed.shape[1])
    one, two = (
        model.to_image(x, model.predict_all(x, noise).pred) for model, x in ((source, image), (again, there))
    )
    torch.testing.assert_close(two, one[:, [2, 0, 1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again(there, noise).loss, source(image, noise).loss, atol=1e-5, rtol=1e-4)


def test_a_whole_unetr_gives_the_same_logits_with_its_channels_in_another_order(tmp_path):
    source, target = (UNETR((16, 16), 4, 3, 24, 3, 3, 2, feature_size=2) for _ in range(2))
    expect = swapped(source, tmp_path)
    load_weights(target, tmp_path, require="", expect=expect)
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(target.eval()(image[:, [2, 0, 1]]), source(image), atol=1e-4, rtol=1e-4)


def test_a_network_whose_channels_cannot_be_put_in_order_is_refused_by_both_orders(tmp_path):
    task = get_task("brats")
    facts = {"channels": ["a", "b", "c", "d"]}
    save_weights(build_cnn(task), tmp_path / "model.safetensors", facts)
    load_weights(build_cnn(task), tmp_path, require="", expect=facts)
    with pytest.raises(UserError, match="in the order a, b, c, d, not b, a, c, d"):
        load_weights(build_cnn(task), tmp_path, require="", expect={"channels": ["b", "a", "c", "d"]})
    # Its first block adds the image's channels to its own.
    narrow = UNETR((16, 16), 4, 2, 24, 3, 3, 2, feature_size=2)
    save_weights(narrow, tmp_path / "model.safetensors", {"channels": ["a", "b"]})
    with pytest.raises(UserError, match="in the order a, b, not b, a"):
        load_weights(narrow, tmp_path, expect={"channels": ["b", "a"]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channels": ["T1", "T2", "PD"]}, "made with channels T1, T2, FLAIR, this model's are T1, T2, PD"),
        ({"spacing_mm": [1.0, 2.5]}, "made with spacing_mm 1, 1, this model has 1, 2.5"),
        ({"window": [-175, 250]}, "made with window none, this model has -175, 250"),
        ({"normalisation": "min-max"}, "made with normalisation z-score, this model has min-max"),
    ],
)
def test_other_channels_spacing_window_or_normalisation_are_told(change, says, tmp_path):
    source = mae(chans=3)
    expect = swapped(source, tmp_path, FACTS["channels"])
    assert load_weights(classifier(chans=3), tmp_path, expect=expect).notes == []
    target = classifier(chans=3)
    assert load_weights(target, tmp_path, expect={**expect, **change}).notes == [says]
    assert torch.equal(target.encoder.patch_embed.proj.weight, source.encoder.patch_embed.proj.weight)


@pytest.mark.parametrize(
    "says",
    [
        {**FACTS, "channels": ["channel 1", "channel 2", "channel 3"]},
        {**FACTS, "channels": ["t1", "t2", "flair"]},
        {"spacing_mm": [1, 1]},
        {},
    ],
)
def test_numbered_channels_and_what_one_side_does_not_say_are_no_contradiction(says, tmp_path):
    swapped(mae(chans=3), tmp_path)
    assert load_weights(classifier(chans=3), tmp_path, expect=says).notes == []


def test_the_training_cases_are_known_from_the_run_its_files_and_copies_of_them(tmp_path):
    seen = {hash_case(name) for name in ("case_1", "case_2")}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for file in (run / "model.safetensors", run / "checkpoints" / "step0000002.safetensors"):
        save_weights(mae(), file, {"seen": sorted(seen)})
    copy = shutil.copy(run / "checkpoints" / "step0000002.safetensors", tmp_path / "elsewhere.safetensors")
    for source in (
        run,
        run / "model.safetensors",
        run / "checkpoints" / "step0000002.safetensors",
        copy,
        str(copy),
    ):
        assert seen_cases(source) == seen
    assert "case_1" not in (run / "model.safetensors").read_bytes().decode("latin-1")


def test_older_weights_and_the_state_of_an_unfinished_run_are_known_by_the_run_they_lie_in(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "config.yaml").write_text("cases: {train: [case_1, '07'], val: [case_3]}\n")
    save_weights(mae(), tmp_path / "model.safetensors")
    save_file(mae().state_dict(), tmp_path / "last" / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "last"):
        assert seen_cases(source) == {hash_case("case_1"), hash_case("07")}


def test_weights_of_others_have_seen_no_case_that_we_know(tmp_path):
    save_file(mae().encoder.state_dict(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    torch.save(mae().state_dict(), tmp_path / "theirs.pth")
    for source in (tmp_path / "theirs.safetensors", tmp_path / "theirs.pth", "timm:vit_base_patch16_224.mae"):
        assert seen_cases(source) == set()
    with pytest.raises(UserError, match="no weights at"):
        seen_cases(tmp_path / "absent")


def test_the_hash_of_a_case_is_short_always_the_same_and_not_that_of_another():
    assert hash_case("case_1") == hash_case("case_1") != hash_case("case_2")
    assert len(hash_case("ä" * 500)) == 16
