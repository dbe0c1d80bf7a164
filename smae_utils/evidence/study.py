"""The runs of the study: data of each seed, its pre-trainings and its arms, made once and found again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smae_utils.cost import crop_cost
from smae_utils.data import derive_seed, read_splits
from smae_utils.errors import UserError
from smae_utils.evaluation import evaluate, metrics_file, read_metrics
from smae_utils.evidence.arms import DEV_SEED, DEV_TEST_SEED, N_TEST, N_TEST_FULL, N_TRAIN, PLAIN, PRESET, PRETRAININGS, TEST_SEED, Arm, Condition
from smae_utils.phantoms import write_phantoms
from smae_utils.runs import write_text
from smae_utils.settings import Settings, resolve, total_steps
from smae_utils.tasks import Splits, get_task
from smae_utils.training import finetune, pretrain
from smae_utils.weights import WEIGHTS


class Made(NamedTuple):
    """Where and by what a run was made."""

    machine: str
    date: str
    commit: str
    torch: str
    device: str
    precision: str


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

    def folder(self, task: str) -> str:
        """The folder of a task's runs and tables below those of the study; real data have one each."""
        return f"{self.name}-{task}" if self.data else self.name

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
        self.made: set[Made] = set()
        if setup.data and condition.draws:
            raise UserError(f"the condition {condition.name} draws phantoms of its own: it has no meaning with --data")
        # Other data or sizes, and quick runs, have folders of their own: their figures must not pass for the study's.
        self.root = Path(setup.out).resolve() / setup.folder(task) / (f"quick{setup.quick}" if setup.quick > 1 else "")
        self.folder = self.root / task / f"seed{seed}" / condition.name
        self.dev = seed == DEV_SEED
        # The real test cases are for the fresh seeds alone: learning rates and gates look at validation cases there.
        self.scored = "val" if self.dev and self.real else "test"
        self.held_out = {"train_on_val": False} if self.scored == "val" else {}
        self.record = get_task(task)

    def settings(self, stage: str, arm: str = "scratch", **overrides: Any) -> Settings:
        """The preset's settings of this task; for fine-tuning those of its scratch or self arm."""
        return resolve(self.record, stage, self.setup.preset, arm, {**self.held_out, **overrides})

    def splits(self, stage: str) -> Splits:
        """Train, val and test cases of a stage."""
        return read_splits(get_task(self.list_file()), self.real or "", self.settings(stage))

    def under(self, condition: Condition) -> Unit:
        """The same seed with other data."""
        if condition == self.condition:
            return self
        other = Unit(self.setup, self.task, self.seed, condition)
        other.made = self.made
        return other

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
        """Settings on top of the preset: the seed; with few scans or in a quick run no larger batches than these allow, and steps that do not follow from them."""
        out = {"seed": self.seed, **self.held_out, **values}
        if self.quick > 1 or self.condition.n_train:
            steps = out.get("steps") or self.steps(stage)
            out |= {"steps": max(2, steps // self.quick), "batch_size": min(self.settings(stage).batch_size, len(self.splits(stage)["train"]))}
        if self.quick > 1:
            out["warmup_steps"] = 1
        return out

    def steps(self, stage: str) -> int:
        """The preset's steps; where it counts epochs, those over the training scans that are there without a condition."""
        settings = self.settings(stage)
        return settings.steps or total_steps(settings, len(self.under(PLAIN).splits(stage)["train"]))[0]

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
            # The position table is not learned, and scratch starts from it too.
            made = {name: value if name == "encoder.pos_embed" else _permute(value, rng) for name, value in tensors.items()}
            save_file(made, target, metadata=metadata)
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
        base = self.settings("finetune", "scratch" if arm.init == "scratch" else "self", **dict(arm.overrides))
        values = {**dict(arm.overrides), "base_lr": base.base_lr * factor, "layer_decay": decay}
        if self.condition.finetune_times != 1 or arm.equal_compute:
            values["steps"] = self.finetune_steps(self.condition.finetune_times, arm.equal_compute)
        return self.overrides("finetune", values)

    def run_arm(self, arm: Arm, tuned: dict[str, tuple[float, float]], name: str = "") -> dict[str, float]:
        """Fine-tune and score an arm on the test cases; returns the mean figures and the number of dead classes.

        Raises:
            UserError: when the folder holds a run of other settings or data.
        """
        if arm.condition != self.condition:
            return self.under(arm.condition).run_arm(arm, tuned, name)
        folder = self.folder / (name or arm.name)
        init = "scratch" if arm.init == "scratch" else (self.under(PLAIN) if arm.all_images else self).pretrained(arm.init)
        run = finetune(
            self.list_file(), self.real or "", folder, init, self.setup.preset, self.arm_settings(arm, tuned), resume=True, report=self._say
        )
        if not metrics_file(folder, self.scored).exists():
            evaluate(folder, split=self.scored, save_masks=False, report=self._say)
        metrics, config = read_metrics(folder, self.scored), run.config
        source = config["provenance"]
        self.made.add(Made(source["machine"], source["date"], source["commit"], source["packages"]["torch"], config["device"], config["precision"]))
        out = {k: v for k, v in metrics["mean"].items() if v is not None}
        if self.record.kind == "segmentation":
            out["dead_classes"] = float(sum(c["dsc"] == 0 for c in metrics["classes"].values()))
        return out

    def table(self, rows: list, columns: list[str] | None = None) -> pd.DataFrame:
        """Rows as a table that carries, in `attrs["made"]`, where the runs behind it were made."""
        made = pd.DataFrame(rows, columns=columns)
        made.attrs["made"] = sorted(self.made)
        return made

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
