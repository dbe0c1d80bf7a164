"""Write files and folders so that a kill or a full disk leaves the old or the new one, never half of one.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smae_utils.errors import UserError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to.

    It takes the place of `path` when nothing was raised, and is removed otherwise.
    """
    # It keeps the ending, by which libraries know what to write.
    part = path.with_name(f".part_{path.name}")
    try:
        with telling_of_a_full_disk(path):
            yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def telling_of_a_full_disk(path: Path) -> Iterator[None]:
    """Within it, what torch and safetensors raise on a full disk becomes the OSError that it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # torch's writer only says at which byte it stopped; safetensors quotes the system.
        if "inline_container" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def must_be_free(out: Path) -> None:
    """Refuse a file, or a folder that is not empty, so that no result is mixed or overwritten.

    Raises:
        UserError: naming it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} is not empty: choose another --out, so that no result is mixed or overwritten"
        )


def part_of_folder(out: Path) -> Path:
    """Where `new_folder` keeps what is not whole yet."""
    return out.with_name(out.name + ".part")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` to fill.

    It becomes `out` when nothing was raised, and is removed otherwise.

    Raises:
        UserError: where `out` is not free (`must_be_free`).
    """
    must_be_free(out)
    part = part_of_folder(out)
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def swap_folder(new: Path, final: Path) -> None:
    """Replace the folder `final` by the whole folder `new`; `newest_folder` mends what a kill leaves."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def newest_folder(final: Path, last_file: str) -> Path | None:
    """The folder that `swap_folder` left, also when it was killed.

    None where no folder holds `last_file`, the file that is written last.
    """
    if not final.exists():  # killed between two renames: finish what was going on
        for name in (".new", ".old"):
            folder = final.with_name(final.name + name)
            if (folder / last_file).is_file():
                folder.rename(final)
                break
    return final if (final / last_file).is_file() else None
