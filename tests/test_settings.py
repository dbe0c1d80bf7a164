"""Settings: what a preset and `--set` may say, in which order they count, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from smae_utils.cli import main
from smae_utils.data.tasks import get_task
from smae_utils.errors import UserError
from smae_utils.places import shipped
from smae_utils.work.build import build_mae
from smae_utils.work.presets import load_preset, resolve
from smae_utils.work.settings import (
    STAGE_SETTINGS,
    FinetuneSettings,
    PretrainSettings,
    as_dict,
    describe,
    learning_rate,
    make_settings,
    parse_overrides,
    total_steps,
)
from smae_utils.yaml_text import read_yaml, write_yaml

BTCV = get_task("btcv")


def test_an_unknown_key_is_refused_with_the_list_of_the_right_ones(bare):
    with pytest.raises(UserError, match="'mask_ration'") as error:
        resolve(BTCV, "pretrain", bare, overrides={"mask_ration": 0.5})
    assert "mask_ratio," in str(error.value) and "crop_size" in str(error.value)
    assert "drop_path" not in str(error.value)  # belongs to the other stage


def test_a_key_of_the_other_stage_is_refused(bare):
    with pytest.raises(UserError, match="'mask_ratio'"):
        resolve(BTCV, "finetune", bare, overrides={"mask_ratio": 0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_pix_loss", "False"), ("norm_pix_loss", 0), ("steps", 2.5), ("steps", True), ("steps", "7"),
        ("steps", None), ("base_lr", "fast"),
        ("base_lr", True), ("precision", 32), ("crop_size", 96), ("crop_size", [96, "a"]),
        ("crop_size", [16.5, 16, 16]), ("betas", "0.9"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}|^'?{name}") as error:
        make_settings(PretrainSettings, {name: value}, where="here")
    assert repr(value) in str(error.value) or "'a'" in str(error.value) or "16.5" in str(error.value)


def test_harmless_conversions_are_made():
    made = make_settings(
        PretrainSettings, {"steps": 1000.0, "base_lr": 1, "crop_size": [32, 32, 16]}, where="here"
    )
    assert (made.steps, type(made.steps)) == (1000, int)
    assert (made.base_lr, type(made.base_lr)) == (1.0, float)
    assert made.crop_size == (32, 32, 16)


def test_set_reads_python_and_yaml_spellings():
    items = [
        "norm_pix_loss=False", "train_on_val=true", "base_lr=1e-3", "weight_decay=1.5E+2", "steps=20",
        "crop_size=[32,32, 32]", "rand_augment=rand-m9",
        "betas=[0.9, 0.999]",
    ]  # fmt: skip
    assert parse_overrides(items) == {
        "norm_pix_loss": False, "train_on_val": True, "base_lr": 0.001, "weight_decay": 150.0, "steps": 20,
        "crop_size": [32, 32, 32],
        "rand_augment": "rand-m9", "betas": [0.9, 0.999],
    }  # fmt: skip


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "1.e-04", "+1e-4"])
def test_numbers_as_everybody_writes_them_are_numbers_in_presets_and_on_the_command_line(text, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        f"all: {{base_lr: {text}, betas: [9e-1, {text}], pretrain: {{norm_pix_loss: no}}}}", encoding="utf-8"
    )
    with pytest.raises(UserError, match="the smaller first"):  # both are numbers
        resolve(BTCV, "pretrain", str(path))
    path.write_text(
        f"all: {{base_lr: {text}, pretrain: {{norm_pix_loss: no, steps: 1e3}}}}", encoding="utf-8"
    )
    made = resolve(BTCV, "pretrain", str(path), overrides=parse_overrides([f"weight_decay={text}"]))
    assert (made.base_lr, made.weight_decay, made.norm_pix_loss, made.steps) == (1e-4, 1e-4, False, 1000)


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "1.2.3", "1e", "e5", "2024-02-31", "1e-4s", "'1e-4'"]
)
def test_words_that_look_like_numbers_stay_words(text):
    value = parse_overrides([f"rand_augment={text}"])["rand_augment"]
    assert isinstance(value, str) and value == text.strip("'")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e400])
def test_no_whole_number_is_infinite(value):
    with pytest.raises(UserError, match="steps"):
        make_settings(PretrainSettings, {"steps": value}, where="here")


def test_a_preset_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes("all: {seed: 3}  # \u00fc".encode("latin-1"))
    with pytest.raises(UserError, match="p.yaml.*UTF-8"):
        resolve(BTCV, "pretrain", str(path))
    path.write_bytes("\ufeffall: {seed: 3}  # \u00fc".encode())  # as Windows' editor saves it
    assert resolve(BTCV, "pretrain", str(path)).seed == 3


def test_false_on_the_command_line_turns_a_switch_off(bare):
    assert resolve(BTCV, "pretrain", bare).norm_pix_loss is True
    assert (
        resolve(BTCV, "pretrain", bare, overrides=parse_overrides(["norm_pix_loss=False"])).norm_pix_loss
        is False
    )


@pytest.mark.parametrize("item", ["steps", "=3", "steps 3"])
def test_set_without_a_key_or_value_is_refused(item):
    with pytest.raises(UserError, match="key=value"):
        parse_overrides([item])


def test_later_layers_of_a_preset_win_in_the_order_all_task_stage_arm_overrides(tmp_path):
    layers = ["default", "all", "all stage", "all arm", "task", "task stage", "task arm", "override"]
    # `seed` is set by the first k layers only; the last of these must win.
    for last in range(len(layers)):
        value = {name: 100 + i if 0 < i <= last else None for i, name in enumerate(layers)}

        def section(general: str, stage: str, arm: str, value=value) -> dict:
            put = {
                name: {} if value[name] is None else {"seed": value[name]} for name in (general, stage, arm)
            }
            return {**put[general], "finetune": {**put[stage], "self": put[arm]}}

        path = tmp_path / f"{last}.yaml"
        path.write_text(
            yaml.safe_dump(
                {"all": section(*layers[1:4]), "btcv": section(*layers[4:7]), "cxr14": {"seed": 999}}
            )
        )
        overrides = {"seed": value["override"]} if value["override"] else {}
        made = resolve(BTCV, "finetune", str(path), "self", overrides)
        assert made.seed == (100 + last if last else FinetuneSettings().seed), layers[last]


def test_arms_and_stages_do_not_see_each_others_values(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "btcv: {pretrain: {seed: 1}, finetune: {seed: 2, scratch: {base_lr: 3}, self: {base_lr: 4}}}"
    )
    assert resolve(BTCV, "pretrain", str(path)).seed == 1
    assert [resolve(BTCV, "finetune", str(path), arm).base_lr for arm in ("scratch", "self")] == [3, 4]


def test_a_mistyped_key_in_a_preset_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("btcv: {finetune: {slef: {base_lr: 4}}}")
    with pytest.raises(UserError, match="'slef'"):
        resolve(BTCV, "finetune", str(path))


def test_a_setting_of_the_other_stage_is_told_where_it_belongs_and_not_guessed(bare):
    with pytest.raises(UserError, match="layer_decay.*belongs to finetune only") as error:
        resolve(BTCV, "pretrain", bare, overrides={"layer_decay": 0.5})
    assert "did you mean" not in str(error.value)


def test_a_key_that_is_no_word_is_refused_too(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("all: {on: 3, steps: 2}")  # YAML reads `on` as true
    with pytest.raises(UserError, match="unknown setting True"):
        resolve(BTCV, "pretrain", str(path))


def test_an_error_names_who_gave_the_value(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("all: {steps: many}")
    task = dataclasses.replace(BTCV, name="mine.json", settings={"finetune": {"self": {"steps": "few"}}})
    with pytest.raises(UserError, match=r"steps \(preset .*p.yaml"):
        resolve(task, "finetune", str(path))
    with pytest.raises(UserError, match=r"steps \(list mine.json\)"):
        resolve(task, "finetune", str(path), "self")
    with pytest.raises(UserError, match=r"epochs \(--set\)"):
        resolve(task, "finetune", str(path), "self", {"epochs": "no"})


@pytest.mark.parametrize("text", ["[1, 2]", "all: [1", "all: 3", "btcv: {pretrain: 5}", "btcvv: {steps: 3}"])
def test_a_preset_that_is_no_preset_is_named(text, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="p.yaml"):
        resolve(BTCV, "pretrain", str(path))


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(UserError, match="unknown preset 'dmeo'.*demo"):
        load_preset("dmeo")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_shipped_preset_holds_only_known_settings(stage):
    presets = sorted(p.stem for p in shipped("presets").glob("*.yaml"))
    assert "demo" in presets
    for name in presets:
        content = load_preset(name)
        for section in set(content) - {"all"}:
            for arm in ("scratch", "self"):
                resolve(get_task(section), stage, name, arm)


def test_epochs_become_steps_over_whole_passes():
    settings = PretrainSettings(epochs=10000, warmup_epochs=500, batch_size=6)
    assert total_steps(settings, 18) == (30000, 1500)
    assert total_steps(PretrainSettings(epochs=800, warmup_epochs=40, batch_size=256), 86524) == (
        800 * 338,
        40 * 338,
    )
    assert total_steps(PretrainSettings(epochs=2, batch_size=4), 9) == (6, 0)


def test_steps_go_before_epochs_and_a_short_run_warms_up_at_most_half():
    assert total_steps(PretrainSettings(epochs=10, warmup_epochs=5, steps=20, batch_size=1), 100) == (20, 10)
    assert total_steps(PretrainSettings(steps=20, warmup_steps=5), 3) == (20, 5)


def test_what_is_asked_for_counts_also_where_the_preset_says_the_other():
    assert total_steps(resolve(BTCV, "pretrain", "demo", overrides={"epochs": 3}), 15) == (12, 6)
    assert total_steps(resolve(BTCV, "pretrain", "paper", overrides={"warmup_steps": 0}), 18)[1] == 0
    assert total_steps(resolve(BTCV, "pretrain", "paper", overrides={"steps": 50}), 18)[0] == 50


def test_a_run_without_length_is_refused():
    with pytest.raises(UserError, match="--set steps="):
        total_steps(PretrainSettings(), 5)


def test_settings_survive_yaml():
    made = FinetuneSettings(crop_size=(32, 32), spacing_mm=(1.5, 1.5), base_lr=1e-5, betas=(0.9, 0.999))
    again = make_settings(
        FinetuneSettings, yaml.safe_load(yaml.safe_dump(as_dict(made))), where="config.yaml"
    )
    assert again == made


@pytest.mark.parametrize(
    "name",
    ["018", "1e-4", "12", "yes", "0x1F", "2024-01-02", "null", "1.5e3", "01_000", "~", "", "1:30", "é"],
)
def test_what_a_run_writes_down_is_read_again_as_the_same(name):
    values = {"cases": [name], name: 1, "numbers": [18, 1e-4, 1.0, True, None]}
    assert read_yaml(write_yaml(values)) == values


def test_what_is_said_last_counts_also_in_the_other_of_two_ways_to_say_it(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "all: {base_lr: 6.4e-3, batch_size: 4, epochs: 10}\nbtcv: {pretrain: {lr: 2.0e-3, steps: 7}}"
    )
    made = resolve(BTCV, "pretrain", str(path))
    assert learning_rate(made) == 2e-3 and (made.steps, made.epochs) == (7, 0)
    assert learning_rate(resolve(BTCV, "finetune", str(path))) == pytest.approx(1e-4)
    assert learning_rate(resolve(BTCV, "pretrain", str(path), overrides={"base_lr": 0.64})) == pytest.approx(
        0.01
    )
    assert learning_rate(resolve(BTCV, "finetune", str(path), overrides={"lr": 0.5})) == 0.5


def test_every_setting_is_described_with_a_default_within_its_bounds(capsys):
    rows = describe()
    for cls in STAGE_SETTINGS.values():
        assert {f.name for f in dataclasses.fields(cls)} <= {row["setting"] for row in rows}
        for f in dataclasses.fields(cls):
            numbers = f.default if isinstance(f.default, tuple) else (f.default,)
            assert (
                all(f.metadata["least"] <= n <= f.metadata["most"] for n in numbers if not isinstance(n, str))
                and len(f.metadata["help"]) > 5
            )
    assert main(["settings", "pretrain"]) == 0
    told = capsys.readouterr().out
    assert (
        "mask_ratio " in told
        and "share of the patches that are hidden" in told
        and "feature_size" not in told
    )


def test_a_zero_that_means_the_other_way_leaves_the_other_alone(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("all: {lr: 2.0e-3, epochs: 10}")
    made = resolve(BTCV, "pretrain", str(path), overrides={"base_lr": 0, "steps": 0})
    assert learning_rate(made) == 2e-3 and made.epochs == 10
    with pytest.raises(UserError, match="mask_ratio"):
        build_mae(
            BTCV,
            resolve(
                BTCV,
                "pretrain",
                str(path),
                overrides={"mask_ratio_range": [0.5, 0.99], "crop_size": [32, 32, 32]},
            ),
        )
