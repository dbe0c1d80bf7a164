"""What is compared with what: sizes, seeds, learning-rate grids, conditions, arms and sweeps. Numbers are fixed here before any run (docs/protocol.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smae_utils.tasks import get_task

PRESET = "evidence"
TASKS = ("cxr14", "btcv", "brats")
N_TRAIN = {"btcv": 18, "brats": 24, "cxr14": 400}
N_SWEEP = {"btcv": (6, 12, 30), "brats": (6, 12), "cxr14": (60, 150, 2000)}
N_TEST = {"btcv": 60, "brats": 60, "cxr14": 600}
N_TEST_FULL = {"btcv": 24, "brats": 24, "cxr14": 300}  # of the real data's matrix sizes: seconds each to draw and to score
SEEDS = (101, 102, 103, 104, 105)
DEV_SEED, DEV_TEST_SEED, TEST_SEED = 77, 78, 100
# Grids of one size for every arm: factors of the preset's learning rate, and layer decay.
GRID = ((1.0, 1.0), (2.0, 1.0), (1.0, 0.75))
CNN_GRID = ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0))  # a CNN has no blocks to decay


@dataclass(frozen=True)
class Condition:
    """What is done to the training data of a seed, or to the length of training, apart from which all arms stay as they are.

    Attributes:
        name: how tables and folders call it; "" is the study's own data.
        context: share of each phantom structure that follows the patient's latents; the test phantoms are drawn alike.
        n_train: how many training scans, the first of the seed's; 0: as many as always.
        shuffle_labels: each training scan gets the label of another one.
        finetune_times: fine-tuning steps of every arm, as a multiple of the preset's.
    """

    name: str = ""
    context: float = 1.0
    n_train: int = 0
    shuffle_labels: bool = False
    finetune_times: float = 1.0

    @property
    def draws(self) -> bool:
        """Whether it needs phantoms of its own, which real data cannot have."""
        return self.context != 1 or self.n_train > 0 or self.shuffle_labels


PLAIN = Condition()


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        init: "scratch", or the name of a pre-training of this seed.
        tuned_as: whose learning rate and layer decay it takes.
        overrides: settings it has of its own.
        equal_compute: as many more fine-tuning steps as so many times the preset's pre-training cost, by counted FLOPs.
        condition: the data it is trained on.
        all_images: pre-trained on all images of the seed, also where the condition leaves only some of them with a label.
    """

    name: str
    init: str = "scratch"
    tuned_as: str = "scratch"
    overrides: tuple[tuple[str, Any], ...] = ()
    equal_compute: float = 0.0
    condition: Condition = PLAIN
    all_images: bool = False


# Settings of each pre-training; `times` multiplies the preset's steps, `crops_times` its crops a step. Two parts of the study are sweeps over them.
MASKING: dict[str, dict[str, Any]] = {
    **{f"mask{ratio}": {"mask_ratio": ratio} for ratio in (0.125, 0.25, 0.5, 0.9)},
    "raw_pixels": {"norm_pix_loss": False},
}
LONGER: dict[str, dict[str, Any]] = {
    "steps_x0.25": {"times": 0.25},
    "steps_x4": {"times": 4},
    "raw_pixels_x4": {"norm_pix_loss": False, "times": 4},
}
# Of a scan many crops can be cut at once, of a radiograph one.
LONGER_3D: dict[str, dict[str, Any]] = {**LONGER, "samples_x16": {"times": 4, "crops_times": 4}}
PRETRAININGS: dict[str, dict[str, Any]] = {"self": {}, "shuffled": {"shuffle_patches": True}, **MASKING, **LONGER_3D}
MAIN = (
    Arm("scratch"),
    Arm("self", "self", "self"),
    Arm("scratch_equal_compute", equal_compute=1),
    Arm("cnn", tuned_as="cnn", overrides=(("network", "cnn"),)),
)
CONTROLS = (
    Arm("shuffled_patches", "shuffled", "self"),
    Arm("permuted_weights", "permuted", "self"),
    Arm("shuffled_labels", condition=Condition("shuffled_labels", shuffle_labels=True)),
)


def _twins(condition: Condition) -> tuple[Arm, ...]:
    """Scratch and self on other data."""
    return Arm("scratch", condition=condition), Arm("self", "self", "self", condition=condition)


def sweep(part: str, task: str) -> tuple[Arm, ...]:
    """The arms of a sweep: `masking`, `longer`, `finetune4x`, `context` or `scans`."""
    if part == "finetune4x":
        condition = Condition("finetune4x", finetune_times=4)
        return (
            Arm("scratch", condition=condition),
            Arm("self", "self", "self", condition=condition, all_images=True),
            Arm("steps_x4", "steps_x4", "self", condition=condition, all_images=True),
            Arm("raw_pixels_x4", "raw_pixels_x4", "self", condition=condition, all_images=True),
            Arm("scratch_equal_compute", condition=condition, equal_compute=4),  # of the longest: steps_x4, raw_pixels_x4
        )
    if part == "context":
        return tuple(arm for c in (0.0, 0.5) for arm in _twins(Condition(f"context{c}", context=c)))
    if part == "scans":
        arms: list[Arm] = []
        for n in N_SWEEP[task]:
            condition = Condition(f"{n}scans", n_train=n)
            arms += _twins(condition)
            if n < N_TRAIN[task]:
                arms.append(Arm("self_all_images", "self", "self", condition=condition, all_images=True))
        return tuple(arms)
    longer = LONGER_3D if get_task(task).spatial_dims == 3 else LONGER
    return tuple(Arm(name, name, "self") for name in {"masking": MASKING, "longer": longer}[part])


GATES = (
    Arm("encoder_zeroed", overrides=(("encoder", "zeroed"),)),
    Arm("encoder_frozen_random", overrides=(("encoder", "frozen"),)),
)
