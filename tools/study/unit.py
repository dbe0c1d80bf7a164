"""One unit of a study, a seed and a fold: its lists, pre-trainings and arms, each made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smae_utils.atomic import new_file
from smae_utils.data.batches import derive_seed
from smae_utils.data.tasks import get_task
from smae_utils.locks import held
from smae_utils.method.checkpoints.load import load_weights
from smae_utils.method.checkpoints.save import WEIGHTS
from smae_utils.work.build import build_model
from smae_utils.work.comparison import read_metrics
from smae_utils.work.cost import crop_cost
from smae_utils.work.evaluation import evaluate
from smae_utils.work.finetune import finetune
from smae_utils.work.linear_probe import effective_rank, linear_probe, read_tokens
from smae_utils.work.pretrain import pretrain
from smae_utils.work.provenance import provenance
from smae_utils.work.settings import FinetuneSettings, PretrainSettings, Settings, make_settings
from tools.study.cases import all_cases, draw_labelled, parts, write_list
from tools.study.plan import Arm, Row, Study

# Scans that a linear probe is scored on, which have many tokens each; of whole images all are scored.
PROBED = 20
PRESET = ""  # what a study's file does not say are the defaults of `work.settings`


class Made(NamedTuple):
    """Where and by what a run was made."""

    machine: str
    date: str
    commit: str
    torch: str
    device: str
    precision: str


@dataclass(frozen=True)
class Place:
    """Where a study's data and runs lie."""

    data: str
    out: Path


class Unit:
    """Runs of one seed and fold.

    Args:
        design: settings on top of the study's own, for both stages, kept apart from it by `name`.
    """

    def __init__(
        self,
        study: Study,
        place: Place,
        seed: int,
        fold: int = 0,
        design: dict[str, Any] | None = None,
        name: str = "",
    ):
        self.study, self.place, self.seed, self.design = study, place, seed, design or {}
        self.folder = Path(place.out).resolve() / study.name / f"seed{seed}-fold{fold}"
        self.runs = self.folder / name if name else self.folder
        pool, test, self.about = all_cases(study, place.data)
        self.spatial_dims = self.about.get("spatial_dims") or get_task(self.about["like"]).spatial_dims
        self.training, self.test = parts(study, pool, test, seed, fold)

    def list_of(self, row: Row | None) -> str:
        """The list of the row's labelled cases; of None that of all training images, without labels."""
        if row is None:
            return str(
                write_list(
                    self.folder / "all-images.json", self.about, self.training, self.test, labels=False
                )
            )
        labelled = draw_labelled(self.training, row, self.seed)
        return str(
            write_list(
                self.folder / f"labelled-{str(row).replace('%', 'percent')}.json",
                self.about,
                labelled,
                self.test,
            )
        )

    def values(
        self, stage: str, row: Row | None, own: dict[str, Any], arm: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Settings of a run. A step has the study's `crops`, of as many scans as there are."""
        design = {
            k: v for k, v in self.design.items() if k not in ("pretrain", "finetune")
        } | self.design.get(stage, {})
        # fp32 on every machine, so that rows made on different ones are comparable.
        out: dict[str, Any] = {"seed": self.seed, "precision": "fp32"}
        out |= {"train_on_val": True, "val_every": 0, "save_every": 10**6, "log_every": 50}
        out |= self.study.all | getattr(self.study, stage) | design | own | (arm or {})
        crops = out.pop("crops", self.study.crops)
        scans = len(self.training if row is None else draw_labelled(self.training, row, self.seed))
        out["batch_size"] = max(n for n in range(1, crops + 1) if crops % n == 0 and n <= scans)
        # A 2D image gives one.
        out["crops_per_scan"] = 1 if self.spatial_dims == 2 else crops // out["batch_size"]
        return out

    def pretrained(self, name: str, row: Row) -> Path:
        """Run folder of a pre-training on the images of the row's labelled cases, or on all training images.

        It is made by one process, awaited by others.
        """
        own = dict(self.study.pretrainings[name])
        images = row if own.pop("images", "all") == "labelled" else None
        folder = self.runs / (
            f"pretrain-{name}" + (f"-{images}".replace("%", "percent") if images is not None else "")
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(Path(f"{folder}.lock")):
            pretrain(
                self.list_of(images),
                "",
                folder,
                PRESET,
                self.values("pretrain", images, own),
                resume=True,
                report=self._say,
            )
        return folder

    def scaled(self, name: str, row: Row, finetuning: FinetuneSettings) -> Path:
        """Random weights, each tensor with the mean and spread of the pre-trained one.

        They have its size without what it learned. The position table stays that of scratch.
        """
        source = self.pretrained(name, row) / WEIGHTS
        target = self.runs / f"scaled-{name}-{row}.safetensors".replace("%", "percent")
        # The same tensors written again are another file, which no run would go on with.
        if target.is_file():
            return target
        torch.manual_seed(derive_seed(self.seed, 20))
        fresh = build_model(get_task(self.list_of(row)), finetuning).state_dict()
        with safe_open(source, framework="pt") as handle:
            # SIM118: the handle is no mapping.
            learned = {key: handle.get_tensor(key) for key in handle.keys() if key.startswith("encoder.")}  # noqa: SIM118
            metadata = handle.metadata()
        noise = torch.Generator().manual_seed(derive_seed(self.seed, 41))
        made = {
            key: value
            if key not in fresh
            else fresh[key]
            if key == "encoder.pos_embed"
            else resized(fresh[key], value, noise)
            for key, value in learned.items()
        }
        with new_file(target) as part:
            save_file(made, part, metadata=metadata)
        return target

    def arm_values(self, arm: Arm, row: Row, tuned: dict[str, Any]) -> dict[str, Any]:
        """Settings of fine-tuning of an arm, with its number of steps."""
        values = self.values("finetune", row, tuned, arm.settings)
        steps = values["steps"]
        if arm.equal_compute:
            steps += values["steps"] * self.relative_cost(arm.equal_compute, row, tuned)
        return {**values, "steps": max(2, round(steps))}

    def relative_cost(self, name: str, row: Row, tuned: dict[str, Any]) -> float:
        """Counted FLOPs of a pre-training over those of fine-tuning."""
        task = get_task(self.list_of(row))
        own = {k: v for k, v in self.study.pretrainings[name].items() if k != "images"}
        flops = []
        kinds: tuple[tuple[str, dict, type[Settings]], ...] = (
            ("pretrain", own, PretrainSettings),
            ("finetune", tuned, FinetuneSettings),
        )
        for stage, more, kind in kinds:
            settings = make_settings(
                kind, self.values(stage, row if stage == "finetune" else None, more), "study"
            )
            flops.append(
                crop_cost(task, settings).flops
                * settings.steps
                * settings.batch_size
                * settings.crops_per_scan
            )
        return flops[0] / flops[1]

    def run_arm(
        self, name: str, arm: Arm, row: Row, tuned: dict[str, Any]
    ) -> tuple[dict[str, float], pd.DataFrame, Made]:
        """Fine-tune and score an arm: its mean figures, the table of its cases, and where it was made.

        The table is that of `evaluate`, a row a scored case and class, with `patient`.
        """
        values = self.arm_values(arm, row, tuned)
        if arm.init == "scaled":
            init: str | Path = self.scaled(arm.like, row, make_settings(FinetuneSettings, values, "study"))
        else:
            init = "scratch" if arm.init == "scratch" else self.pretrained(arm.init, row)
        folder = self.runs / f"labelled-{row}-{name}".replace("%", "percent")
        run = finetune(self.list_of(row), "", folder, init, PRESET, values, resume=True, report=self._say)
        table = evaluate(folder, save_masks=False, report=self._say)
        source, config = run.config["provenance"], run.config
        made = Made(
            source["machine"],
            source["date"],
            source["commit"],
            source["packages"]["torch"],
            config["device"],
            config["precision"],
        )
        patients = {case["case"]: case["patient"] for case in self.test}
        means = {
            name: value
            for name, value in read_metrics(folder)["mean"].items()
            if name in self.study.metrics and value is not None
        }
        return means, table.assign(patient=table["case"].map(patients)), made

    def probe(self, arm: Arm, row: Row) -> tuple[dict[str, float], Made]:
        """Mean AUC of a linear model on an encoder's tokens without fine-tuning, and their effective rank.

        The model is fitted on the row's labelled cases.
        """
        task = get_task(self.list_of(row))
        settings = make_settings(FinetuneSettings, self.values("finetune", row, {}), "study")
        torch.manual_seed(derive_seed(self.seed, 20))
        model = build_model(task, settings)
        if arm.init != "scratch":
            load_weights(model, self.pretrained(arm.init, row))
        labelled, scored = (
            draw_labelled(self.training, row, self.seed),
            self.test if task.kind == "classification" else self.test[:PROBED],
        )
        fitted = read_tokens(task, model.encoder, labelled, settings.spacing_mm)
        held_out = read_tokens(task, model.encoder, scored, settings.spacing_mm)
        figures = {"auc": linear_probe(fitted, held_out), "effective_rank": effective_rank(held_out[0])}
        source = provenance()
        return figures, Made(
            source["machine"], source["date"], source["commit"], source["packages"]["torch"], "cpu", "fp32"
        )

    def _say(self, line: str) -> None:
        if not line.startswith(("  ", "note", "step")):
            print(f"[{self.study.name} {self.seed}] {line}", flush=True)


def resized(fresh: torch.Tensor, learned: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """The fresh tensor with mean and spread of the learned one.

    What starts constant (norms, biases) is drawn around the learned mean.
    """
    spread = fresh.std(unbiased=False) if fresh.numel() > 1 else fresh.new_zeros(())
    standard = (fresh - fresh.mean()) / spread if spread > 0 else torch.randn(fresh.shape, generator=noise)
    return standard * learned.std(unbiased=False) + learned.mean()
