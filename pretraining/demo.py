"""``hiendmae_demo``: the whole path on a synthetic CT data set, with the commands a user would type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib.figure import Figure

from nnunetv2_hiendmae.command import CommandParser, check_count
from pretraining.checkpoint import FINAL, load_checkpoint
from pretraining.config import RunConfig
from pretraining.corpus import to_canonical
from pretraining.masking import random_shuffle
from pretraining.model import HiEndMAE
from pretraining.phantom import LABELS, write_phantoms
from pretraining.preprocessed import DataSet, PreprocessedCorpus
from pretraining.preview import reconstruct

DATASET = "Dataset999_SyntheticTrunk"
PLANS = "nnUNetPlans_hiendmae"
PREDICT = f"-d 999 -tr nnUNetTrainerHiEndMAE -p {PLANS} -c 3d_fullres -f 0 --disable_tta -npp 1 -nps 1"
MARKER = "made_by_hiendmae_demo"
COMMANDS = (
    "nnUNetv2_plan_and_preprocess -d 999 -c 3d_fullres -np 2",
    "hiendmae_pretrain -d 999 -preset tiny -device {device} -steps {pretrain_steps} -crop_size 32 32 32 -val_every 50",
    "hiendmae_plan -d 999 --epochs {epochs} --num_iterations_per_epoch 25 --num_val_iterations_per_epoch 2 "
    "--feature_size 8 --initial_lr 5e-3",
    f"nnUNetv2_train 999 3d_fullres 0 -tr nnUNetTrainerHiEndMAE -p {PLANS} -device {{device}}",
    f"nnUNetv2_predict -i {{raw}}/imagesTs -o {{out}}/predictions {PREDICT} -device {{device}}",
    "nnUNetv2_evaluate_folder {raw}/labelsTs {out}/predictions -djfile {raw}/dataset.json "
    f"-pfile {{preprocessed}}/{PLANS}.json",
)


def scratch_environment(out: Path) -> dict[str, str]:
    """The user's environment with nnU-Net's folders, and nothing of the user's own, in the scratch folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("HIENDMAE_WEIGHTS", "nnUNet_extTrainer")}
    for kind in ("raw", "preprocessed", "results"):
        env[f"nnUNet_{kind}"] = str(out / f"nnUNet_{kind}")
    workers = str(min(2, os.cpu_count() or 1))  # each worker is a process that imports torch
    return {**env, "nnUNet_n_proc_DA": workers, "nnUNet_def_n_proc": workers}


def run_command(command: str, number: int, out: Path, env: dict[str, str]) -> None:
    """Show a command, run it, keep its output in a log. ``RuntimeError`` with the log's end if it fails."""
    print(f"\n$ {command}", flush=True)
    log = out / "logs" / f"{number}_{command.split()[0]}.log"
    log.parent.mkdir(exist_ok=True)
    words = shlex.split(command)
    beside = Path(sys.executable).with_name(words[0])  # the same environment's commands, on the PATH or not
    words[0] = str(beside) if beside.exists() else words[0]
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(words, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"'{command}' ended with exit code {code}. The end of {log}:\n{end}")
    print(f"  done in {time.monotonic() - started:.0f} s, output in {log}", flush=True)


def dice_table(summary: Path) -> str:
    """Dice of every organ on the test cases, from nnU-Net's summary.json."""
    mean = json.loads(summary.read_text(encoding="utf-8"))["mean"]
    rows = [f"  {name:<10} {mean[str(label)]['Dice']:.3f}" for name, label in LABELS.items() if label]
    return "\n".join(["  organ      Dice", *rows])


def reconstruct_held_out(out: Path, env: dict[str, str]) -> list[np.ndarray]:
    """A crop of the data, what the encoder saw of it, and the reconstruction; each ``(H, W, D)``."""
    os.environ.update({k: env[k] for k in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")})
    run = next((out / "nnUNet_results").rglob(FINAL)).parent
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None
    config = RunConfig.from_dict(checkpoint["config"])
    model = HiEndMAE(config.model)
    model.load_state_dict(checkpoint["network_weights"])
    corpus = PreprocessedCorpus([DataSet.open(DATASET, config.plans, config.configuration, config.window_hu)])
    shape, size = corpus.shape(0), config.model.img_size
    h, w, d = ((edge - n) // 2 for edge, n in zip(shape, size, strict=True))
    x = torch.from_numpy(to_canonical(corpus.read(0, (h, w, d), size), corpus.intensity(0)))[None]
    ids = torch.from_numpy(random_shuffle(np.random.default_rng(0), config.model.num_tokens))[None]
    seen, rebuilt = reconstruct(model, x, ids)
    return [t[0, 0].numpy() for t in (x, seen, rebuilt)]


def draw_picture(crop: list[np.ndarray], raw: Path, predictions: Path, file: Path) -> None:
    """CT crop, masked input, reconstruction; below a test case with its label and the prediction."""
    case = sorted((raw / "labelsTs").glob("*.nii.gz"))[0].name
    ct, label, prediction = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in (raw / "imagesTs" / case.replace(".nii", "_0000.nii"), raw / "labelsTs" / case, predictions / case)
    )
    z = int(np.argmax((label == LABELS["kidneys"]).sum((1, 2))))
    figure = Figure(figsize=(12, 8), layout="constrained")
    top, bottom = figure.subplots(2, 3)
    for axis, image, title in zip(top, crop, ("CT crop", "what the encoder sees", "reconstruction"), strict=True):
        axis.set_facecolor("tab:blue")
        axis.imshow(image[image.shape[0] // 2], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
    for axis, overlay, title in zip(bottom, (None, label, prediction), ("test CT", "label", "prediction"), strict=True):
        axis.imshow(ct[z], cmap="gray", vmin=-175, vmax=250)
        if overlay is not None:
            axis.imshow(np.ma.masked_equal(overlay[z], 0), cmap="Set1", vmin=1, vmax=9, alpha=0.7, interpolation="none")
        axis.set_title(title)
    for axis in (*top, *bottom):
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("Synthetic phantom; window -175…250 HU")
    figure.savefig(file)


def prepare_folder(out: Path) -> None:
    """An empty scratch folder. ``ValueError`` if it holds something the demo did not make."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ValueError(f"-o {out}: the folder holds other files; choose a new one.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def demo(out: Path, device: str, pretrain_steps: int, epochs: int) -> None:
    """Write phantoms, run every command, report."""
    prepare_folder(out)
    env = scratch_environment(out)
    raw = write_phantoms(out / "nnUNet_raw", DATASET, num_training=12, num_test=3)
    print(f"12 training and 3 test cases of synthetic CT in {raw}")
    values = {"raw": raw, "out": out, "preprocessed": out / "nnUNet_preprocessed" / DATASET, "device": device}
    for number, command in enumerate(COMMANDS, 1):
        run_command(command.format(**values, pretrain_steps=pretrain_steps, epochs=epochs), number, out, env)
    picture = out / "demo.png"
    draw_picture(reconstruct_held_out(out, env), raw, out / "predictions", picture)
    print(f"\nDice on the 3 test cases (synthetic; says nothing about patients):\n{dice_table_of(out)}")
    print(f"\npicture: {picture}\nlosses:  {next((out / 'nnUNet_results').rglob('HiEndMAE__*/*/progress.png'))}")


def dice_table_of(out: Path) -> str:
    """The table of a finished demo."""
    return dice_table(out / "predictions" / "summary.json")


def parser() -> CommandParser:
    p = CommandParser(
        prog="hiendmae_demo",
        usage="hiendmae_demo [-o FOLDER] [-device cpu]",
        description=__doc__,
        examples="Example:\n  hiendmae_demo        writes ./hiendmae_demo; about five minutes on two CPU cores\n",
    )
    p.add_argument("-o", type=Path, default=Path("hiendmae_demo"), metavar="FOLDER", help="scratch [./hiendmae_demo]")
    p.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="[cpu]")
    p.add_argument("-pretrain_steps", type=int, default=200, help="[200]")
    p.add_argument("-epochs", type=int, default=6, help="epochs of fine-tuning, 25 iterations each [6]")
    return p


def main() -> None:
    """Entry point."""
    p = parser()
    args = p.parse_args()
    if args.o.is_file():
        p.error(f"-o {args.o} is a file; name a folder.")
    try:
        check_count("-pretrain_steps", args.pretrain_steps)
        check_count("-epochs", args.epochs)
        demo(args.o.absolute(), args.device, args.pretrain_steps, args.epochs)
    except ValueError as error:
        p.exit(2, f"hiendmae_demo: error: {error}\n")
    except RuntimeError as error:
        p.exit(1, f"hiendmae_demo: {error}\n")
    except KeyboardInterrupt:
        p.exit(130, "hiendmae_demo: interrupted; the same command starts anew\n")


if __name__ == "__main__":
    main()
