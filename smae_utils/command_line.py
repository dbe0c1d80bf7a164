"""What every command line of this project has: help in groups, and one line for an error.

A user's mistake gives exit code 2. A fault of this package gives one line too, which names its place, and
exit code 1. `--traceback` shows where either arose.
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


def run_command(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, passing_on: Collection[str] = ("lab",)
) -> int:
    """Run the function of the command that was given.

    Args:
        parser: whose commands have a `function`; all take `--traceback`.
        argv: words of the command line; those of this process when left out.
        passing_on: commands whose further words, options too, are for another program; see `args.args`.

    Returns:
        The exit code: 0 done, 1 a fault of this package, 2 a mistake of the user's, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    passed_on: list[str] = []
    word = next((i for i, w in enumerate(argv) if not w.startswith("-")), len(argv))
    if argv[word : word + 1] and argv[word] in passing_on:
        argv, passed_on = argv[: word + 1], argv[word + 1 :]
    for stream in (sys.stdout, sys.stderr):
        # A letter that the terminal's encoding lacks is no reason to stop.
        if hasattr(stream, "reconfigure"):
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
    """The line that tells of an error, and the exit code: a user's mistake, or a fault of this package."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        return f"error: {error}: check the path, its permissions and the free disk space", 2
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, of a GPU
        return (
            f"error: out of memory ({text or 'of the machine'}): "
            "use a smaller batch_size, crop_size or network",
            2,
        )
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent)
    at = next((f for f in reversed(frames) if f.filename.startswith(here)), frames[-1])
    place = f"{Path(at.filename).name}:{at.lineno}"
    return (
        f"internal error: {type(error).__name__}: {text} (in {place}); "
        "run again with --traceback and report it",
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


class Version(argparse.Action):
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
    """A parser, and the function that adds a command to it.

    `add(name, function, text, group)` returns the command's own parser. The help lists the commands of each
    group below the group's name.
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
        command.set_defaults(function=function, group=group)
        command.add_argument("--traceback", default=argparse.SUPPRESS, **how)
        return command

    return parser, add
