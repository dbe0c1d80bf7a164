"""A table of mistakes: each gives one line that says what is wrong, exit code 2, and nothing half-written.

`python tests/test_bad_input.py --write` makes docs/bad_input.md from the same table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from smae_utils.cli import main
from smae_utils.work import check_report
from smae_utils.work.run_folder import Run

PAGE = Path(__file__).parents[1] / "docs" / "bad_input.md"
SHAPE = (18, 16, 16)
TINY = {
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "precision": "fp32",
    "steps": 2,
    "batch_size": 2,
    "log_every": 1,
    "base_lr": 0.1,
}
SETTINGS = {
    "pretrain": {**TINY, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2},
    "finetune": {**TINY, "feature_size": 2, "overlap": 0.0, "drop_path": 0.0},
}


class Place:
    """A folder with a list of five small scans (or of ten pictures), to be spoiled, and the commands on
    it."""

    def __init__(self, folder: Path, shared: Path):
        self.folder, self.shared, self.out = folder, shared, folder / "out"
        self.patch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bare.yaml").write_text("")

    def scan(self, name: str, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
        nib.save(
            nib.Nifti1Image(values, np.diag([3.0, 3.0, 4.0, 1.0]) if affine is None else affine),
            self.folder / name,
        )
        return self.folder / name

    def image(self, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).normal(200, 20, SHAPE).astype(np.float32)

    def label(self) -> np.ndarray:
        out = np.zeros(SHAPE, np.uint8)
        out[3:9, 3:9, 3:9], out[10:15, 9:14, 8:13] = 1, 2
        return out

    def scans(self, **changes) -> Path:
        """Scans and their list; `changes` go into the list."""
        entries = []
        for i in range(5):
            self.scan(f"s{i}.nii.gz", self.image(i))
            self.scan(f"s{i}_label.nii.gz", self.label())
            entries.append({"image": f"s{i}.nii.gz", "label": f"s{i}_label.nii.gz"})
        content = {
            "labels": {"0": "background", "1": "liver", "2": "tumour"},
            "modality": {"0": "MRI"},
            "spacing_mm": [4, 4, 4],
        }
        content |= {
            "settings": {"crop_size": [16, 16, 16], **SETTINGS},
            "training": entries[:3],
            "validation": entries[3:4],
            "test": entries[4:],
        }
        return self.json({**content, **changes})

    def json(self, content) -> Path:
        (self.folder / "list.json").write_text(json.dumps(content))
        return self.folder / "list.json"

    def content(self) -> dict:
        return json.loads((self.folder / "list.json").read_text())

    def pictures(self, n: int = 10) -> Path:
        """Pictures and their list with two classes."""
        rng = np.random.default_rng(0)
        lines = ["image,mass,nodule,split"]
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(self.folder / f"i{i}.png")
            lines.append(f"i{i}.png,{i % 2},{i // 2 % 2},{'test' if i > 6 else 'val' if i == 6 else 'train'}")
        return self.csv("\n".join(lines) + "\n")

    def csv(self, text: str | bytes) -> Path:
        (self.folder / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.folder / "list.csv"

    def replace(self, old: str, new: str) -> Path:
        """Change words of the pictures' list."""
        text = self.pictures().read_text()
        assert old in text
        return self.csv(text.replace(old, new, 1))

    def train(self, file: Path | str, *sets: str, stage: str = "pretrain", more: tuple = ()) -> list:
        if str(file).endswith(".csv"):
            values = {**SETTINGS[stage], "crop_size": "[32,32]"}
            values.pop("feature_size", 0)
            sets = (*(f"{k}={v}" for k, v in values.items()), *sets)
        chosen = ["--set", *sets] if sets else []
        return [
            stage,
            "--task",
            file,
            "--preset",
            self.folder / "bare.yaml",
            "--out",
            self.out,
            *more,
            *chosen,
        ]

    def finetune(self, file: Path, *sets: str, init: Path | None = None) -> list:
        return self.train(file, *sets, stage="finetune", more=("--init", init) if init else ())

    def run(self, kind: str) -> Path:
        """A copy of a finished run of `scans` (pretrain, finetune) or of `pictures` (classifier)."""
        made = self.shared / kind
        if not made.exists():
            other = Place(self.shared / f"{kind}_data", self.shared)
            file = other.pictures() if kind == "classifier" else other.scans()
            other.out = made
            command = other.train(file, stage="finetune" if kind == "classifier" else kind)
            code, _, err = call(command)
            assert code == 0, err
        return Path(shutil.copytree(made, self.folder / kind, dirs_exist_ok=True))

    def predict(self, scan: Path, kind: str = "finetune") -> list:
        return ["predict", self.run(kind), scan, "--out", self.out]


def call(command: list) -> tuple[int, str, str]:
    """Run the command line in this process: (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's word on a missing plug-in, once a process
        code = main([str(word) for word in command])
    return code, out.getvalue(), err.getvalue()


@dataclass(frozen=True)
class Row:
    """One mistake: its name, what makes it and returns the command, and the words the line must hold.
    `works`: it is none.
    """

    name: str
    make: Callable[[Place], list]
    words: tuple[str, ...] = ()
    works: bool = False

    def __str__(self) -> str:
        return self.name


def cut(path: Path, keep: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


ROWS: list[Row] = []


def row(name: str, *words: str, works: bool = False):
    """Put the function below into the table."""

    def add(make: Callable[[Place], list]) -> Callable[[Place], list]:
        ROWS.append(Row(name, make, words, works))
        return make

    return add


def spoil_scan(
    name: str,
    *words: str,
    file: str = "s1.nii.gz",
    how: Callable[[Place, Path], object],
    command: str = "check",
) -> None:
    """A row in which one file of the list of scans is spoiled."""

    def make(place: Place) -> list:
        task = place.scans()
        how(place, place.folder / file)
        return ["check", task] if command == "check" else getattr(place, command)(task)

    ROWS.append(Row(name, make, (file, *words)))


def singular(place: Place, path: Path) -> Path:
    image = nib.Nifti1Image(place.image(), np.eye(4))
    image.header.set_qform(None, 0)
    image.header["sform_code"], image.header["srow_y"] = 1, (0, 0, 0, 0)
    image._affine = None  # else nibabel writes the affine of the object over the header
    with nib.openers.ImageOpener(str(path), "wb") as handle:
        handle.write(image.header.binaryblock + b"\0" * 4 + place.image().tobytes(order="F"))
    return path


MOVED = np.array([[3.0, 0, 0, 40], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])

# Scans.
spoil_scan("a scan that is cut short", "cut short", how=lambda _, f: cut(f), command="train")
spoil_scan("a scan of zero bytes", how=lambda _, f: f.write_bytes(b""), command="train")
spoil_scan(
    "a .nii.gz that is not compressed",
    "gzip",
    how=lambda _, f: f.write_bytes(b"text " * 100),
    command="train",
)
spoil_scan(
    "a scan of nothing but NaN", "NaN", how=lambda p, f: p.scan(f.name, p.image() * np.nan), command="train"
)
spoil_scan("a scan of one value", "constant", how=lambda p, f: p.scan(f.name, p.image() * 0 + 7))
spoil_scan(
    "a 2D image where a scan is wanted",
    "3D",
    how=lambda p, f: p.scan(f.name, p.image()[:, :, 3]),
    command="train",
)
spoil_scan(
    "a scan with more channels than the list says",
    "2 channels",
    how=lambda p, f: p.scan(f.name, np.stack([p.image()] * 2, -1)),
    command="train",
)
spoil_scan("a scan whose affine is singular", "singular affine", how=singular)
spoil_scan("a scan whose affine is singular, in training", "singular affine", how=singular, command="train")

# Labels.
LABEL = "s1_label.nii.gz"
spoil_scan(
    "a label with fractions",
    "0 .. 2",
    file=LABEL,
    how=lambda p, f: p.scan(f.name, p.label() * np.float32(0.5)),
    command="finetune",
)
spoil_scan(
    "a label with negative values",
    "0 .. 2",
    file=LABEL,
    how=lambda p, f: p.scan(f.name, p.label().astype(np.int16) - 1),
    command="finetune",
)
spoil_scan(
    "a label with values the list does not name",
    "0 .. 2",
    file=LABEL,
    how=lambda p, f: p.scan(f.name, p.label() * 100),
    command="finetune",
)
spoil_scan(
    "a label of another shape than its scan",
    "one grid",
    file=LABEL,
    how=lambda p, f: p.scan(f.name, p.label()[:-3]),
    command="finetune",
)
spoil_scan(
    "a label moved by its affine",
    "mm away",
    file=LABEL,
    how=lambda p, f: p.scan(f.name, p.label(), MOVED),
    command="finetune",
)
spoil_scan("a label that is cut short", file=LABEL, how=lambda _, f: cut(f), command="finetune")


@row("label and image swapped", "s1.nii.gz", "holds values", "0 .. 2")
def _(place):
    place.scans()
    content = place.content()
    content["training"][1] = {"image": "s1_label.nii.gz", "label": "s1.nii.gz"}
    return ["check", place.json(content)]


@row("a scan of a kind that is not read", "scan.txt", "NIfTI", "convert")
def _(place):
    place.scans()
    (place.folder / "s1.nii.gz").rename(place.folder / "scan.txt")
    content = place.content()
    content["training"][1]["image"] = "scan.txt"
    return place.train(place.json(content))


@row("channels in several files of other shapes", "extra.nii.gz", "one grid")
def _(place):
    place.scans()
    place.scan("extra.nii.gz", place.image()[:-2])
    content = place.content()
    content["modality"] = {"0": "T1", "1": "T2"}
    content["training"] = [{"image": ["s0.nii.gz", "extra.nii.gz"]}, {"image": ["s1.nii.gz", "s2.nii.gz"]}]
    return place.train(place.json(content))


@row("a scan to predict that does not exist", "typo.nii.gz", "does not exist")
def _(place):
    return place.predict(place.folder / "typo.nii.gz")


@row("a scan to predict that is cut short", "new.nii.gz", "cut short")
def _(place):
    return place.predict(cut(place.scan("new.nii.gz", place.image())))


@row("a scan to predict whose affine is singular", "new.nii.gz", "singular affine")
def _(place):
    return place.predict(singular(place, place.folder / "new.nii.gz"))


@row("a radiograph given to a run of scans", "i0.png", "NIfTI")
def _(place):
    place.pictures()
    return place.predict(place.folder / "i0.png")


@row("a scan given to a run of radiographs", "new.nii.gz", "cannot read")
def _(place):
    return place.predict(place.scan("new.nii.gz", place.image()), "classifier")


# Radiographs.
@row("a PNG that is cut short", "i1.png", "cannot read")
def _(place):
    file = place.pictures()
    cut(place.folder / "i1.png")
    return place.train(file, "batch_size=6")


@row("a picture of one value", "i1.png", "constant")
def _(place):
    file = place.pictures()
    Image.new("L", (40, 40), 9).save(place.folder / "i1.png")
    return ["check", file]


# CSV lists.
@row("CSV without the column image", "list.csv", "picture, mass", "image")
def _(place):
    return place.train(place.replace("image,", "picture,"))


@row("CSV with semicolons", works=True)
def _(place):
    return place.train(place.csv(place.pictures().read_text().replace(",", ";")))


@row("CSV with an unknown split", "line 2", "'trian'", "train, val, test")
def _(place):
    return place.train(place.replace(",train", ",trian"))


@row("CSV with a row twice", "lists i0 twice")
def _(place):
    text = place.pictures().read_text()
    return place.train(place.csv(text + text.splitlines()[1] + "\n"))


@row("CSV with an empty image", "line 3", "'image' is empty")
def _(place):
    return place.train(place.replace("i1.png,", ","))


@row("CSV with other values than 0 and 1", "line 3", "'mass'", "'2'", "0 or 1")
def _(place):
    return place.train(place.replace("i1.png,1", "i1.png,2"))


@row("CSV of masks that does not say what their values mean", "list.csv", "label=liver|tumour")
def _(place):
    place.scans()
    return place.train(
        place.csv("image,label\n" + "".join(f"s{i}.nii.gz,s{i}_label.nii.gz\n" for i in range(3)))
    )


@row("CSV in UTF-16", works=True)
def _(place):
    return place.train(place.csv(place.pictures().read_text().encode("utf-16")))


@row("CSV that names an image that is not there", "i1.png", "does not exist")
def _(place):
    file = place.pictures()
    (place.folder / "i1.png").unlink()
    return place.train(file)


@row("one patient in training and in testing", "patient anna", "train", "test")
def _(place):
    place.pictures()
    return place.train(
        place.csv("image,x,split,patient\ni0.png,1,train,anna\ni1.png,0,train,ben\ni2.png,1,test,anna\n")
    )


# JSON lists.
def listed(name: str, *words: str, **changes) -> None:
    """A row in which keys of the list of scans are other ones."""
    ROWS.append(Row(name, lambda place: place.finetune(place.scans(**changes)), ("list.json", *words)))


ENTRY = {"image": "s0.nii.gz", "label": "s0_label.nii.gz"}
listed("an entry without image", "entry 0", "'image'", training=[{"label": "s0_label.nii.gz"}])
listed("an entry whose image is a number", "path", training=[{"image": 5}])
listed("an entry whose image is empty", "path", training=[{"image": ""}])
listed(
    "an image that does not exist",
    "typo.nii.gz",
    "does not exist",
    training=[{**ENTRY, "image": "typo.nii.gz"}],
)
listed(
    "a label that does not exist",
    "typo.nii.gz",
    "does not exist",
    training=[{**ENTRY, "label": "typo.nii.gz"}],
)
listed(
    "an image and a label that do not exist",
    "one.nii.gz",
    "two.nii.gz",
    "do not exist",
    training=[{"image": "one.nii.gz", "label": "two.nii.gz"}],
)
listed("one scan under two names", "s0.nii.gz", "twice", training=[ENTRY, {**ENTRY, "case": "other"}])
listed("a case whose name has a slash", "slash", training=[{**ENTRY, "case": "a/b"}])
listed("label values that mean nothing", "labels", labels=["liver", "tumour"])
listed("two label values of one name", "one name", labels={"1": "liver", "2": "liver"})
listed("regions that are not nested", "nested", labels={"background": 0, "a": [1, 2], "b": [2, 3]})
listed("no list of training scans", "lists no scans", training=[], validation=[], test=[])
listed("training scans that are no list", "must be a list", training="s0.nii.gz")
listed("an unknown task to be like", "livers", "btcv", like="livers")
listed("a window of one number", "window", "2 numbers", window=[100])
listed("a window from high to low", "window", "smaller first", window=[250, -175])
listed("a spacing of two numbers", "spacing_mm", "3 numbers", spacing_mm=[1, 1])
listed("settings that are no mapping", "settings", "mapping", settings={"pretrain": 3})


@row("JSON with a missing bracket", "list.json", "no valid JSON")
def _(place):
    return place.train(cut(place.scans()))


@row("JSON that is a list", "list.json", "got a list")
def _(place):
    return place.train(place.json([ENTRY]))


@row("a list file that does not exist", "typo.json", "does not exist")
def _(place):
    return place.train(place.folder / "typo.json")


@row("a mask value that the list does not name", "_label.nii.gz", "holds values 2", "0, 1, 4", "background")
def _(place):
    return place.finetune(place.scans(labels={"0": "background", "1": "liver", "4": "tumour"}))


def flat(place: Place, mask: Image.Image) -> list:
    """Two pictures, of which the second has this mask."""
    place.pictures()
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(place.folder / "m0.png")
    mask.save(place.folder / "m1.png")
    entries = [{"image": f"i{i}.png", "label": f"m{i}.png"} for i in range(2)]
    return ["check", place.json({"labels": {"1": "lung"}, "training": entries})]


@row("a mask of a picture of another size", "m1.png", "one grid")
def _(place):
    return flat(place, Image.new("L", (30, 40)))


@row("a mask of a picture in colours", "m1.png", "colours", "palette")
def _(place):
    return flat(place, Image.new("RGB", (40, 40), (255, 0, 0)))


@row("a mask of a picture whose values the list does not name", "m1.png", "holds values 255", "0 .. 1")
def _(place):
    return flat(place, Image.new("L", (40, 40), 255))


@row("a list of which some labels are masks and some are classes", "list.json", "'sick'", "mask files")
def _(place):
    place.scans()
    return place.train(
        place.json(
            {
                "training": [
                    {"image": "s0.nii.gz", "label": "s0_label.nii.gz"},
                    {"image": "s1.nii.gz", "label": "sick"},
                ]
            }
        )
    )


# Places.
@row("an output folder that is a file", "out")
def _(place):
    place.out.write_text("mine")
    return place.train(place.scans())


@row("predictions into a folder that is not empty", "not empty")
def _(place):
    place.out.mkdir()
    (place.out / "mine.txt").write_text("mine")
    return place.predict(place.scan("new.nii.gz", place.image()))


@row("an output folder that is read-only", "Permission denied")
def _(place):
    locked = place.folder / "locked"
    locked.mkdir(mode=0o500)
    place.out = locked / "out"
    return place.train(place.scans())


@row("a full disk", "No space left", "disk space")
def _(place):
    def full(self, **entry):
        with Path("/dev/full").open("w") as handle:
            handle.write("x" * 100_000)

    place.patch = lambda: mock.patch.object(Run, "log", full)
    return place.train(place.scans())


@row("a data folder that does not exist", "nowhere", "does not exist")
def _(place):
    return place.train("brats", more=("--data", place.folder / "nowhere"))


# Runs and weights.
@row("weights of another task", "patch_embed")
def _(place):
    return place.finetune(place.scans(), init=place.run("classifier"))


@row("weights that are cut short", "model.safetensors")
def _(place):
    init = place.run("pretrain")
    cut(init / "model.safetensors")
    return place.finetune(place.scans(), init=init)


@row("a checkpoint of zero bytes", "model.safetensors")
def _(place):
    init = place.run("pretrain")
    (init / "model.safetensors").write_bytes(b"")
    return place.finetune(place.scans(), init=init)


@row(
    "a checkpoint without one of the encoder's tensors",
    "pretrain",
    "1 tensors are not in the file",
    "encoder.blocks.0",
)
def _(place):
    init = place.run("pretrain")
    tensors = load_file(init / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "encoder.blocks.0.attn.qkv.weight"},
        init / "model.safetensors",
        {"grid": "[2, 2, 2]"},
    )
    return place.finetune(place.scans(), init=init)


@row("a checkpoint of another kind of ViT", "pretrain", "no place", "encoder.reg_token")
def _(place):
    init = place.run("pretrain")
    tensors = load_file(init / "model.safetensors")
    save_file(
        {**tensors, "encoder.reg_token": np.zeros((1, 4, 24), np.float32)},
        init / "model.safetensors",
        {"grid": "[2, 2, 2]"},
    )
    return place.finetune(place.scans(), init=init)


@row("an initial run that does not exist", "typo")
def _(place):
    return place.finetune(place.scans(), init=place.folder / "typo")


@row("a run folder that does not exist", "typo", "no run folder")
def _(place):
    return ["evaluate", place.folder / "typo"]


@row("an unfinished run, to be evaluated", "not finished", "--resume")
def _(place):
    run = place.run("finetune")
    (run / "model.safetensors").unlink()
    return ["evaluate", run]


@row("an unfinished run, to predict with", "not finished", "--resume")
def _(place):
    command = place.predict(place.scan("new.nii.gz", place.image()))
    (command[1] / "model.safetensors").unlink()
    return command


@row("a pre-training run, to predict with", "pretrain run", "finetune run was expected")
def _(place):
    return place.predict(place.scan("new.nii.gz", place.image()), "pretrain")


@row("a run folder whose config.yaml is damaged", "config.yaml", "damaged")
def _(place):
    run = place.run("finetune")
    (run / "config.yaml").write_text("stage: [finetune")
    return ["evaluate", run]


@row("an output folder that holds a run already", "already holds a run", "--resume")
def _(place):
    place.out = place.folder / "pretrain"
    place.run("pretrain")
    return place.train(place.scans())


# Settings.
def setting(name: str, *words: str, value: str) -> None:
    """A row with one setting that cannot work."""
    ROWS.append(Row(name, lambda place: place.train(place.scans(), value), words))


setting("a crop that the patch size does not divide", "20", "patch", value="crop_size=[20,16,16]")
setting("a crop of two axes for scans", "crop_size", "3D", value="crop_size=[16,16]")
setting("a mask ratio of 0", "mask_ratio", value="mask_ratio=0")
setting("a mask ratio of 1", "mask_ratio", value="mask_ratio=1")
setting("a batch larger than the data", "batch_size 100", "3 training scans", value="batch_size=100")
setting("an unknown setting", "mask_ration", "mask_ratio", value="mask_ration=0.5")
setting("a word where a number is wanted", "steps", "int", "'many'", value="steps=many")
setting("a setting without value", "key=value", value="steps")


@row("an unknown setting in a list", "mask_ration", "did you mean mask_ratio", "list.json")
def _(place):
    return place.train(place.scans(settings={"mask_ration": 0.5}))


@row("a setting of a list that is no number", "mask_ratio (list", "list.json", "float", "'many'")
def _(place):
    return place.train(place.scans(settings={"pretrain": {"weight_decay": 0.1, "mask_ratio": "many"}}))


@row("an unknown preset", "huge", "demo")
def _(place):
    return ["pretrain", "--task", place.scans(), "--preset", "huge", "--out", place.out]


@row("an unknown task", "btvc", "btcv")
def _(place):
    return ["pretrain", "--task", "btvc", "--out", place.out]


@row("a list without labels, to be fine-tuned", "no training case", "label")
def _(place):
    place.scans()
    return place.finetune(
        place.json(
            {k: v for k, v in place.content().items() if k not in ("training", "test")}
            | {"training": ["s0.nii.gz", "s1.nii.gz"]}
        )
    )


@row("an unknown notebook", "07_nothing", "01_masking")
def _(place):
    return ["run", "07_nothing", "--out", place.out]


@row("an unknown parameter of a notebook", "sed", "seed: int")
def _(place):
    return ["run", "01_masking", "-p", "sed", "1", "--out", place.out]


# What looks like a mistake and is none.
@row("a scan whose header contradicts itself (its affine counts; check says it)", works=True)
def _(place):
    file = place.scans()
    scan = nib.load(place.folder / "s1.nii.gz")
    values, header = np.asarray(scan.dataobj), scan.header.copy()
    header.set_sform(scan.affine, 1)
    header["qform_code"], header["pixdim"][1:4] = 0, (1, 1, 1)
    nib.save(nib.Nifti1Image(values, None, header), place.folder / "s1.nii.gz")
    return place.train(file)


@row("a path with letters that are not ASCII", works=True)
def _(place):
    folder = place.folder / "Übung é 画像"
    other = Place(folder, place.shared)
    other.out = place.out
    return other.train(other.scans())


@row("a list with byte order mark and Windows line ends", works=True)
def _(place):
    return place.train(place.csv(b"\xef\xbb\xbf" + place.pictures().read_bytes().replace(b"\n", b"\r\n")))


@row("a JSON list with byte order mark", works=True)
def _(place):
    file = place.scans()
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return place.train(file)


@row("a colour picture where grey is wanted (it is converted)", works=True)
def _(place):
    file = place.pictures()
    Image.open(place.folder / "i0.png").convert("RGB").save(place.folder / "i0.png")
    return place.train(file)


@row("a class that no test case has (NaN for it, the others are scored)", works=True)
def _(place):
    run, moved = place.run("classifier"), place.folder / "data"
    shutil.copytree(place.shared / "classifier_data", moved)
    file = moved / "list.csv"
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join(
            ",".join([*line.split(",")[:2], "0", "test"]) if line.endswith("test") else line for line in lines
        )
        + "\n"
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(place.shared / "classifier_data"), str(moved)))
    return ["evaluate", run]


ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0
SKIPPED = {
    "an output folder that is read-only": ROOT_USER,  # root may write everywhere
    "a full disk": not Path("/dev/full").exists(),
}


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """`check` without its half second of measuring the machine."""
    with mock.patch.object(check_report, "estimate", lambda *_, **__: []):
        yield


def leftovers(out: Path) -> list[str]:
    """What would look like a result."""
    wanted = ("model.safetensors", "*.nii.gz", "probabilities.csv", "volumes.csv", "*.ipynb")
    return [p.name for pattern in wanted for p in out.rglob(pattern)] if out.is_dir() else []


def answer(case: Row, folder: Path, shared: Path) -> tuple[int, str, list[str]]:
    """(exit code, standard error, new results) of one row."""
    place = Place(folder, shared)
    command = case.make(place)
    before = leftovers(place.out)
    with quick(), place.patch():
        code, _, err = call(command)
    return code, err, [name for name in leftovers(place.out) if name not in before]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Where the finished runs lie that several rows copy."""
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("case", [r for r in ROWS if not r.works], ids=str)
def test_a_mistake_gives_one_line_and_nothing_half_written(case, shared, tmp_path):
    if SKIPPED.get(case.name):
        pytest.skip("cannot be made on this machine")
    code, err, results = answer(case, tmp_path / "data", shared)
    assert code == 2, err
    assert (
        err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
    ), err
    for word in case.words:
        assert word in err, err
    assert not results


@pytest.mark.parametrize("case", [r for r in ROWS if r.works], ids=str)
def test_what_is_no_mistake_works(case, shared, tmp_path):
    code, err, _ = answer(case, tmp_path / "data", shared)
    assert code == 0 and "error" not in err, err
    if "no test case has" in case.name:
        said = json.loads((tmp_path / "data" / "classifier" / "metrics.json").read_text())
        assert said["classes"]["nodule"]["auc"] is None and said["classes"]["mass"]["auc"] is not None
        assert said["mean"]["mauc"] == said["classes"]["mass"]["auc"]


@pytest.mark.slow
def test_the_line_is_the_only_one_also_in_a_process_of_its_own(shared, tmp_path):
    place = Place(tmp_path, shared)
    file = place.scans()
    cut(place.folder / "s1.nii.gz")
    command = [sys.executable, "-m", "smae_utils", *map(str, place.train(file))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_the_page_lists_every_row():
    assert PAGE.read_text().count("\n") == len(ROWS) + 7  # a row a line, nothing else that was printed
    assert len(ROWS) >= 40 and len({r.name for r in ROWS}) == len(ROWS)
    lines = PAGE.read_text().splitlines()
    for case in ROWS:
        assert any(line.startswith(f"| {case.name} |") for line in lines), (
            f"{case.name}: run python tests/test_bad_input.py --write"
        )


def page() -> str:
    """docs/bad_input.md: every row with the line it gives here; temporary folders are `...`."""
    lines = [
        "# Mistakes and what you see",
        "",
        "Written by `python tests/test_bad_input.py --write` from the cases that the tests run:",
    ]
    lines += [
        "each ends with exit code 2 and this one line, and leaves nothing half-written.",
        "",
        "| mistake | what you see |",
        "|---|---|",
    ]
    with tempfile.TemporaryDirectory() as root:
        for number, case in enumerate(ROWS):
            folder = Path(root).resolve() / str(number)
            if SKIPPED.get(case.name):
                seen = (
                    f"`error: [Errno 13] {case.words[0]}: '.../locked/out': check the path, "
                    "its permissions and the free disk space`"
                )
            else:
                code, err, _ = answer(case, folder, Path(root).resolve() / "shared")
                assert code == (0 if case.works else 2), f"{case.name}: {err}"
                assert case.works or (err.startswith("error: ") and err.count("\n") == 1), err
                text = (
                    err.strip()
                    .replace(str(folder), "...")
                    .replace(str(folder.parent), "...")
                    .replace("|", "\\|")
                    .replace("`", "'")
                )
                seen = "it works" if case.works else f"`{text}`"
            lines.append(f"| {case.name} | {seen} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_bad_input.py --write writes docs/bad_input.md")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {len(ROWS)} rows to {PAGE.name}")
