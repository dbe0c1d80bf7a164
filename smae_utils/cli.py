"""The commands of `smae`; their errors and exit codes are those of `command_line`."""

from __future__ import annotations

import argparse
from pathlib import Path

from smae_utils.command_line import Version, command_line, run_command
from smae_utils.errors import UserError

# Imports of torch, MONAI and the rest stand inside the commands: --help and a mistyped word answer at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command of the package; returns the exit code, see `run_command`."""
    return run_command(make_parser(), argv)


def make_parser() -> argparse.ArgumentParser:
    """All commands, in groups."""
    parser, add = command_line("smae", "Self pre-training with masked autoencoders for medical images.")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and stop")

    command = add("phantom", _phantom, "write synthetic scans in the layout of a real download", "data")
    command.add_argument("--task", required=True, help="btcv, cxr14 or brats")
    command.add_argument("--out", required=True, type=Path, help="folder to make")
    command.add_argument("--n", required=True, type=int, help="number of scans")
    command.add_argument("--seed", type=int, default=0, help="draws the patients")
    command.add_argument("--size", default="demo", help="demo or full")
    command.add_argument(
        "--context",
        type=float,
        default=1.0,
        help="1: the structures of a phantom depend on one another; 0: each is drawn on its own",
    )

    for name, function, text in (
        ("pretrain", _pretrain, "self pre-train a masked autoencoder on a task's training images"),
        ("finetune", _finetune, "fine-tune a ViT classifier or a UNETR"),
    ):
        command = add(name, function, text, "training")
        command.add_argument(
            "--task",
            required=True,
            help="cxr14, btcv, brats, hippocampus, or a list file (.json, .csv) of your own scans",
        )
        command.add_argument(
            "--data",
            default="",
            help="folder of the download; of a list file: what its paths are relative to (its own folder)",
        )
        command.add_argument("--preset", default="demo", help="demo, small, paper, or a YAML file")
        command.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to make")
        command.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="key=value",
            help="override settings of the preset",
        )
        command.add_argument("--resume", action="store_true", help="go on where the run folder stopped")
        command.add_argument(
            "--track", nargs="+", default=[], metavar="NAME", help="also log to tensorboard, wandb or mlflow"
        )
        start = {
            "pretrain": "weights to go on from: the encoder, and the decoder where it fits",
            "finetune": "where the weights of the encoder come from",
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
    command.add_argument("--preset", default="small", help="preset whose time and memory are estimated")

    command = add("evaluate", _evaluate, "score a fine-tuned run on the test cases", "training")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder of a fine-tuning")
    command.add_argument("--data", type=Path, help="where the data lies now, if it was moved")
    command.add_argument("--split", default="test", help="test or val")

    command = add(
        "predict",
        _predict,
        "apply a fine-tuned run to scans: masks and volumes, or probabilities",
        "your scans",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run folder of a fine-tuning")
    command.add_argument("scans", nargs="+", metavar="SCAN", help="image files, DICOM folders or list files")
    command.add_argument("--out", required=True, type=Path, help="folder to make")
    command.add_argument(
        "--probabilities", action="store_true", help="write probabilities too (segmentation)"
    )
    command.add_argument(
        "--occlusion",
        action="store_true",
        help="draw which places speak for the likeliest class (2D images)",
    )

    command = add("download", _download, "fetch a public data set from the network", "data")
    command.add_argument("name", metavar="hippocampus|brats|chestmnist", help="which data set")
    command.add_argument(
        "--size", type=int, default=64, help="edge of chestmnist's images in pixels: 64, 128 or 224"
    )
    command.add_argument("--out", required=True, type=Path, help="folder to put it into")

    command = add(
        "resample", _resample, "bring a mask onto the grid of its image by nearest neighbour", "your scans"
    )
    command.add_argument("mask", type=Path, metavar="MASK", help="mask to bring over")
    command.add_argument("image", type=Path, metavar="IMAGE", help="scan whose grid is wanted")
    command.add_argument("out", type=Path, metavar="OUT", help="NIfTI file to make (.nii.gz)")

    command = add("export", _export, "write a run's weights for another library", "your scans")
    command.add_argument("run", type=Path, metavar="RUN", help="finished run folder")
    command.add_argument("--to", required=True, help="timm, monai-vit or monai-unetr")
    command.add_argument("--out", required=True, type=Path, help="folder to make")

    command = add(
        "compare",
        _compare,
        "table of two evaluated runs: scratch | self pre-trained | difference",
        "training",
    )
    command.add_argument("scratch", type=Path, metavar="SCRATCH", help="run folder trained from scratch")
    command.add_argument("self", type=Path, metavar="SELF", help="run folder that started pre-trained")

    command = add("run", _run, "execute one notebook", "notebooks")
    command.add_argument("notebook", help="path, or name as 02_self_pretraining")
    command.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="value for a parameter of its `parameters` cell; may be given again",
    )
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
    command.add_argument(
        "--jobs", type=int, help="runs at a time, which share the cores; one for each GPU, else one"
    )
    command.add_argument("--gpus", nargs="+", default=[], help="GPUs by number, one for each run at a time")
    command.add_argument("--backend", default="local", help="local, or slurm for jobs of a cluster")
    command.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="key=value",
        help="what jobs ask for, as submitit calls it: timeout_min=60 slurm_partition=gpu ...",
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


def _overrides(args) -> dict:
    """What --set and --track say."""
    from smae_utils.work.settings import parse_overrides

    return parse_overrides(args.set) | ({"track": args.track} if args.track else {})


def _pretrain(args) -> None:
    from smae_utils.work.pretrain import pretrain

    overrides = _overrides(args)
    pretrain(
        args.task, args.data, args.out, args.preset, overrides, args.resume, init=args.init, adapt=args.adapt
    )


def _finetune(args) -> None:
    from smae_utils.work.finetune import finetune

    finetune(
        args.task,
        args.data,
        args.out,
        args.init,
        args.preset,
        _overrides(args),
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
    print("next: smae check " + (str(place) if place.is_file() else f"{args.name} --data {place}"))


def _resample(args) -> None:
    from smae_utils.data.reading import resample_mask

    resample_mask(args.mask, args.image, args.out)
    print(f"wrote {args.out}")


def _export(args) -> None:
    from smae_utils.work.export import export

    out = export(args.run, args.to, args.out)
    print(f"wrote {out / 'model.safetensors'} and {out / 'arguments.json'}")


def _compare(args) -> None:
    from smae_utils.work.comparison import compare

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
                f"{len(table)} figures in {Path(more[0]) / 'results.csv'}; open "
                f"{Path(more[0]) / 'index.html'}"
            )
        return
    if more:
        raise UserError(f"batch takes one YAML file, got {' '.join(args.words)}")
    out = args.out or work_root() / "runs" / f"batch-{Path(word).stem}"
    jobs = max(1, len(args.gpus)) if args.jobs is None else args.jobs
    run_batch(word, out, jobs, args.gpus, args.backend, parse_overrides(args.slurm))
    print(f"all runs are done; smae batch collect {out} writes their figures and a page")


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
