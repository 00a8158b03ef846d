"""``hiendmae_pretrain``: from nnU-Net's preprocessed data to encoder weights."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path

import torch

from pretraining.checkpoint import FINAL, LATEST, run_folder
from pretraining.config import DECODERS, PRESETS, RunConfig
from pretraining.corpus import Corpus, DataSet
from pretraining.stream import split_cases, steps_of_epochs
from pretraining.train import train

EXAMPLE = """examples:
  hiendmae_pretrain -d 500                                     one GPU, published model, crops of 96³ voxels
  hiendmae_pretrain -d 501 502 -preset tiny -device cpu -steps 300
  hiendmae_pretrain -d 500 --c                                 continue after an interruption
"""


def parser() -> argparse.ArgumentParser:
    """All flags; the long forms are nnU-Net's where it has them."""
    p = argparse.ArgumentParser(
        prog="hiendmae_pretrain",
        usage="hiendmae_pretrain -d 500 [-preset large_p12] [-device cuda] [--c] [...]",
        description="Pre-train a Hi-End-MAE encoder on data sets that nnU-Net preprocessed.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="data set names or ids")
    p.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="plans configuration [3d_fullres]")
    p.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans name [nnUNetPlans]")
    p.add_argument("-preset", default="large_p12", choices=PRESETS, help="model and defaults [large_p12]")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="[cuda]")
    p.add_argument("--c", action="store_true", dest="resume", help="continue the run from its latest checkpoint")
    p.add_argument("-run", metavar="NAME", help="name of the run's folder [preset and data set ids]")
    length = p.add_mutually_exclusive_group()
    length.add_argument("-steps", type=int, help="optimizer steps")
    length.add_argument("-epochs", type=float, help="passes over the cases, crops_per_case crops each [by preset]")
    p.add_argument("-batch_size", type=int, help="crops a step [by preset]")
    p.add_argument("-crop_size", type=int, nargs=3, metavar="N", help="voxels, divisible by the patch [by preset]")
    p.add_argument("-patch_size", type=int, nargs=3, metavar="N", help="voxels of a token [by preset]")
    p.add_argument("-decoder", default="hierarchical", choices=DECODERS, help="others are controls [hierarchical]")
    p.add_argument("--no_augmentation", action="store_true", help="no flips, rotations, intensity changes")
    p.add_argument("-crops_per_case", type=int, help="crops from a case before the next [by preset]")
    p.add_argument("-lr", type=float, help="peak learning rate [by preset]")
    p.add_argument("-mask_ratio", type=float, default=0.75, help="share of patches to rebuild [0.75]")
    p.add_argument("-window", type=float, nargs=2, default=(-175.0, 250.0), metavar="HU", help="[-175 250]")
    p.add_argument("-val_every", type=int, default=100, help="steps between validations and checkpoints [100]")
    p.add_argument("-seed", type=int, default=41, help="[41]")
    p.add_argument("-num_workers", type=int, help="loader processes [half the cores, at most 12]")
    return p


def make_config(args: argparse.Namespace, corpus: Corpus) -> RunConfig:
    """Flags over the preset's defaults. ``ValueError`` for impossible values."""
    preset = PRESETS[args.preset]
    batch_size = preset.batch_size if args.batch_size is None else args.batch_size
    crops_per_case = preset.crops_per_case if args.crops_per_case is None else args.crops_per_case
    if batch_size < 1 or crops_per_case < 1:
        raise ValueError(f"-batch_size {batch_size} and -crops_per_case {crops_per_case} must be at least 1.")
    steps = args.steps
    if steps is None:
        cases = len(split_cases(corpus, args.seed)[0])
        epochs = preset.epochs if args.epochs is None else args.epochs
        steps = steps_of_epochs(epochs, cases, batch_size, crops_per_case)
    model = preset.model(
        crop_size=tuple(args.crop_size or preset.crop_size),
        patch_size=tuple(args.patch_size or preset.encoder.patch_size),
        in_channels=corpus.in_channels,
        mask_ratio=args.mask_ratio,
        decoder=args.decoder,
    )
    return RunConfig(
        datasets=tuple(d.name for d in corpus.datasets),
        plans=args.p,
        configuration=args.c,
        model=model,
        steps=steps,
        batch_size=batch_size,
        window_hu=tuple(args.window),
        crops_per_case=crops_per_case,
        base_lr=preset.base_lr if args.lr is None else args.lr,
        augment=not args.no_augmentation,
        val_every=args.val_every,
        seed=args.seed,
    )


def open_run(folder: Path, resume: bool) -> None:
    """Make the run's folder. ``ValueError`` if there is nothing to continue, or something to lose."""
    exists = any((folder / name).is_file() for name in (LATEST, FINAL))
    if resume and not exists:
        raise ValueError(f"--c: {folder} has no checkpoint to continue from. Leave --c out to start the run.")
    if exists and not resume:
        raise ValueError(f"{folder} holds a run already. Continue it with --c, or choose another name with -run.")
    folder.mkdir(parents=True, exist_ok=True)


def pick_device(name: str) -> torch.device:
    """``ValueError`` if the machine lacks the device. On the CPU all cores compute, on a GPU one feeds it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: torch finds no CUDA device. Use -device cpu (and -preset tiny) or mps.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps: torch finds no Apple GPU. Use -device cpu (and -preset tiny).")
    torch.set_num_threads(multiprocessing.cpu_count() if name == "cpu" else 1)
    return torch.device(name)


def run(args: argparse.Namespace) -> None:
    """What the command does; ``ValueError`` for a user's mistake."""
    device = pick_device(args.device)
    window = (args.window[0], args.window[1])
    corpus = Corpus([DataSet.open(d, args.p, args.c, window) for d in dict.fromkeys(args.d)])
    config = make_config(args, corpus)
    ids = "_".join(name[len("Dataset") :].split("_")[0] for name in config.datasets)
    folder = run_folder(config.datasets[0], args.p, args.c, args.run or f"{args.preset}_{ids}")
    open_run(folder, args.resume)
    if not args.resume:
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    print(
        f"{len(corpus.cases)} cases of {', '.join(config.datasets)}; {config.steps} steps of {config.batch_size} crops"
    )
    print(f"run folder: {folder}")
    for dataset in corpus.datasets:
        if dataset.warning:
            print(f"WARNING: {dataset.warning}")
    workers = min(12, multiprocessing.cpu_count() // 2) if args.num_workers is None else args.num_workers
    sha256 = train(config, corpus, folder, device, workers, args.resume)
    print(f"Encoder weights: {folder / 'encoder_weights.pth'} (sha256 {sha256})")


def main() -> None:
    """Entry point: exit 2 for a flag's mistake, 1 for what went wrong later; one line each."""
    p = parser()
    args = p.parse_args()
    try:
        run(args)
    except ValueError as error:
        p.exit(2, f"hiendmae_pretrain: error: {error}\n")
    except FloatingPointError as error:
        p.exit(1, f"hiendmae_pretrain: {error}\n")
    except KeyboardInterrupt:
        p.exit(130, "hiendmae_pretrain: interrupted; the same command with --c continues from the last checkpoint\n")


if __name__ == "__main__":
    main()
