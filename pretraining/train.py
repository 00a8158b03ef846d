"""The pre-training loop, in plain sight."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nnunetv2_hiendmae.optim import warmup_cosine
from pretraining import distributed
from pretraining.checkpoint import (
    FINAL,
    export_encoder,
    load_checkpoint,
    refuse_other_config,
    remove_intermediate,
    save_checkpoint,
)
from pretraining.config import RunConfig, Runtime
from pretraining.data.corpus import Corpus
from pretraining.data.loader import MicroBatches, train_loader
from pretraining.data.stream import (
    HELD_OUT,
    Batch,
    CropStream,
    canonical_crops,
    held_out_batches,
    split_cases,
    steps_of_epochs,
    stored_crops,
)
from pretraining.device import Fetch, Reading, on_device
from pretraining.flops import flops_per_crop, matrix_product
from pretraining.initialise import initialise
from pretraining.logs import Recorder
from pretraining.model import HiEndMAE
from pretraining.precision import autocast, is_finite_crop
from pretraining.probe import open_probe
from pretraining.saver import Saver
from pretraining.step import Step, TrainState, agree, backward, prepare_network, update
from pretraining.stop import Stop, stop_signals
from pretraining.watch import Plateau, Watch, gradient_norms, vital_signs

HELD_OUT_CROPS, HELD_OUT_BATCH = 64, 16


def train(
    config: RunConfig, runtime: Runtime, corpus: Corpus, folder: Path, device: torch.device, resume: bool
) -> str | None:
    """Pre-train, or continue, in a run folder, as one rank of the process group.

    Returns:
        The sha256 of the encoder that the first rank exported; None on the other ranks, and if a scheduler's signal
        asked for an early end, after a checkpoint.

    Raises:
        ValueError: continued with another config, or all checkpoints are damaged.
        FloatingPointError: a loss or gradient is not finite; names the step, cases and crop positions.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
        Plateau: the run does not learn and was to be stopped then, after a checkpoint.
    """
    state = begin_or_continue(config, folder, device, resume)
    train_cases, held_out_cases = split_cases(corpus, config.seed)
    # A continued run asks for the crops of its next step: there is no sampler to restore. Before the network: its
    # first exchange of weights starts NCCL, and loader processes must not be forked after that.
    batches = train_batches(config, runtime, CropStream(corpus, config, train_cases), state.step, device)
    network = prepare_network(state.model, runtime, device)
    held_out = held_out_crops(config, runtime, CropStream(corpus, config, held_out_cases, HELD_OUT))
    preview_every = steps_of_epochs(config.preview_epochs, len(train_cases), config.batch_size, config.crops_per_case)
    record = Recorder(config, state.step, folder, crop_seconds(config, device)) if distributed.rank() == 0 else None
    watch = Watch(config)
    probe = begin_probing(state, config, corpus, record) if record else None

    with stop_signals() as stop, Saver(folder, runtime.checkpoint_minutes, runtime.keep_checkpoints) as saver:
        queued: Step | None = None
        while state.step < config.steps:
            started = time.perf_counter()
            step_batches = [next(batches) for _ in range(runtime.accumulate)]
            fetch = Fetch(time.perf_counter() - started, None if queued is None else queued.reading, device)
            lr = config.base_lr * warmup_cosine(state.step, config.steps, config.warmup_steps)
            loss, grad_norm = backward(state, network, step_batches, config, device)
            shared = agree(state, loss, grad_norm, bool(stop))
            last_step = state.step + 1 == config.steps
            validates = (state.step + 1) % config.val_every == 0 or last_step
            gradients = gradient_norms(state.model) if record and validates else {}
            update(state, lr, shared)

            # Every rank does this at the same steps: what is asked for, or not sound, ends all loops at once.
            stopped = queued is not None and settle(queued, state, config, corpus, folder, device, record)
            queued = Step(state.step, step_batches, lr, fetch, Reading(shared))
            if validates or stopped:
                stopped = settle(queued, state, config, corpus, folder, device, record) or stopped
            if record and not last_step and saver.due() and queued.is_sound():
                write_down(queued, record)  # a run continued from here lacks no line
                saver.save(state.to_dict(config))
            if validates:
                values = held_out_losses(state, held_out, config, corpus, folder, device)
                if record:
                    values |= {**gradients, **look_at_model(state, held_out[0], config, device)}
                    record_validation(state, values, record, watch, stop if runtime.stop_on_plateau else None)
            if probe and (state.step % config.probe_every == 0 or last_step):
                probe()
            if record and config.preview_epochs and (state.step % preview_every == 0 or last_step):
                record.preview(state.step, state.model, held_out[0], device)
            if stopped and not last_step:
                return end_early(state, config, saver, record, stop)
    return finish(state, config, corpus, folder, record, watch) if record else None


def begin_probing(state: TrainState, config: RunConfig, corpus: Corpus, record: Recorder) -> Callable[[], None] | None:
    """What probes the encoder and records it, if that was asked for; a first time before the first step."""
    probe = open_probe(config, corpus)
    if probe is None:
        return None
    look = lambda: record.probe(state.step, probe(state.model.encoder))  # noqa: E731
    if not state.step:
        look()  # at the weights that the run starts from
    return look


def settle(
    step: Step,
    state: TrainState,
    config: RunConfig,
    corpus: Corpus,
    folder: Path,
    device: torch.device,
    record: Recorder | None,
) -> bool:
    """Wait for a step and record it; returns whether any rank asks for an early end.

    Raises:
        FloatingPointError: it is not sound. No step since then was taken.
    """
    loss, _, stopped, _ = step.reading.get()
    if not step.is_sound():
        what, state.step = "gradient" if math.isfinite(loss) else "loss", step.number - 1
        raise FloatingPointError(report_non_finite(what, state, step.batches, config, corpus, folder, device))
    if record:
        write_down(step, record)
    return stopped > 0


def write_down(step: Step, record: Recorder) -> None:
    """A step's numbers, once."""
    if not step.is_recorded:
        loss, grad_norm, _, _ = step.reading.get()
        record.step(step.number, loss, grad_norm, step.lr, step.fetch.idle())
        step.is_recorded = True


def crop_seconds(config: RunConfig, device: torch.device) -> float | None:
    """Time of a crop on all GPUs if a step were one large matrix product; None on another device."""
    if device.type != "cuda":
        return None
    return flops_per_crop(config.model) / matrix_product(device, config.precision) / distributed.world_size()


def held_out_crops(config: RunConfig, runtime: Runtime, stream: CropStream) -> list[Batch]:
    """Drawn once and kept: every validation of every run with this seed sees the same."""
    size = min(runtime.micro_batch(config.batch_size, distributed.world_size()), HELD_OUT_BATCH)
    return held_out_batches(stream, HELD_OUT_CROPS, size)


def record_validation(
    state: TrainState, values: dict[str, float], record: Recorder, watch: Watch, stop: Stop | None
) -> None:
    """Metrics and warnings of a validation; what is newly wrong with the run asks for its ``stop``."""
    record.validation(state.step, values)
    problems = watch.validation(state.step, values)
    for problem in problems:
        record.warn(problem)
    if problems and stop is not None:
        stop.plateau = problems[0]  # the next reduction carries it to the other ranks, as it does a signal


def finish(state: TrainState, config: RunConfig, corpus: Corpus, folder: Path, record: Recorder, watch: Watch) -> str:
    """Say once more what was wrong, write the final checkpoint, and export the encoder; returns its sha256."""
    for problem in watch.problems.values():
        record.warn(f"at the end of the run: {problem}")
    record.close()
    save_checkpoint(folder / FINAL, state.to_dict(config))
    remove_intermediate(folder)
    return export_encoder(folder, state.model, config, corpus, state.step)


def end_early(state: TrainState, config: RunConfig, saver: Saver, record: Recorder | None, stop: Stop) -> str | None:
    """Write a checkpoint and leave; returns None, as there is no encoder yet.

    The first rank writes and tells why; the others just end. One that failed now would have the first one killed.

    Raises:
        KeyboardInterrupt: after Ctrl-C, so that the command ends with its exit code.
        Plateau: the run does not learn.
    """
    if record is None:
        return None
    saver.save(state.to_dict(config))
    saver.wait()
    record.close()
    print(f"Stopped after step {state.step}; checkpoint written. The same command with --c continues.", flush=True)
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.plateau is not None:
        raise Plateau(f"--stop_on_plateau: {stop.plateau}")
    return None


def begin_or_continue(config: RunConfig, folder: Path, device: torch.device, resume: bool) -> TrainState:
    """Fresh weights, those that the run starts from, or those of its latest checkpoint.

    Raises:
        ValueError: the checkpoint has another config, or the file to start from does not fit.
    """
    state = TrainState.create(config, device)
    if resume:
        checkpoint = load_checkpoint(folder)
        refuse_other_config(checkpoint["config"], config)
        state.restore(checkpoint)
    elif config.init is not None:
        initialise(state.model, Path(config.init), folder)
    return state


def train_batches(
    config: RunConfig, runtime: Runtime, stream: CropStream, step: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of the steps after ``step``."""
    place = (runtime.accumulate, distributed.rank(), distributed.world_size())
    sampler = MicroBatches(step, config.steps, config.batch_size, *place)
    return train_loader(stream, sampler, runtime.num_workers, device.type == "cuda")


def held_out_losses(
    state: TrainState, held_out: list[Batch], config: RunConfig, corpus: Corpus, folder: Path, device: torch.device
) -> dict[str, float]:
    """``evaluate``; ``FloatingPointError`` if the loss is not finite."""
    values = evaluate(state.model, held_out, config, device)  # every rank: they share the crops
    if not math.isfinite(values["val_loss"]):
        text = report_non_finite("held-out loss", state, held_out, config, corpus, folder, device)
        raise FloatingPointError(text)
    return values


@torch.no_grad()
def evaluate(model: HiEndMAE, batches: list[Batch], config: RunConfig, device: torch.device) -> dict[str, float]:
    """Held-out loss, and that of predicting each patch's mean, which is below 1 where patches are constant.

    The ranks share the batches.
    """
    model.eval()  # the model itself, not the compiled or distributed one: batches differ in size from those of training
    sums = torch.zeros(3, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for batch in batches[distributed.rank() :: distributed.world_size()]:
        (image, intensity), ids = stored_crops(batch, device), on_device(batch["ids_shuffle"], device)
        with autocast(config, device):
            loss = model(image, ids, intensity=intensity).loss
        mean_patch_loss = model.mean_patch_loss(image, ids, intensity)
        sums += torch.stack([loss, mean_patch_loss, torch.ones_like(loss)]) * len(image)
    loss_sum, mean_sum, count = distributed.mean(sums).tolist()
    return {"val_loss": loss_sum / count, "val_mean_patch_loss": mean_sum / count}


def look_at_model(state: TrainState, batch: Batch, config: RunConfig, device: torch.device) -> dict[str, float]:
    """``vital_signs`` on a held-out batch."""
    with autocast(config, device):
        return vital_signs(state.model, canonical_crops(batch, device), batch["ids_shuffle"].to(device))


def report_non_finite(
    what: str,
    state: TrainState,
    batches: list[Batch],
    config: RunConfig,
    corpus: Corpus,
    folder: Path,
    device: torch.device,
) -> str:
    """What a user needs to find the crop behind a non-finite loss or gradient, and a file to repeat it with."""
    bad = []
    for batch in batches:
        for i, (case, start) in enumerate(zip(batch["case"].tolist(), batch["start"].tolist(), strict=True)):
            one = {name: values[i : i + 1] for name, values in batch.items()}
            if not is_finite_crop(state.model, one, config, device):
                box = [f"{s}:{s + n}" for s, n in zip(start, config.model.img_size, strict=True)]
                bad.append(f"{corpus.name(case)} [{', '.join(box)}]")
    dump = folder / f"non_finite_step_{state.step + 1}_rank_{distributed.rank()}.pth"
    save_checkpoint(dump, {**state.to_dict(config), "batches": batches})
    where = f"Crops with a non-finite {what}: {'; '.join(bad)}" if bad else "No crop explains it; lower -lr"
    return (
        f"The {what} is not finite at step {state.step + 1}; nothing of it was saved, earlier checkpoints are kept. "
        f"{where}. Weights and crops are in {dump}."
    )
