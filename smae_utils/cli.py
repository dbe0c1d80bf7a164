"""The command line: `python -m smae_utils COMMAND`. A user's mistake gives one line and exit code 2.

A fault of this package gives one line too, which names its place, and exit code 1. `--traceback` shows where
either arose.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

from smae_utils.errors import UserError

# Imports of torch, MONAI and the rest stand inside the commands: --help and a mistyped word answer at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command of the package; returns the exit code, see `run_command`."""
    return run_command(_parser(), argv)


def run_command(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, passing_on: Collection[str] = ("lab",)
) -> int:
    """Run the function of the command that was given.

    Args:
        parser: whose commands have a `function`; all take `--traceback`.
        argv: words of the command line; those of this process when left out.
        passing_on: commands of which all that follows is another program's, options too; they find it in
            `args.args`.

    Returns:
        The exit code: 0 done, 1 a fault of this package, 2 a mistake of the user's, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    passed_on: list[str] = []
    word = next((i for i, w in enumerate(argv) if not w.startswith("-")), len(argv))
    if argv[word : word + 1] and argv[word] in passing_on:
        argv, passed_on = argv[: word + 1], argv[word + 1 :]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that the terminal's encoding lacks is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    args.args = passed_on
    # A scheduler's SIGTERM means what Ctrl-C means: save and stop.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return args.function(args) or 0
    except BrokenPipeError:
        # The reader of our output went away (as `| head` does); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback or os.environ.get("SMAE_TRACEBACK", "0") not in ("", "0"):
            _print_traceback(error)
        line, code = _said(error)
        print(line, file=sys.stderr)
        return code


def _said(error: Exception) -> tuple[str, int]:
    """The line that tells of an error, and the exit code: a mistake of the user's, or a fault of this
    package's.
    """
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        return f"error: {error}: check the path, its permissions and the free disk space", 2
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, of a GPU
        return (
            f"error: out of memory ({text or 'of the machine'}): use a smaller batch_size, crop_size or "
            "network",
            2,
        )
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent)
    at = next((f for f in reversed(frames) if f.filename.startswith(here)), frames[-1])
    place = f"{Path(at.filename).name}:{at.lineno}"
    return (
        f"internal error: {type(error).__name__}: {text} (in {place}); run again with --traceback and report "
        "it",
        1,
    )


def _print_traceback(error: Exception) -> None:
    """The whole traceback, with the errors that a one-line message replaced."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause and id(cause) not in seen:
        seen.add(id(cause))
        cause.__suppress_context__ = False
        cause = cause.__cause__ or cause.__context__
    traceback.print_exception(error)


class _Version(argparse.Action):
    """Prints the installed version, which takes a while to look up."""

    def __call__(self, parser, *_) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("smae-utils")
        except PackageNotFoundError:
            number = "(not installed)"
        print(f"smae-utils {number}")
        parser.exit()


def command_line(
    prog: str, text: str
) -> tuple[argparse.ArgumentParser, Callable[..., argparse.ArgumentParser]]:
    """A parser, and how a command is added to it: `add(name, function, help, group)` gives the command's own
    parser.

    Its help lists the commands of each group below the group's name.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=""
    )
    how = {
        "action": "store_true",
        "help": "show where an error arose; so does the environment variable SMAE_TRACEBACK=1",
    }
    parser.add_argument("--traceback", **how)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="one of those below; COMMAND --help tells more"
    )
    groups: dict[str, list[str]] = {}

    def add(
        name: str, function: Callable[[argparse.Namespace], int | None], text: str, group: str = "commands"
    ) -> argparse.ArgumentParser:
        groups.setdefault(group, []).append(f"  {name:<10} {text}")
        parser.epilog = "\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in groups.items())
        command = commands.add_parser(name, description=text)
        command.set_defaults(function=function)
        command.add_argument("--traceback", default=argparse.SUPPRESS, **how)
        return command

    return parser, add


def _parser() -> argparse.ArgumentParser:
    parser, add = command_line(
        "python -m smae_utils", "Self pre-training with masked autoencoders for medical images."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and stop")

    command = add("phantom", _phantom, "write a drop-in for a real download", "data")
    command.add_argument("--task", required=True)
    command.add_argument("--out", required=True, type=Path)
    command.add_argument("--n", required=True, type=int, help="number of scans")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--size", default="demo", help="demo or full")
    command.add_argument(
        "--context", type=float, default=1.0, help="share of structures that follow the patient's latents"
    )

    for name, function, text in (
        ("pretrain", _pretrain, "self pre-train a masked autoencoder on a task's training images"),
        ("finetune", _finetune, "fine-tune a ViT classifier or a UNETR"),
    ):
        command = add(name, function, text, "training")
        command.add_argument(
            "--task", required=True, help="cxr14, btcv, brats, or a list file (.json, .csv) of your own scans"
        )
        command.add_argument(
            "--data",
            default="",
            help="folder of the download; of a list file: what its paths are relative to (its own folder)",
        )
        command.add_argument("--preset", default="demo", help="demo, small, paper, or a YAML file")
        command.add_argument("--out", required=True, type=Path, metavar="RUN")
        command.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="key=value",
            help="override settings of the preset",
        )
        command.add_argument("--resume", action="store_true", help="go on where the run folder stopped")
        start = {
            "pretrain": "weights to go on from: the encoder, and the decoder where it fits",
            "finetune": "where the encoder comes from",
        }
        command.add_argument(
            "--init", default="scratch", metavar="scratch|RUN|FILE|timm:NAME", help=start[name]
        )
        command.add_argument(
            "--adapt", action="store_true", help="fit weights of other channels or of 2D images"
        )

    command = add(
        "check",
        _check,
        "look at a data set before training: faults, proposals, time and memory",
        "your scans",
    )
    command.add_argument(
        "list",
        metavar="LIST",
        help="list file (.json, .csv), or a task with --data; the exit code is 2 when it has errors",
    )
    command.add_argument(
        "--data",
        default="",
        help="folder of a task's download; of a list file: what its paths are relative to",
    )
    command.add_argument("--preset", default="small", help="whose cost to estimate")

    command = add("evaluate", _evaluate, "score a fine-tuned run on the test cases", "training")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--data", type=Path, help="where the data lies now, if it was moved")
    command.add_argument("--split", default="test", help="test or val")

    command = add(
        "predict",
        _predict,
        "apply a fine-tuned run to scans: masks and volumes, or probabilities",
        "your scans",
    )
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("scans", nargs="+", metavar="SCAN", help="image files, DICOM folders or list files")
    command.add_argument("--out", required=True, type=Path)
    command.add_argument(
        "--probabilities", action="store_true", help="write probabilities too (segmentation)"
    )
    command.add_argument(
        "--occlusion",
        action="store_true",
        help="draw which places speak for the likeliest finding (radiographs)",
    )

    command = add(
        "download", _download, "fetch a public data set: the only command that uses the network", "data"
    )
    command.add_argument("name", metavar="hippocampus|brats|chestmnist")
    command.add_argument("--size", type=int, default=64, help="pixels of chestmnist: 64, 128 or 224")
    command.add_argument("--out", required=True, type=Path, help="folder to put it into")

    command = add(
        "resample", _resample, "bring a mask onto the grid of its image by nearest neighbour", "your scans"
    )
    command.add_argument("mask", type=Path, metavar="MASK")
    command.add_argument("image", type=Path, metavar="IMAGE")
    command.add_argument("out", type=Path, metavar="OUT", help="NIfTI file to make (.nii.gz)")

    command = add("export", _export, "write a run's weights for another library", "your scans")
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--to", required=True, help="timm, monai-vit or monai-unetr")
    command.add_argument("--out", required=True, type=Path)

    command = add(
        "compare",
        _compare,
        "table of two evaluated runs: scratch | self pre-trained | difference",
        "training",
    )
    command.add_argument("scratch", type=Path)
    command.add_argument("self", type=Path)

    command = add("run", _run, "execute one notebook", "notebooks")
    command.add_argument("notebook", help="path, or name as 02_self_pretraining")
    command.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    command.add_argument(
        "--out",
        type=Path,
        default=Path("build/notebooks"),
        help="folder of the executed notebook and its HTML",
    )

    command = add(
        "batch", _batch, "many notebook runs from one YAML file; goes on where it stopped", "notebooks"
    )
    command.add_argument(
        "words",
        nargs="+",
        metavar="FILE|status|collect",
        help="FILE.yaml to run; or: status OUT, collect OUT",
    )
    command.add_argument("--out", type=Path, help="folder of the batch; runs/batch-FILE when left out")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    command.add_argument("--gpus", nargs="+", default=[], help="numbers of GPUs, one for each run at a time")
    command.add_argument("--backend", default="local", help="local, or slurm for jobs of a cluster")
    command.add_argument(
        "--slurm", nargs="+", default=[], metavar="key=value", help="timeout_min=60 slurm_partition=gpu ..."
    )

    command = add("settings", _settings, "every setting: default, unit, bounds, what it does", "training")
    command.add_argument(
        "stage", nargs="?", choices=["pretrain", "finetune"], help="pretrain or finetune; both when left out"
    )

    add("lab", _lab, "open JupyterLab on the notebooks (arguments go to it)", "notebooks")
    return parser


def _phantom(args) -> None:
    from smae_utils.phantoms import write_phantoms

    files = write_phantoms(args.task, args.out, args.n, args.seed, args.size, args.context)
    print(f"wrote {len(files)} {args.size} phantoms of {args.task} to {args.out}")


def _pretrain(args) -> None:
    from smae_utils.work.pretrain import pretrain
    from smae_utils.work.settings import parse_overrides

    overrides = parse_overrides(args.set)
    pretrain(
        args.task, args.data, args.out, args.preset, overrides, args.resume, init=args.init, adapt=args.adapt
    )


def _finetune(args) -> None:
    from smae_utils.work.finetune import finetune
    from smae_utils.work.settings import parse_overrides

    finetune(
        args.task,
        args.data,
        args.out,
        args.init,
        args.preset,
        parse_overrides(args.set),
        args.resume,
        adapt=args.adapt,
    )


def _evaluate(args) -> None:
    from smae_utils.work.evaluation import evaluate

    evaluate(args.run, args.data, args.split)


def _check(args) -> int:
    from smae_utils.work.check import check

    return 2 if check(args.list, args.data, args.preset).problems else 0


def _predict(args) -> None:
    from smae_utils.predict_files import predict

    predict(args.run, args.scans, args.out, args.probabilities, args.occlusion)


def _download(args) -> None:
    from smae_utils.data.download import download

    place = download(args.name, args.out, size=args.size)
    print(
        "next: python -m smae_utils check "
        + (str(place) if place.is_file() else f"{args.name} --data {place}")
    )


def _resample(args) -> None:
    from smae_utils.data.reading import resample_mask

    resample_mask(args.mask, args.image, args.out)
    print(f"wrote {args.out}")


def _export(args) -> None:
    from smae_utils.work.export import export

    out = export(args.run, args.to, args.out)
    print(f"wrote {out / 'model.safetensors'} and {out / 'arguments.json'}")


def _compare(args) -> None:
    from smae_utils.work.evaluation import compare

    print(compare(args.scratch, args.self).to_string(index=False, float_format="%.4g"))


def _run(args) -> None:
    from smae_utils.run_notebook import run_notebook

    run_notebook(args.notebook, args.out, dict(args.parameter))


def _batch(args) -> None:
    from smae_utils.batch.collect import collect, status
    from smae_utils.batch.run import run_batch
    from smae_utils.places import work_root
    from smae_utils.work.settings import parse_overrides

    word, *more = args.words
    if word in ("status", "collect") and not word.endswith((".yaml", ".yml")):
        if len(more) != 1:
            raise UserError(f"batch {word} takes the folder of a batch, got {len(more)} words")
        if word == "status":
            print(status(more[0]).to_string(index=False))
        else:
            table = collect(more[0])
            print(
                f"{len(table)} figures in {Path(more[0]) / 'results.csv'}; open {Path(more[0]) / 'index.html'}"
            )
        return
    if more:
        raise UserError(f"batch takes one YAML file, got {' '.join(args.words)}")
    out = args.out or work_root() / "runs" / f"batch-{Path(word).stem}"
    run_batch(word, out, args.jobs, args.gpus, args.backend, parse_overrides(args.slurm))
    print(f"all runs are done; batch collect {out} writes their figures and a page")


def _settings(args) -> None:
    import pandas as pd

    from smae_utils.work.settings import STAGES, describe

    table = pd.DataFrame(describe([args.stage] if args.stage else STAGES))
    with pd.option_context("display.max_colwidth", None):
        for stage, part in table.groupby("stage", sort=False):
            print(f"{stage}\n{part.drop(columns='stage').to_string(index=False, justify='left')}\n")


def _lab(args) -> int:
    from smae_utils.run_notebook import open_lab

    return open_lab(args.args)
