"""The one place that knows accelerate: device, precision, processes and resumable state."""

from __future__ import annotations

import atexit
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object

from smae_utils.atomic import new_folder, part_of_folder, swap_folder, telling_of_a_full_disk, write_text
from smae_utils.errors import UserError
from smae_utils.work.run_folder import Run

TRACKERS = ("tensorboard", "wandb", "mlflow")
Item = TypeVar("Item")
Result = TypeVar("Result")


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware.

    Without it bf16 is hundreds of times slower than fp32.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes bf16 in hardware; older GPUs only imitate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bf16()


def pick_precision(wanted: str, device: torch.device) -> str:
    """The precision for a setting: "fp32", "bf16", or for "auto" bf16 where the device computes it.

    Raises:
        UserError: for another word.
    """
    if wanted not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision must be auto, fp32 or bf16, got {wanted!r}")
    if wanted != "auto":
        return wanted
    return "bf16" if computes_bf16(device) else "fp32"


def usable_precision(recorded: str, device: torch.device) -> tuple[str, str]:
    """The precision to go on in with a run made in `recorded`, and a line that tells of a change.

    It is the recorded one where `device` computes it in hardware, else fp32. "auto", as in runs that do not
    say what they were made in, is decided for this device. The line is "" when nothing changes.

    Raises:
        UserError: for another word than auto, fp32, bf16.
    """
    precision = pick_precision(recorded, device)
    if precision == "bf16" and not computes_bf16(device):
        return (
            "fp32",
            f"the run was made in bf16, which {device_name(device)} does not compute in hardware: fp32 here",
        )
    return precision, ""


@contextmanager
def inference_context(device: torch.device, precision: str) -> Iterator[None]:
    """Within it nothing records gradients, and networks compute in `precision` ("fp32" or "bf16")."""
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def best_device() -> torch.device:
    """The GPU that torch sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def make_accelerator(
    precision: str, track: Sequence[str] = (), folder: Path | None = None
) -> tuple[Accelerator, str]:
    """An accelerator for training in this process, and the precision it computes in ("fp32" or "bf16").

    Args:
        track: names of trackers that will be started, see `track_run`.
        folder: of the run, below which trackers that need a folder write.

    Raises:
        UserError: for a tracker that is unknown or not installed.
    """
    installed = {str(name) for name in get_available_trackers()} if track else set()
    for name in track:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r}: expected some of {', '.join(TRACKERS)}")
        if name not in installed:
            raise UserError(
                f"track={name} needs {name}, which is not installed: pip install {name}, or leave it out"
            )
    chosen = pick_precision(precision, best_device())
    # accelerate keeps its first precision for the whole process; a notebook's next cell may want another.
    AcceleratorState._reset_state()
    own = {"log_with": list(track), "project_dir": str(folder)} if track else {}
    # Else accelerate takes processes on a CPU for strangers to each other.
    cpu = best_device().type == "cpu"
    return Accelerator(mixed_precision="bf16" if chosen == "bf16" else "no", cpu=cpu, **own), chosen


def track_run(accelerator: Accelerator, run: Run) -> None:
    """Start the trackers that the accelerator was made with; without any this does nothing."""
    settings = {
        k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in run.config["settings"].items()
    }
    name = run.path.name
    own = {"wandb": {"name": name, "dir": str(run.path)}, "mlflow": {"run_name": name}}
    accelerator.init_trackers("smae", config=settings, init_kwargs=own)


def on_device(accelerator: Accelerator, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with its tensors where the network is, images in the memory format that is fastest there."""
    moved = {
        key: value.to(accelerator.device, non_blocking=True) if torch.is_tensor(value) else value
        for key, value in batch.items()
    }
    form = memory_format(moved["image"].ndim - 2)
    return {**moved, "image": moved["image"].contiguous(memory_format=form)}


def processes() -> int:
    """How many processes were launched together, by torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def of_main_process(report: Callable[[str], None]) -> Callable[[str], None]:
    """`report` in the process that reports; what says nothing in the others."""
    return report if is_main_process() else lambda line: None


@cache
def _together() -> PartialState:
    """This process among those it was launched with.

    Their connection is closed at the end of the program: one left open aborts an interpreter that is done.
    """
    state = PartialState(cpu=best_device().type == "cpu")
    atexit.register(state.destroy_process_group)
    return state


def in_shares(items: list[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """What `work` makes of each item of a list: each of several processes does its share, all get all."""
    if processes() == 1:
        return work(items)
    state = _together()
    share = items[state.process_index :: state.num_processes]
    parts = gather_object([work(share) if share else []])
    out: list[Any] = [None] * len(items)
    for rank, part in enumerate(parts):
        out[rank :: state.num_processes] = part
    return out


@contextmanager
def one_folder(out: Path) -> Iterator[Path]:
    """`new_folder`, which several processes fill together: it becomes `out` when all of them are through."""
    if processes() == 1:
        with new_folder(out) as part:
            yield part
        return
    state = _together()
    with new_folder(out) if state.is_main_process else nullcontext(part_of_folder(out)) as part:
        state.wait_for_everyone()
        yield part
        state.wait_for_everyone()


def device_name(device: torch.device) -> str:
    """The name of the GPU; else the kind of device, as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_format(ndim: int) -> torch.memory_format:
    """Channels last: convolutions ran 1.1 to 1.6 times faster so on the CPUs we tried."""
    return torch.channels_last if ndim == 2 else torch.channels_last_3d


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in any process: all have to stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())


def save_state(accelerator: Accelerator, run: Run, state: dict[str, Any]) -> None:
    """Write model, optimiser and `state` to the run's `last/`; whole at any moment."""
    new = run.path / "last.new"
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with telling_of_a_full_disk(new):
            accelerator.save_state(str(new))
    except OSError:
        # The disk is full: the last whole state stays.
        shutil.rmtree(new, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(new / "state.json", json.dumps(state))
        swap_folder(new, run.path / "last")
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Read back what `save_state` wrote into the prepared model and optimiser."""
    accelerator.load_state(str(folder))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
