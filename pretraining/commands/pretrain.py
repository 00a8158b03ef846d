"""``hiendmae_pretrain``: from nnU-Net's preprocessed data to encoder weights."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nnunetv2_hiendmae.checks import MAX_COUNT, check_count
from nnunetv2_hiendmae.command import CommandParser, full_memory, run_command, verdict
from nnunetv2_hiendmae.files import alone_in, dataset_ids, dataset_name, read_json
from pretraining import distributed
from pretraining.checkpoint import export_encoder, load_checkpoint, open_run, run_folder, weights_name
from pretraining.commands.arguments import add_data_and_model, config_fields, corpus_of, make_runtime
from pretraining.config import PRESETS, WEIGHT_INITS, RunConfig, Runtime
from pretraining.data.cases import case_marks, record_cases, refuse_other_cases
from pretraining.data.corpus import Corpus
from pretraining.data.open import open_corpus, packed_folder
from pretraining.data.stream import split_cases, steps_of_epochs
from pretraining.device import pick_device
from pretraining.initialise import check_origin, open_origin
from pretraining.model import HiEndMAE
from pretraining.probe import labelled_cases
from pretraining.recipe import choose_recipe
from pretraining.speed import estimate
from pretraining.train import train

EXAMPLES = """Examples:
  hiendmae_pretrain -d 500                                     one GPU, published model, crops of 96³ voxels
  hiendmae_pretrain -d 501 502 -preset tiny -device cpu -steps 300
  hiendmae_pretrain -packed HiEndMAE_packed_500 -num_gpus 4 -batch_size 768     the published batch
  hiendmae_pretrain -d 500 -init weights.pth                   start from weights: yours, the authors', OpenMind's
  hiendmae_pretrain -d 500 --c                                 continue after an interruption
"""
RECIPE = ("base_lr", "warmup_steps", "weight_init")
"""What ``choose_recipe`` fills in where the user leaves it open."""
LEFT_OPEN = (*RECIPE, "precision")
"""What a continued run has as it was started where the user leaves it open, on another GPU as well."""
KEEPING = ("checkpoint_minutes", "keep_checkpoints", "stop_on_plateau")
"""Fields of Runtime beside those that speed depends on."""
CONFIG_FILE = "config.json"
ESTIMATE_S = 10.0
"""Of steps that ``--estimate`` looks at."""
LESS_MEMORY = "Use -accumulate or --activation_checkpointing, or lower -batch_size."
FEWER_WORKERS = "Use fewer loader processes (-num_workers), or ask for more memory."
AGAIN = "--c continues from the last checkpoint"


@dataclass(frozen=True)
class Job:
    """What every rank needs to know."""

    config: RunConfig
    runtime: Runtime
    folder: Path
    packed: Path | None
    resume: bool
    estimate: bool
    cases: dict[str, int]
    """Marks of the cases; only the first rank's job has them."""
    held_out: list[str]
    """Names of the cases that are not trained on."""


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
    p.add_argument("-init", metavar="FILE", help="start from a run's folder, its checkpoint, encoder weights, the "
                   "authors' file, or a Primus of nnssl or nnU-Net [random]")  # fmt: skip
    length = p.add_mutually_exclusive_group()
    length.add_argument("-steps", type=int, help="optimizer steps")
    length.add_argument("-epochs", type=float, help="passes over the cases, crops_per_case crops each [by preset]")
    p.add_argument("-lr", dest="base_lr", type=float, help="peak learning rate [by the sizes; printed with its reason]")
    p.add_argument("-warmup_steps", type=float, metavar="N", help="linear warm-up [by the sizes]")
    p.add_argument("-weight_init", choices=WEIGHT_INITS, help="start of the residual branches [by the sizes]")
    p.add_argument("-val_every", type=int, default=100, help="steps between validations [100]")
    p.add_argument("-log_every", type=int, default=10, help="steps a line of metrics.jsonl averages [10]")
    p.add_argument("-preview_epochs", type=int, default=10, help="passes between pictures, 0: none [10]")
    p.add_argument("-probe", metavar="DATASET", help="labelled data set on which a linear map of the tokens is judged")
    p.add_argument("-probe_plans", metavar="PLANS", help="its plans, of the run's spacing [those of the run]")
    p.add_argument("-probe_every", type=int, metavar="N", help="steps between probes [5 validations]")
    p.add_argument(
        "-checkpoint_minutes", type=float, default=10.0, metavar="N", help="between checkpoints, 0: always [10]"
    )
    p.add_argument("-keep_checkpoints", type=int, default=2, help="latest checkpoints on disk [2]")
    p.add_argument("--stop_on_plateau", action="store_true", help="end a run that does not learn, with exit code 3")
    p.add_argument("--estimate", action="store_true", help="take a few steps, say how long the run will take and what "
                   "it needs, and write nothing")  # fmt: skip
    p.add_argument("--export", action="store_true", help="write the encoder of an unfinished run's latest checkpoint")
    return p


def make_config(args: argparse.Namespace, corpus: Corpus) -> RunConfig:
    """Flags over the preset's defaults. ``ValueError`` for impossible values."""
    preset, fields = PRESETS[args.preset], config_fields(args, corpus)
    steps = args.steps
    if steps is None:
        epochs = preset.epochs if args.epochs is None else args.epochs
        if not 0 < epochs < math.inf:
            raise ValueError(f"epochs={epochs} must be a positive number.")
        cases, _ = split_cases(corpus, args.seed)
        steps = steps_of_epochs(epochs, len(cases), fields["batch_size"], fields["crops_per_case"])
    check_count("steps", steps)
    recipe = choose_recipe(fields["model"], args.preset, fields["batch_size"], steps)
    given = {name: getattr(args, name) for name in RECIPE}
    chosen = {name: getattr(recipe, name) if value is None else value for name, value in given.items()}
    return RunConfig(
        **fields,
        **chosen,
        recipe=recipe.reason if None in given.values() else "",
        steps=steps,
        init=args.init and str(Path(args.init).absolute()),
        val_every=args.val_every,
        log_every=args.log_every,
        preview_epochs=args.preview_epochs,
        probe=args.probe and dataset_name(args.probe, "-probe"),
        probe_plans=args.probe_plans,
        probe_every=min(5 * args.val_every, MAX_COUNT) if args.probe_every is None else args.probe_every,
    )


def as_started(config: RunConfig, args: argparse.Namespace, folder: Path) -> RunConfig:
    """What the user left open stays as it was when the run was started, by an earlier version or on another GPU."""
    file = folder / CONFIG_FILE
    saved = read_json(file) if file.is_file() else load_checkpoint(folder)["config"]
    try:
        started = RunConfig.from_dict(saved)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not describe a run ({error}). Remove it: the checkpoint knows as well."
        ) from None
    open_fields = [name for name in LEFT_OPEN if getattr(args, name) is None]
    return replace(config, recipe=started.recipe, **{name: getattr(started, name) for name in open_fields})


def export(args: argparse.Namespace) -> int:
    """Write the encoder of an unfinished run's latest checkpoint, under a name that nothing takes by itself."""
    corpus = corpus_of(args)
    folder = folder_of(args, make_config(args, corpus))
    checkpoint = load_checkpoint(folder)
    config = RunConfig.from_dict(checkpoint["config"])
    model = HiEndMAE(config.model)
    model.load_state_dict(checkpoint["network_weights"])
    sha256 = export_encoder(folder, model, config, corpus, checkpoint["step"])
    file = folder / weights_name(config, checkpoint["step"])
    print(f"Encoder after step {checkpoint['step']} of {config.steps}: {file} (sha256 {sha256})")
    return 0


def folder_of(args: argparse.Namespace, config: RunConfig) -> Path:
    """The run's folder."""
    run = args.run or f"{args.preset}_{dataset_ids(config.datasets)}"
    return run_folder(config.datasets[0], config.plans, config.configuration, run)


def prepare(args: argparse.Namespace) -> Job:
    """Check everything a user may have got wrong, make the run's folder, say what will be done."""
    ranks = max(distributed.world_size(), args.num_gpus)
    ranks_here = max(distributed.local_world_size(), args.num_gpus)
    if args.num_gpus < 1 or (distributed.launched() and args.num_gpus > 1):
        raise ValueError(f"-num_gpus {args.num_gpus}: must be at least 1, and 1 under torchrun, which sets the number.")
    distributed.timeout()
    pick_device(args.device, ranks_here)
    corpus = corpus_of(args)
    config = make_config(args, corpus)
    runtime = make_runtime(args, ranks_here, **{name: getattr(args, name) for name in KEEPING})
    runtime.micro_batch(config.batch_size, ranks)
    if config.init is not None and not args.resume:
        check_origin(open_origin(Path(config.init)), config)
    labelled_cases(config, corpus)
    folder = folder_of(args, config)
    if not args.estimate:
        open_run(folder, args.resume)
    if args.resume:
        config = as_started(config, args, folder)
    cases = case_marks(corpus) if distributed.rank() == 0 else {}
    held_out = [corpus.name(case) for case in split_cases(corpus, config.seed)[1]]
    if args.resume and cases:
        refuse_other_cases(folder, cases, held_out)
    packed = packed_folder(args.packed).absolute() if args.packed is not None else None
    if distributed.rank() == 0:
        announce(config, runtime, corpus, folder, ranks)
    return Job(config, runtime, folder, packed, args.resume, args.estimate, cases, held_out)


def announce(config: RunConfig, runtime: Runtime, corpus: Corpus, folder: Path, ranks: int) -> None:
    """What a run will do, in a few lines."""
    names = ", ".join(config.datasets)
    print(f"{len(corpus)} cases of {names} ({config.plans}); {config.steps} steps of {config.batch_size} crops")
    print(f"{ranks} × {runtime.device}, {config.precision}, {runtime.num_workers} loader processes each")
    rate = f"peak rate {config.base_lr:g} after {config.warmup_steps:g} steps of warm-up, {config.weight_init} start"
    print(f"{rate} ({config.recipe or 'as given'})")
    print(f"run folder: {folder}", flush=True)
    for warning in corpus.warnings:
        print(f"WARNING: {warning}")


def work(job: Job) -> None:
    """One rank. A failed one ends at once: Python would wait for loader processes, the rank for others that failed.

    So does each of several that is done: gloo's threads may still hold a tensor of Python's, and one that lets go of
    it while the interpreter shuts down aborts the process (SIGABRT: a failed rank, and the others are stopped).
    """
    code = 0
    try:
        pretrain(job)
    except BaseException as error:  # whatever it is, the other ranks must not wait for this one
        code, line = verdict(error, AGAIN)
        if full := full_memory(error):
            less = FEWER_WORKERS if full == "this machine" and job.runtime.device != "cpu" else LESS_MEMORY
            line = f"error: the memory of {full} is full. {less}"
        print(f"hiendmae_pretrain: {line}", file=sys.stderr, flush=True)
    if code or distributed.launched():
        sys.stdout.flush()
        os._exit(code)


def pretrain(job: Job) -> None:
    """Train as one rank of the process group."""
    config = job.config
    device = pick_device(job.runtime.device, distributed.local_world_size())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if job.estimate:
        with distributed.process_group(device.type):
            lines = estimate(config, job.runtime, corpus_of_job(job), device, ESTIMATE_S)
        if distributed.rank() == 0:
            print("\n".join(lines), flush=True)
        return
    first = distributed.rank() == 0  # it holds the lock of the run's folder for all
    alone = alone_in(job.folder, "Wait for its end, or choose another -run.") if first else nullcontext()
    with alone, distributed.process_group(device.type):
        if first:
            record_cases(job.folder, job.cases, job.held_out)
        if first and not job.resume:
            (job.folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2))
        sha256 = train(config, job.runtime, corpus_of_job(job), job.folder, device, job.resume)
    if sha256:
        print(f"Encoder weights: {job.folder / 'encoder_weights.pth'} (sha256 {sha256})")


def corpus_of_job(job: Job) -> Corpus:
    """The corpus, opened by the process that reads it."""
    if job.packed is not None:
        return open_corpus(None, job.packed, None, None, None)
    config = job.config
    return open_corpus(config.datasets, None, config.plans, config.configuration, config.window_hu)


def run(args: argparse.Namespace) -> int:
    """What the command does: the checks, then every rank."""
    if args.export:
        return export(args)
    try:
        job = prepare(args)
    except (ValueError, OSError) as error:
        if distributed.rank():  # every rank makes the same mistake; the first reports it
            os._exit(2)
        raise ValueError(str(error)) from None  # before the first step a folder that cannot be written is one, too
    if args.num_gpus > 1:
        return distributed.launch(work, args.num_gpus, job)
    work(job)
    return 0


def main() -> None:
    """Entry point."""
    run_command(parser(), run, AGAIN)
