"""The loop over steps, resumable to the bit. Knows neither task nor method."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smae_utils.data.batches import Scans, Steps, check_batch, derive_seed, training_loader
from smae_utils.errors import UserError
from smae_utils.method.checkpoints.load import parameter_count
from smae_utils.method.checkpoints.save import WEIGHTS, save_weights
from smae_utils.work import devices
from smae_utils.work.build import build_optimizer
from smae_utils.work.optimizer import cosine_schedule
from smae_utils.work.progress import ProgressLine, Say
from smae_utils.work.provenance import commit, now
from smae_utils.work.run_folder import Run, forget_dead_lock, only_process
from smae_utils.work.settings import Settings, as_dict, learning_rate, total_steps

Validate = Callable[[nn.Module], dict[str, float]]  # network -> figures of the validation cases
BEST = "best.safetensors"


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leaves the global generators of torch, numpy and Python as they were: training seeds them anew each
    step.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        elif torch.cuda.is_initialized():  # as a GPU starts whose first use comes now
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C and SIGTERM only set what the yielded function returns: stop between two steps, never
    inside an update.

    A second one interrupts at once. Outside the main thread, which gets no signals, this does nothing.
    """
    asked = False

    def ask(number, frame) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_parts(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A batch as `count` smaller ones, of crops in their order."""
    size = len(batch["image"]) // count
    parts = (slice(i * size, (i + 1) * size) for i in range(count))
    return [{key: values[part] for key, values in batch.items()} for part in parts]


def check_parts(scans: int, parts: int) -> None:
    """Refuse gradients in parts of unequal size; `scans` are those of a step in one process."""
    if scans % parts:
        raise UserError(f"accumulate={parts} must divide the {scans} scans of a step in each process")


class Loop:
    """Schedule, clipping, logging, checks and state around one step, see `run`."""

    def __init__(
        self,
        config: dict[str, Any],
        out: str | Path,
        model: nn.Module,
        scans: Scans,
        augment: Any,
        settings: Settings,
        loss_of: Callable[[nn.Module, dict], Tensor],
        report: Say,
        layer_decay: float = 1.0,
        facts: dict[str, Any] | None = None,
    ):
        self.config, self.out, self.model, self.settings = config, out, model, settings
        self.scans, self.augment, self.loss_of, self.report = scans, augment, loss_of, report
        self.layer_decay, self.facts = layer_decay, facts
        self.steps, self.warmup = total_steps(settings, len(scans))

    def run(self, resume: bool, validate: Validate | None, best: bool = False) -> Run:
        """Train to the last step and write the weights; `best` keeps those with the highest `val_score`
        instead of the last.

        Raises:
            UserError: if the run folder cannot be used or is being trained by another process, or if the loss
                is not finite.
        """
        defaults = as_dict(type(self.settings)())
        run = Run.check(self.out, self.config, resume, defaults)
        precision, line = self.settings.precision, ""
        if run.exists:  # the precision that a run was started in is a part of it
            precision, line = devices.usable_precision(
                run.config.get("precision", precision), devices.best_device()
            )
        track = self.settings.track
        accelerator, precision = devices.make_accelerator(precision, track, run.path)
        report = devices.of_main_process(self.report)
        # Before a folder is made:
        check_batch(len(self.scans), self.settings.batch_size, accelerator.num_processes)
        check_parts(self.settings.batch_size // accelerator.num_processes, self.settings.accumulate)
        if run.finished:
            forget_dead_lock(self.out)
            report(f"{run.path} is already finished")
            return run
        if line:
            report(f"note: {line}")
        accelerator.wait_for_everyone()
        with only_process(self.out) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                Run.start(self.out, self.config, resume, defaults)
            accelerator.wait_for_everyone()
            try:
                self._train(run, accelerator, precision, report, validate, best)
            finally:
                accelerator.end_training()
        return run

    def _train(
        self, run: Run, accelerator, precision: str, report: Say, validate: Validate | None, best: bool
    ) -> None:
        """From the run's last state, or from the start, to the last step."""
        optimizer = build_optimizer(self.model, self.settings, self.layer_decay)
        form = devices.memory_format(len(self.settings.crop_size))
        self.model.to(memory_format=form)  # type: ignore[call-overload]  # torch's types leave it out
        model, optimizer = accelerator.prepare(self.model, optimizer)
        schedule = cosine_schedule(optimizer, self.steps, self.warmup)
        state = self._begin(run, accelerator, precision, report)
        loader = self._loader(state["step"], accelerator)
        first, begin, started = state["step"], time.monotonic(), time.monotonic() - state["seconds"]
        model.train()
        with deferred_interrupt() as interrupted:
            for step, batch in enumerate(loader, start=first + 1):
                # Seeded anew each step, so that drop path after a resume draws what it would have drawn.
                torch.manual_seed(derive_seed(self.settings.seed, 30, step, accelerator.process_index))
                schedule.step_update(step)
                optimizer.zero_grad()
                loss = self._gradients(accelerator, model, devices.on_device(accelerator, batch))
                norm = accelerator.clip_grad_norm_(model.parameters(), self.settings.clip_grad or math.inf)
                # The only place in a step that waits for the device.
                loss, norm = torch.stack([loss, norm.to(loss)]).tolist()
                self._check_finite(loss, norm, step, batch)
                optimizer.step()

                state["losses"].append(loss)
                state["step"], state["seconds"] = step, time.monotonic() - started
                scores = self._scores(accelerator, model, validate, step)
                if best and scores:
                    self._keep_best(run, accelerator, state, scores["val_score"])
                left = (self.steps - step) * (time.monotonic() - begin) / (step - first)
                self._log(run, accelerator, report, state, scores, optimizer.param_groups[-1]["lr"], left)
                stop = devices.any_process(accelerator, interrupted())
                self._save(run, accelerator, state, stop)
                if stop and step < self.steps:
                    report(
                        f"interrupted after step {step}: the run is saved, "
                        "go on with --resume (in Python: resume=True)"
                    )
                    raise KeyboardInterrupt
        if accelerator.is_main_process:
            if best and (run.path / BEST).is_file():
                (run.path / BEST).replace(run.path / WEIGHTS)
            else:
                save_weights(self.model, run.path / WEIGHTS, self.facts)
        accelerator.wait_for_everyone()
        report(f"wrote {run.path / WEIGHTS} after {state['seconds']:.0f} s")

    def _gradients(self, accelerator, model: nn.Module, batch: dict) -> Tensor:
        """Forward and backward of a step, in `accumulate` parts; the loss (), averaged over processes."""
        parts, total = in_parts(batch, self.settings.accumulate), torch.zeros(1, device=accelerator.device)
        for number, part in enumerate(parts, start=1):
            # Several processes share their gradients once a step, with those of the last part.
            with nullcontext() if number == len(parts) else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = self.loss_of(model, part) / len(parts)
                accelerator.backward(loss)
            total += loss.detach()
        return accelerator.gather(total).mean()

    def _check_finite(self, loss: float, norm: float, step: int, batch: dict) -> None:
        """Refuse to step where the loss or the gradient's norm is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        saved = Run(self.out).state()
        raise UserError(
            f"the {what} at step {step} with cases "
            f"{', '.join(sorted(set(batch['case'])))}: look at these scans, "
            f"or lower lr (now {learning_rate(self.settings):g}). "
            + ("The run folder holds an earlier state" if saved else "Nothing was saved before that")
        )

    def _loader(self, start: int, accelerator) -> Iterable[dict]:
        """Batches of this process from step `start` + 1 to the last."""
        settings, rank, world = self.settings, accelerator.process_index, accelerator.num_processes
        steps = Steps(start, self.steps, settings.batch_size, rank, world)
        return training_loader(self.scans, self.augment, settings.seed, steps, settings.num_workers)

    def _begin(self, run: Run, accelerator, precision: str, report: Say) -> dict[str, Any]:
        """The state to go on from; notes down in the run who goes on, with what."""
        state: dict[str, Any] = {"step": 0, "losses": [], "best": None, "seconds": 0.0}
        if folder := run.state():
            state = devices.load_state(accelerator, folder)
            report(f"going on after step {state['step']}")
        device = devices.device_name(accelerator.device)
        if accelerator.is_main_process:
            run.cut_log(state["step"])
            sitting = {"device": device, "precision": precision, "processes": accelerator.num_processes}
            run.add_segment(
                {
                    "step": state["step"],
                    "date": now(),
                    **sitting,
                    "commit": commit(),
                    "num_workers": self.settings.num_workers,
                }
            )
            # `precision` stays that of the first sitting; what each computed in is in `segments`.
            run.note(**{**sitting, "precision": run.config.get("precision", precision)}, steps=self.steps)
        accelerator.wait_for_everyone()
        devices.track_run(accelerator, run)
        crops = f"{self.settings.batch_size} scans x {self.settings.crops_per_scan} crops"
        report(
            f"{self.config['stage']} {self.config['task']}: "
            f"{len(self.scans)} training scans, {self.steps} steps of {crops}, "
            f"{parameter_count(self.model) / 1e6:.2f} M parameters, {device}, {precision}"
        )
        return state

    def _scores(
        self, accelerator, model: nn.Module, validate: Validate | None, step: int
    ) -> dict[str, float]:
        """Figures of the validation cases where the step is due for them, else none."""
        every = self.settings.val_every
        if not validate or not every or (step < self.steps and step % every):
            return {}
        model.eval()
        with torch.inference_mode(), accelerator.autocast():
            scores = validate(accelerator.unwrap_model(model))
        model.train()
        return scores

    def _keep_best(self, run: Run, accelerator, state: dict[str, Any], score: float) -> None:
        if math.isnan(score):
            raise UserError(
                "no validation case can be scored (no class with both outcomes, "
                "or masks that are all empty): "
                "use --set select=last, or more validation cases"
            )
        if accelerator.is_main_process and (state["best"] is None or score > state["best"]):
            state["best"] = score
            save_weights(self.model, run.path / BEST, self.facts)

    def _log(
        self,
        run: Run,
        accelerator,
        report: Say,
        state: dict[str, Any],
        scores: dict[str, float],
        lr: float,
        left: float,
    ) -> None:
        """A line of progress where one is due: the mean loss since the last one, and `left` seconds to go."""
        step = state["step"]
        if not scores and step < self.steps and step % self.settings.log_every:
            return
        entry = {"step": step, "loss": sum(state["losses"]) / len(state["losses"]), **scores, "lr": lr}
        state["losses"] = []
        accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=step)
        if accelerator.is_main_process:
            run.log(**entry, seconds=round(state["seconds"], 2))
        shown = "  ".join(f"{k} {v:.4f}" for k, v in entry.items() if k not in ("step", "lr"))
        report(ProgressLine(f"step {step:>6}/{self.steps}  {shown}  lr {lr:.2e}  {left:.0f} s left"))

    def _save(self, run: Run, accelerator, state: dict[str, Any], stop: bool) -> None:
        """Weights to watch the network learn, and a state to go on from, where they are due."""
        step, settings = state["step"], self.settings
        if accelerator.is_main_process and settings.keep_every and step % settings.keep_every == 0:
            (run.path / "checkpoints").mkdir(exist_ok=True)
            save_weights(self.model, run.path / "checkpoints" / f"step{step:07d}.safetensors", self.facts)
        if stop or step == self.steps or step % settings.save_every == 0:
            devices.save_state(accelerator, run, state)
