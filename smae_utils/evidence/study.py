"""What the study consists of: data of each seed, the arms, and the runs they need. Numbers are fixed here before any run (docs/protocol.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smae_utils.cost import crop_cost
from smae_utils.data import derive_seed, read_splits
from smae_utils.errors import UserError
from smae_utils.evaluation import evaluate, read_metrics
from smae_utils.phantoms import write_phantoms
from smae_utils.runs import write_text
from smae_utils.settings import Settings, resolve, total_steps
from smae_utils.tasks import get_task
from smae_utils.training import finetune, pretrain
from smae_utils.weights import WEIGHTS

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
LONGER: dict[str, dict[str, Any]] = {"steps_x0.25": {"times": 0.25}, "steps_x4": {"times": 4}}
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
            Arm("scratch_equal_compute", condition=condition, equal_compute=4),  # of the longest: steps_x4
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


@dataclass(frozen=True)
class Setup:
    """Where the runs of a study lie and how large they are; each process gets it.

    Attributes:
        out: folder of phantoms and runs.
        data: folder of the real download; None draws phantoms.
        quick: divides steps and cases, for tests only.
        threads: of each process.
        preset: how large the networks are and how long they are trained.
        size: of the phantoms, see `write_phantoms`.
    """

    out: Path
    data: str | None = None
    quick: int = 1
    threads: int = 1
    preset: str = PRESET
    size: str = "demo"

    @property
    def name(self) -> str:
        """What keeps figures of other data or sizes apart from the study's own, in folders; "" is the study's own."""
        own = PRESET, "demo"
        scale = "" if (self.preset, self.size) == own else f"{Path(self.preset).stem}-{self.size}"
        return "-".join(part for part in ("real" if self.data else "", scale) if part)

    def cases(self, part: str, task: str) -> int:
        """How many phantoms are drawn for `train` or `test`."""
        return (N_TRAIN if part == "train" else N_TEST_FULL if self.size == "full" else N_TEST)[task]


class Unit:
    """One task and seed: its data, its pre-trainings and its arms, in folders of their own; everything is done once and found again.

    Args:
        condition: what is done to the training data.

    Raises:
        UserError: for a condition of phantoms with real data.
    """

    def __init__(self, setup: Setup, task: str, seed: int, condition: Condition = PLAIN):
        self.setup, self.task, self.seed, self.condition = setup, task, seed, condition
        self.real, self.quick = setup.data, setup.quick
        if setup.data and condition.draws:
            raise UserError(f"the condition {condition.name} draws phantoms of its own: it has no meaning with --data")
        # Other data or sizes, and quick runs, have folders of their own: their figures must not pass for the study's.
        name = f"{setup.name}-{task}" if setup.data else setup.name
        self.root = Path(setup.out).resolve() / name / (f"quick{setup.quick}" if setup.quick > 1 else "")
        self.folder = self.root / task / f"seed{seed}" / condition.name
        self.dev = seed == DEV_SEED
        self.record = get_task(task)

    def settings(self, stage: str, **overrides: Any) -> Settings:
        """The preset's settings of this task."""
        return resolve(self.record, stage, self.setup.preset, overrides=overrides)

    def under(self, condition: Condition) -> Unit:
        """The same seed with other data."""
        return self if condition == self.condition else Unit(self.setup, self.task, self.seed, condition)

    def list_file(self) -> str:
        """The task whose cases these are: the real task, or a list of freshly drawn training phantoms and the fixed test phantoms."""
        if self.real:
            return self.task
        file = self.folder / "cases.json"
        if not file.exists():
            training = self._entries(self.condition.n_train or self.setup.cases("train", self.task), self.seed)
            test = self._entries(self.setup.cases("test", self.task), DEV_TEST_SEED if self.dev else TEST_SEED)
            file.parent.mkdir(parents=True, exist_ok=True)
            if self.condition.shuffle_labels:
                training = shuffled_labels(training, self.seed, self.folder / "labels")
            record = {"name": f"{self.task} phantoms, seed {self.seed}", "like": self.task, "training": training, "test": test}
            write_text(file, json.dumps(record, indent=0))
        return str(file)

    def _entries(self, n: int, seed: int) -> list[dict]:
        folder = self.phantoms(max(6, n // self.quick), seed, **({} if self.condition.context == 1 else {"context": self.condition.context}))
        splits = self.record.read_splits(folder, 0, 0)
        cases = sorted((c for part in splits.values() for c in part), key=lambda c: c["case"])
        plain = {"image": str, "label": lambda v: v if isinstance(v, str) else [int(x) for x in v]}
        return [{"case": f"{seed}-{c['case']}", "patient": f"{seed}-{c['patient']}", **{k: make(c[k]) for k, make in plain.items()}} for c in cases]

    def phantoms(self, n: int, seed: int, **how: Any) -> Path:
        """Folder of `n` phantoms of this task and the study's size, see `write_phantoms`; drawn once."""
        return phantom_folder(self.root, self.task, n, seed, **how, **({} if self.setup.size == "demo" else {"size": self.setup.size}))

    def overrides(self, stage: str, values: dict[str, Any]) -> dict[str, Any]:
        """Settings on top of the preset: the seed, and in a quick run fewer steps."""
        out = {"seed": self.seed, **values}
        if self.quick > 1:
            few = max(2, self.setup.cases("train", self.task) // self.quick)
            out |= {"steps": max(2, (out.get("steps") or self.steps(stage)) // self.quick), "warmup_steps": 1}
            out |= {"batch_size": min(self.settings(stage).batch_size, few)}
        return out

    def steps(self, stage: str) -> int:
        """The preset's steps on this task's training scans."""
        settings = self.settings(stage)
        n_train = len(read_splits(self.record, self.real, settings)["train"]) if self.real else self.setup.cases("train", self.task)
        return total_steps(settings, n_train)[0]

    def pretrained(self, name: str) -> Path:
        """Run folder of a pre-training, or the file of a control made from one; trains it when it is not there."""
        if name == "permuted":
            return self._permuted(self.pretrained("self"))
        folder = self.folder / f"pretrain-{name}"
        values = dict(PRETRAININGS[name])
        if times := values.pop("times", None):
            values["steps"] = round(self.steps("pretrain") * times)
        if times := values.pop("crops_times", None):
            values["crops_per_scan"] = self.settings("pretrain").crops_per_scan * times
        values = self.overrides("pretrain", values)
        pretrain(self.list_file(), self.real or "", folder, self.setup.preset, values, resume=True, report=self._say)
        return folder

    def _permuted(self, source: Path) -> Path:
        """The pre-trained encoder with the numbers of each tensor in random order: same size and spread, nothing learned."""
        target = self.folder / "permuted.safetensors"
        if not target.exists():
            with safe_open(source / WEIGHTS, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys() if name.startswith("encoder.")}  # noqa: SIM118 (no mapping)
                metadata = handle.metadata()
            rng = np.random.default_rng(self.seed)
            save_file({name: _permute(value, rng) for name, value in tensors.items()}, target, metadata=metadata)
        return target

    def finetune_steps(self, times: float = 1.0, pretrainings: float = 0.0) -> int:
        """`times` the preset's fine-tuning steps, and as many more as cost what `pretrainings` times its pre-training costs, by counted FLOPs."""
        pre, fine = (
            crop_cost(self.record, s).flops * self.steps(stage) * s.batch_size * s.crops_per_scan
            for stage, s in ((stage, self.settings(stage)) for stage in ("pretrain", "finetune"))
        )
        return round(self.steps("finetune") * (times + pretrainings * pre / fine))

    def arm_settings(self, arm: Arm, tuned: dict[str, tuple[float, float]]) -> dict[str, Any]:
        """Overrides of an arm: its learning rate and layer decay, its own settings, its number of steps."""
        factor, decay = tuned[arm.tuned_as]
        base = self.settings("finetune", **dict(arm.overrides))
        values = {**dict(arm.overrides), "base_lr": base.base_lr * factor, "layer_decay": decay}
        if self.condition.finetune_times != 1 or arm.equal_compute:
            values["steps"] = self.finetune_steps(self.condition.finetune_times, arm.equal_compute)
        return self.overrides("finetune", values)

    def run_arm(self, arm: Arm, tuned: dict[str, tuple[float, float]], name: str = "") -> dict[str, float]:
        """Fine-tune and score an arm on the test cases; returns the mean figures and the number of dead classes."""
        if arm.condition != self.condition:
            return self.under(arm.condition).run_arm(arm, tuned, name)
        folder = self.folder / (name or arm.name)
        if not (folder / "metrics.json").exists():
            init = "scratch" if arm.init == "scratch" else (self.under(PLAIN) if arm.all_images else self).pretrained(arm.init)
            finetune(self.list_file(), self.real or "", folder, init, self.setup.preset, self.arm_settings(arm, tuned), resume=True, report=self._say)
            evaluate(folder, save_masks=False, report=self._say)
        metrics = read_metrics(folder)
        out = {k: v for k, v in metrics["mean"].items() if v is not None}
        if self.record.kind == "segmentation":
            out["dead_classes"] = float(sum(c["dsc"] == 0 for c in metrics["classes"].values()))
        return out

    def _say(self, line: str) -> None:
        if not line.startswith("  "):
            print(f"[{self.task} {self.seed}] {line}", flush=True)


def _permute(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return tensor.flatten()[torch.from_numpy(rng.permutation(tensor.numel()))].reshape(tensor.shape)


def shuffled_labels(entries: list[dict], seed: int, folder: Path) -> list[dict]:
    """Entries of a list, each with the label of the next in a random circle; masks are laid onto the new scan's grid, voxel by relative place."""
    order = np.random.default_rng(derive_seed(seed, 41)).permutation(len(entries))
    source = {int(a): int(b) for a, b in zip(order, np.roll(order, 1))}
    out = []
    for i, entry in enumerate(entries):
        label = entries[source[i]]["label"]
        if isinstance(label, str):
            image, other = nib.load(entry["image"]), nib.as_closest_canonical(nib.load(label))
            own = nib.as_closest_canonical(nib.Nifti1Image(np.zeros(image.shape[:3], np.uint8), image.affine))
            index = np.ix_(*(np.arange(n) * m // n for n, m in zip(own.shape, other.shape)))
            turn = nib.orientations.ornt_transform(*(nib.io_orientation(a) for a in (own.affine, image.affine)))
            label = folder / f"{entry['case']}.nii.gz"
            label.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.asarray(other.dataobj)[index], own.affine).as_reoriented(turn), label)
        out.append({**entry, "label": str(label) if isinstance(label, Path) else label})
    return out


def phantom_folder(root: Path, task: str, n: int, seed: int, **how) -> Path:
    """Phantoms of a seed, written once; a kill leaves no half folder."""
    name = "-".join([f"{task}-n{n}-seed{seed}", *(f"{k}{v}" for k, v in how.items())])
    folder = Path(root).resolve() / "data" / name
    if not folder.exists():
        part = folder.with_name(f"{name}.part{torch.initial_seed() % 997}-{np.random.SeedSequence().entropy % 10**6}")
        write_phantoms(task, part, n, seed, **how)
        try:
            part.rename(folder)
        except OSError:  # another process was faster; its folder holds the same bytes
            import shutil

            shutil.rmtree(part)
    return folder
