"""``hiendmae_pretrain``: from nnU-Net's preprocessed data to encoder weights."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from nnunetv2_hiendmae.command import CommandParser, check_count
from nnunetv2_hiendmae.folders import dataset_names
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW
from nnunetv2_hiendmae.lock import alone_in
from pretraining import distributed
from pretraining.checkpoint import FINAL, LATEST, OLDER, run_folder
from pretraining.config import DECODERS, PACKED, PRECISIONS, PRESETS, RunConfig, Runtime
from pretraining.corpus import Corpus
from pretraining.pack_cli import packed_folder
from pretraining.packed import PackedCorpus
from pretraining.preprocessed import DataSet, PreprocessedCorpus, default_plans
from pretraining.stream import split_cases, steps_of_epochs
from pretraining.train import train

EXAMPLES = """Examples:
  hiendmae_pretrain -d 500                                     one GPU, published model, crops of 96³ voxels
  hiendmae_pretrain -d 501 502 -preset tiny -device cpu -steps 300
  hiendmae_pretrain -packed HiEndMAE_packed_500 -num_gpus 4 -batch_size 768     the published batch
  hiendmae_pretrain -d 500 --c                                 continue after an interruption
"""
LESS_MEMORY = "Use -accumulate or --activation_checkpointing, or lower -batch_size."


@dataclass(frozen=True)
class Job:
    """What every rank is told."""

    config: RunConfig
    runtime: Runtime
    folder: Path
    packed: Path | None
    resume: bool


def parser() -> CommandParser:
    """All flags; the long forms are nnU-Net's where it has them."""
    p = CommandParser(
        prog="hiendmae_pretrain",
        usage="hiendmae_pretrain -d 500 [-preset large_p12] [-device cuda] [--c] [...]",
        description="Pre-train a Hi-End-MAE encoder on data sets that nnU-Net preprocessed.",
        examples=EXAMPLES,
    )
    add_data_and_model(p)
    p.add_argument("-num_gpus", type=int, default=1, help="processes on this machine, also with -device cpu [1]")
    p.add_argument("--c", action="store_true", dest="resume", help="continue the run from its latest checkpoint")
    p.add_argument("-run", metavar="NAME", help="name of the run's folder [preset and data set ids]")
    length = p.add_mutually_exclusive_group()
    length.add_argument("-steps", type=int, help="optimizer steps")
    length.add_argument("-epochs", type=float, help="passes over the cases, crops_per_case crops each [by preset]")
    p.add_argument("-lr", type=float, help="peak learning rate [by preset]")
    p.add_argument("-val_every", type=int, default=100, help="steps between validations and checkpoints [100]")
    p.add_argument("-log_every", type=int, default=10, help="steps a line of metrics.jsonl averages [10]")
    p.add_argument("-preview_epochs", type=int, default=10, help="passes between pictures, 0: none [10]")
    p.add_argument("-keep_checkpoints", type=int, default=2, help="latest checkpoints on disk [2]")
    return p


def add_data_and_model(p: argparse.ArgumentParser) -> None:
    """Flags that say what is computed and how, for measuring its speed as well as for training."""
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", nargs="+", metavar="DATASET", help="data set names or ids")
    source.add_argument("-packed", metavar="FOLDER", help="what hiendmae_pack wrote, instead of -d")
    p.add_argument("-c", metavar="CONFIGURATION", help="plans configuration [3d_fullres]")
    p.add_argument("-p", metavar="PLANS", help="plans name [HiEndMAEPlans where all have them, else nnUNetPlans]")
    p.add_argument("-preset", default="large_p12", choices=PRESETS, help="model and defaults [large_p12]")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="[cuda]")
    p.add_argument("-batch_size", type=int, help="crops a step, over all GPUs [by preset]")
    p.add_argument("-accumulate", type=int, default=1, help="micro-batches a step, for less memory [1]")
    p.add_argument("-crop_size", type=int, nargs=3, metavar="N", help="voxels, divisible by the patch [by preset]")
    p.add_argument("-patch_size", type=int, nargs=3, metavar="N", help="voxels of a token [by preset]")
    p.add_argument("-decoder", default="hierarchical", choices=DECODERS, help="others are controls [hierarchical]")
    p.add_argument("--no_augmentation", action="store_true", help="no flips, rotations, intensity changes")
    p.add_argument("-crops_per_case", type=int, help="crops from a case before the next [by preset]")
    p.add_argument("-mask_ratio", type=float, default=0.75, help="share of patches to rebuild [0.75]")
    p.add_argument("-window", type=float, nargs=2, metavar="HU", help="[-175 250]")
    p.add_argument("-grad_clip", type=float, default=0.0, help="norm that gradients are clipped to, 0: not [0]")
    p.add_argument("-precision", choices=PRECISIONS, help="[bf16 or fp16 on CUDA, else fp32]")
    p.add_argument("--activation_checkpointing", action="store_true", help="less memory, about a third more time")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("-seed", type=int, default=41, help="[41]")
    p.add_argument("-num_workers", type=int, help="loader processes [half the cores, at most 12]")


def open_corpus(config: RunConfig, packed: Path | None) -> Corpus:
    """The back end that the config names."""
    if packed is not None:
        return PackedCorpus(packed)
    window = config.window_hu
    return PreprocessedCorpus([DataSet.open(d, config.plans, config.configuration, window) for d in config.datasets])


def find_corpus(args: argparse.Namespace) -> tuple[Corpus, dict[str, Any]]:
    """The corpus that -d or -packed names, and the config fields that describe it."""
    if args.packed is not None:
        packed = PackedCorpus(packed_folder(args.packed))
        given = [flag for flag in ("p", "c", "window") if getattr(args, flag) is not None]
        if given:
            raise ValueError(f"-{given[0]} was settled when {args.packed} was packed; leave it out.")
        names = tuple(d.name for d in packed.datasets)
        fields = {"datasets": names, "plans": PACKED, "configuration": packed.folder.name}
        return packed, {**fields, "window_hu": packed.window, "packed_bits": packed.bits}
    window = tuple(args.window or DEFAULT_WINDOW)
    plans, configuration = args.p or default_plans(args.d), args.c or "3d_fullres"
    sources = [DataSet.open(d, plans, configuration, window) for d in dataset_names(args.d)]
    corpus = PreprocessedCorpus(sources)
    return corpus, {
        "datasets": tuple(d.name for d in sources),
        "plans": plans,
        "configuration": configuration,
        "window_hu": window,
    }


def make_config(args: argparse.Namespace, corpus: Corpus, source: dict[str, Any], **run: Any) -> RunConfig:
    """Flags over the preset's defaults; ``run`` are further fields. ``ValueError`` for impossible values."""
    preset = PRESETS[args.preset]
    batch_size = preset.batch_size if args.batch_size is None else args.batch_size
    crops_per_case = preset.crops_per_case if args.crops_per_case is None else args.crops_per_case
    check_count("-batch_size", batch_size)
    check_count("-crops_per_case", crops_per_case)
    model = preset.model(
        crop_size=tuple(args.crop_size or preset.crop_size),
        patch_size=tuple(args.patch_size or preset.encoder.patch_size),
        in_channels=corpus.in_channels,
        mask_ratio=args.mask_ratio,
        decoder=args.decoder,
    )
    return RunConfig(
        **source,
        model=model,
        batch_size=batch_size,
        crops_per_case=crops_per_case,
        grad_clip=args.grad_clip,
        precision=args.precision or default_precision(args.device),
        augment=not args.no_augmentation,
        seed=args.seed,
        **run,
    )


def length_of(args: argparse.Namespace, config: RunConfig, cases: int) -> int:
    """Optimizer steps that -steps, -epochs or the preset ask for."""
    if args.steps is not None:
        return int(args.steps)
    epochs = PRESETS[args.preset].epochs if args.epochs is None else args.epochs
    if not 0 < epochs < math.inf:
        raise ValueError(f"-epochs {epochs} must be a positive number.")
    return steps_of_epochs(epochs, cases, config.batch_size, config.crops_per_case)


def make_runtime(args: argparse.Namespace, ranks_here: int, **run: Any) -> Runtime:
    """Flags over defaults; the processes of a node share its cores. ``ValueError`` for impossible values."""
    cores = multiprocessing.cpu_count() // ranks_here
    return Runtime(
        device=args.device,
        num_workers=min(12, cores // 2) if args.num_workers is None else args.num_workers,
        accumulate=args.accumulate,
        activation_checkpointing=args.activation_checkpointing,
        compile=args.compile,
        **run,
    )


def default_precision(device: str) -> str:
    """bf16 where the GPU computes with it, fp16 on older ones, fp32 elsewhere."""
    if device != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def open_run(folder: Path, resume: bool) -> None:
    """Make the run's folder. ``ValueError`` if there is nothing to continue, or something to lose."""
    exists = any((folder / name).is_file() for name in (LATEST, FINAL))
    if resume and not exists and not any(folder.glob(OLDER.format("*"))):
        raise ValueError(f"--c: {folder} has no checkpoint to continue from. Leave --c out to start the run.")
    if exists and not resume:
        raise ValueError(f"{folder} holds a run already. Continue it with --c, or choose another name with -run.")
    folder.mkdir(parents=True, exist_ok=True)


def pick_device(name: str, ranks_here: int) -> torch.device:
    """``ValueError`` if the machine lacks the device. On the CPU all cores compute, on a GPU one feeds it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: torch finds no CUDA device. Use -device cpu (and -preset tiny) or mps.")
    if name == "cuda" and torch.cuda.device_count() < ranks_here:
        raise ValueError(f"-num_gpus {ranks_here}: torch finds {torch.cuda.device_count()} CUDA devices.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps: torch finds no Apple GPU. Use -device cpu (and -preset tiny).")
    torch.set_num_threads(max(multiprocessing.cpu_count() // ranks_here, 1) if name == "cpu" else 1)
    return torch.device(name, distributed.local_rank()) if name == "cuda" else torch.device(name)


def prepare(args: argparse.Namespace) -> Job:
    """Check everything a user may have got wrong, make the run's folder, say what will be done."""
    ranks = max(distributed.world_size(), args.num_gpus)
    ranks_here = max(distributed.local_world_size(), args.num_gpus)
    if args.num_gpus < 1 or (distributed.launched() and args.num_gpus > 1):
        raise ValueError(f"-num_gpus {args.num_gpus}: must be at least 1, and 1 under torchrun, which sets the number.")
    distributed.timeout()
    pick_device(args.device, ranks_here)
    corpus, source = find_corpus(args)
    preset = PRESETS[args.preset]
    config = make_config(
        args,
        corpus,
        source,
        steps=1,  # until the batch size is known
        base_lr=preset.base_lr if args.lr is None else args.lr,
        val_every=args.val_every,
        log_every=args.log_every,
        preview_epochs=args.preview_epochs,
    )
    config = replace(config, steps=length_of(args, config, len(split_cases(corpus, config.seed)[0])))
    runtime = make_runtime(args, ranks_here, keep_checkpoints=args.keep_checkpoints)
    runtime.micro_batch(config.batch_size, ranks)
    ids = "_".join(name[len("Dataset") :].split("_")[0] for name in config.datasets)
    folder = run_folder(config.datasets[0], config.plans, config.configuration, args.run or f"{args.preset}_{ids}")
    open_run(folder, args.resume)
    packed = packed_folder(args.packed).absolute() if args.packed is not None else None
    if distributed.rank() == 0:
        announce(config, runtime, corpus, folder, ranks)
    return Job(config, runtime, folder, packed, args.resume)


def announce(config: RunConfig, runtime: Runtime, corpus: Corpus, folder: Path, ranks: int) -> None:
    """What a run will do, in a few lines."""
    names = ", ".join(config.datasets)
    print(f"{len(corpus)} cases of {names} ({config.plans}); {config.steps} steps of {config.batch_size} crops")
    print(f"{ranks} × {runtime.device}, {config.precision}, {runtime.num_workers} loader processes each")
    print(f"run folder: {folder}", flush=True)
    if isinstance(corpus, PreprocessedCorpus):
        for dataset in corpus.sources:
            if dataset.warning:
                print(f"WARNING: {dataset.warning}")


def work(job: Job) -> None:
    """One rank: train, then end the process with the right exit code."""
    try:
        device = pick_device(job.runtime.device, distributed.local_world_size())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        alone = (
            nullcontext() if distributed.rank() else alone_in(job.folder, "Wait for its end, or choose another -run.")
        )
        with alone, distributed.process_group(device.type):  # the first rank of a group holds the lock
            if distributed.rank() == 0 and not job.resume:
                (job.folder / "config.json").write_text(json.dumps(job.config.to_dict(), indent=2))
            corpus = open_corpus(job.config, job.packed)
            sha256 = train(job.config, job.runtime, corpus, job.folder, device, job.resume)
        if sha256:
            print(f"Encoder weights: {job.folder / 'encoder_weights.pth'} (sha256 {sha256})")
        return
    except ValueError as error:
        of_a_loader = "in DataLoader worker" in str(error)  # what it met in the data, not a flag's mistake
        code, message = 1 if of_a_loader else 2, f"error: {one_line(error)}"
    except FloatingPointError as error:
        code, message = 1, str(error)
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        reason = "A loader process was lost." if isinstance(error, (ConnectionError, EOFError)) else one_line(error)
        code, message = 1, f"error: {reason} Continue from the last checkpoint with --c."
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):  # CUDA, CPU
            message = f"error: the memory of {job.runtime.device} is full. {LESS_MEMORY}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; --c continues from the last checkpoint"
    except Exception:  # a fault of this program
        traceback.print_exc()
        code, message = 1, "error: this should not have happened; --c continues from the last checkpoint"
    leave(code, message)


def one_line(error: BaseException) -> str:
    """A message as a sentence, without the traceback that torch puts around what a loader process met."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    sentence = re.sub(r"^\w+Error: ", "", lines[-1]) if "Original Traceback" in str(error) else lines[0]
    return f"{sentence.rstrip('.')}."


def leave(code: int, message: str) -> NoReturn:
    """End the process with one line, at once: Python would wait for loader processes, a rank for others that failed."""
    print(f"hiendmae_pretrain: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Entry point: exit 2 for a flag's mistake, 1 for what went wrong later; one line each."""
    args = parser().parse_args()
    try:
        job = prepare(args)
    except KeyboardInterrupt:
        leave(130, "interrupted before the first step")
    except (ValueError, OSError) as error:
        if distributed.rank():  # every rank makes the same mistake; the first tells it
            os._exit(2)
        leave(2, f"error: {error}")
    if args.num_gpus > 1:
        sys.exit(distributed.launch(work, args.num_gpus, job))
    work(job)


if __name__ == "__main__":
    main()
