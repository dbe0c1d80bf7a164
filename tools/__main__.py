"""`python -m tools COMMAND`: what this repository needs beside the package. `env` runs on a bare Python."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from smae_utils.atomic import write_text
from smae_utils.command_line import command_line, run_command


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code, see `run_command`."""
    return run_command(_parser(), argv, passing_on=("test",))


def _parser() -> argparse.ArgumentParser:
    parser, add = command_line(
        "python -m tools", "The environment, tests, demo, figures and study of this repository."
    )
    command = add("env", _env, "make the environment .venv (nothing needs to be installed for it)")
    command.add_argument(
        "--browser", action="store_true", help="and a Chromium, for the test of the explorer in JupyterLab"
    )
    command.add_argument(
        "--slurm", action="store_true", help="and SLURM (Debian), for the test of batches on it"
    )
    add("test", _test, "run the tests (arguments go to pytest)")
    command = add("demo", _demo, "run the numbered notebooks for the tasks and compare")
    command.add_argument("--task", nargs="*", default=[], help="btcv, cxr14, brats; all when left out")
    command.add_argument("--data", type=Path, help="a download of the one task, instead of phantoms")
    command.add_argument("--out", type=Path, default=Path("build/demo"))
    command.add_argument("--preset", default="demo")
    command.add_argument("--seed", type=int, default=0)

    command = add(
        "benchmark",
        _benchmark,
        "two steps of each paper preset at batch 1 on full-size phantoms; the explorer's speed; speed "
        "or memory beside MONAI; or one and two processes",
    )
    command.add_argument(
        "--what", choices=["paper", "explorer", "speed", "memory", "processes"], default="paper"
    )
    command.add_argument("--repeats", type=int, default=5, help="of speed: pairs of calls")
    command.add_argument("--only", default="", help="of speed and memory: works whose name begins so")
    command.add_argument("--task", nargs="*", default=[])
    command.add_argument("--out", type=Path, default=Path("build/benchmark"))

    command = add(
        "study",
        _study,
        "does self pre-training help on real scans? the study of docs/protocol.md; goes on where it stopped",
    )
    command.add_argument("study", help="hippocampus, cxr14_64px, or a YAML file like those of tools/study")
    command.add_argument("--data", required=True, help="folder of the scans")
    command.add_argument(
        "--part", nargs="*", default=[], help="room, probe, recipe, tune, main; main when left out"
    )
    command.add_argument("--seeds", nargs="*", type=int, default=[], help="the protocol's when left out")
    command.add_argument(
        "--labelled", nargs="*", type=_row, default=[], help="only these rows of the main table, as 2 or 10%%"
    )
    command.add_argument("--arm", nargs="*", default=[], help="only these arms of the main table")
    command.add_argument("--out", type=Path, default=Path("build/evidence"), help="folder of the runs")
    command.add_argument(
        "--results", type=Path, default=Path("results/evidence/real"), help="folder of the tables"
    )
    command.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, as a batch; they share the cores"
    )
    command.add_argument("--backend", default="local", help="where batches run: local or slurm")
    command.add_argument("--slurm", nargs="+", default=[], metavar="key=value", help="see docs/batch.md")
    command.add_argument(
        "--quick", type=int, default=1, help="divide steps by this: for tests, such figures mean nothing"
    )

    command = add(
        "faults",
        _faults,
        "kill works and fill their disk at random moments; each must finish as if undisturbed",
    )
    command.add_argument("--kills", type=int, default=100)
    command.add_argument(
        "--full-disks", type=int, default=20, help="needs the right to mount (root); 0: none"
    )
    command.add_argument(
        "--work", nargs="*", default=[], help="only these: pretrain, finetune, evaluate, predict, batch"
    )
    command.add_argument("--seed", type=int, default=0, help="draws the moments")
    command.add_argument("--out", type=Path, default=Path("build/faults"))
    command.add_argument("--results", type=Path, default=Path("results/faults"), help="folder of the table")

    command = add(
        "readme",
        _readme,
        "write figures (from results/) and reference (from the code) into README.md and docs/",
    )
    command.add_argument(
        "--picture",
        type=Path,
        metavar="RUN",
        help="draw docs/reconstruction.png anew from this pre-training run",
    )
    return parser


def _readme(args) -> None:
    from smae_utils.places import clone

    root = clone("README.md and the results it is written from")
    from tools.readme import BLOCKS, draw_reconstruction, render

    if args.picture:
        draw_reconstruction(args.picture, root / "docs" / "reconstruction.png")
    for name in BLOCKS:
        file = root / name
        write_text(file, render(file.read_text(encoding="utf-8"), root, name))


def _env(args) -> None:
    from tools.environment import make_browser, make_environment, make_slurm

    make_environment()
    if args.browser:
        print(f"the browser for the tests is {make_browser()}")
    if args.slurm:
        make_slurm()


def _test(args) -> int:
    from tools.environment import run_tests

    return run_tests(args.args)


def _demo(args) -> None:
    from tools.demo import demo

    demo(args.out, args.task, args.preset, args.seed, data_dir=args.data)


def _row(text: str) -> int | str:
    """A number of labelled cases, or a share as "10%"."""
    return int(text) if text.isdigit() else text


def _study(args) -> None:
    from smae_utils.work.settings import parse_overrides
    from tools.study.run import run_study

    run_study(
        args.study,
        args.data,
        args.out,
        args.results,
        args.part,
        args.seeds,
        args.labelled,
        args.arm,
        args.jobs,
        args.quick,
        args.backend,
        parse_overrides(args.slurm),
    )


def _faults(args) -> None:
    from tools.faults import WORKS, try_faults

    try_faults(args.out, args.results, args.kills, args.full_disks, tuple(args.work) or WORKS, args.seed)


def _benchmark(args) -> None:
    from tools.benchmark import benchmark, benchmark_explorer

    if args.what == "explorer":
        benchmark_explorer(args.out)
    elif args.what == "processes":
        from tools.scaling import benchmark_processes

        benchmark_processes(args.out)
    elif args.what == "speed":
        from tools.speed import benchmark_speed

        benchmark_speed(args.out, args.repeats, args.only)
    elif args.what == "memory":
        from tools.memory import benchmark_memory

        benchmark_memory(args.out, args.only)
    else:
        benchmark(args.out, args.task)


if __name__ == "__main__":
    sys.exit(main())
