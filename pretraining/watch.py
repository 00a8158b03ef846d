"""Is the encoder learning? What to look at beside the loss, and what to say when it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.blocks import CrossAttention
from nnunetv2_hiendmae.checks import Failed
from pretraining.config import RunConfig
from pretraining.model import HiEndMAE

CROPS = 4
"""Looked at by ``vital_signs``: enough for means over tokens, under 1 % of the time."""
QUERIES = 64
"""Of a crop, whose attention is looked at."""
PATIENCE = 500
"""Steps after the warm-up in which a sound run of any preset has left the line of mean patches."""
NOT_LEARNING = 0.99
"""Share of the mean-patch loss."""
COLLAPSED = 0.25
"""Of the first deviation over tokens."""
RISING, RISE = 5, 0.01
"""Validations in a row that got worse, and by how much of the mean-patch loss in all."""


class Plateau(Failed):
    """The run does not learn and was to be stopped then."""

    exit_code = 3


@torch.no_grad()
def vital_signs(model: HiEndMAE, crops: Tensor, ids_shuffle: Tensor) -> dict[str, float]:
    """How alive the encoder is on canonical crops ``(B, C, H, W, D)`` with masks ``(B, L)``.

    Returns:
        ``spread_final``: deviation over tokens of the final-normed output, mean over its channels (its rms is near 1:
        0 means one constant vector). ``rms_tap_i``, ``spread_tap_i``: the same of block i's output, the spread as a
        share of its rms. ``entropy_cross_i``: of the attention of cross-attention block i, 1 where it is uniform.
    """
    model.eval()
    crops, ids_shuffle = crops[:CROPS], ids_shuffle[:CROPS]
    patches = model.crop_patches(crops)
    taps, final = model.forward_encoder(patches, ids_shuffle)
    signs = {"spread_final": spread(final)}
    for i, tap in zip(model.config.encoder.taps, taps, strict=True):
        rms = tap.float().square().mean().sqrt()
        signs |= {f"rms_tap_{i}": rms, f"spread_tap_{i}": spread(tap) / rms}
    entropies: list[Tensor] = []
    queried = [m for m in model.decoder.modules() if isinstance(m, CrossAttention)]
    look = lambda module, inputs: entropies.append(entropy(module, *inputs))  # noqa: E731
    hooks = [module.register_forward_pre_hook(look) for module in queried]
    try:
        model.forward_decoder(taps, final, ids_shuffle)
    finally:
        for hook in hooks:
            hook.remove()
    signs |= {f"entropy_cross_{i}": value for i, value in enumerate(entropies)}
    values = torch.stack([value.float() for value in signs.values()]).tolist()  # one wait for the device
    return dict(zip(signs, values, strict=True))


def spread(tokens: Tensor) -> Tensor:
    """Standard deviation over the tokens of ``(B, N, D)``, mean over crops and channels."""
    return tokens.float().std(1).mean()


def entropy(module: CrossAttention, x: Tensor, memory: Tensor) -> Tensor:
    """Entropy of the attention of the last ``QUERIES`` tokens, over that of uniform attention; mean over heads."""
    heads = module.num_heads
    q, k = module.q(x[:, -QUERIES:]), module.kv(memory).chunk(2, dim=-1)[0]
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))  # (B, heads, N, D/heads)
    log_weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).log_softmax(-1)
    return -(log_weights.exp() * log_weights).sum(-1).mean() / math.log(max(k.shape[2], 2))


def gradient_norms(model: HiEndMAE, scale: float = 1.0) -> dict[str, float]:
    """Norm of the gradients at hand, divided by ``scale``, of the encoder, the projections and the decoder."""
    parts = {"encoder": model.encoder, "projections": model.encoder_to_decoder, "decoder": model.decoder}
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
        for part in parts.values()
    ]
    values = (torch.stack(norms) / scale).tolist()
    return {f"grad_norm_{name}": value for name, value in zip(parts, values, strict=True)}


@dataclass
class Watch:
    """Looks at every validation of a run; each thing that is wrong is reported once, and again at the end."""

    config: RunConfig
    first_spread: float | None = None
    shares: list[float] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def validation(self, step: int, values: dict[str, float]) -> list[str]:
        """What is newly wrong after a validation's ``values``, one line each."""
        mean_patch = values["val_mean_patch_loss"]
        self.first_spread = self.first_spread or values["spread_final"]
        if mean_patch == 0:
            return self.report(
                step, {"constant": "every held-out patch is constant: look at the data and at -window_hu"}
            )
        self.shares.append(values["val_loss"] / mean_patch)
        patience = PATIENCE + self.config.warmup_steps
        late = step >= min(patience, self.config.steps)
        stuck = late and min(self.shares) > NOT_LEARNING
        found: dict[str, str] = {}
        if stuck:
            found["stuck"] = (
                f"the held-out loss is {self.shares[-1]:.1%} of that of predicting each patch's mean. {self.advice()}"
            )
        if stuck and values["spread_final"] < COLLAPSED * self.first_spread:
            found["collapsed"] = (
                f"the encoder's output is nearly the same for every token (deviation {values['spread_final']:.3f}, "
                f"{self.first_spread:.3f} at the first validation). {self.advice()}"
            )
        last = self.shares[-RISING - 1 :]
        rising = len(last) > RISING and all(b > a for a, b in pairwise(last))
        if rising and last[-1] > min(self.shares) + RISE:
            found["rising"] = f"the held-out loss rose in {RISING} validations in a row. {self.advice()}"
        return self.report(step, found)

    def report(self, step: int, found: dict[str, str]) -> list[str]:
        new = {name: f"step {step}: {text}" for name, text in found.items() if name not in self.problems}
        self.problems |= new
        return list(new.values())

    def advice(self) -> str:
        """What to change."""
        config = self.config
        if config.steps < PATIENCE:
            return f"{config.steps} steps are too few to learn: train for longer (-steps)."
        return (
            f"Lower the peak rate (-lr {config.base_lr / 3:.1g} instead of {config.base_lr:g}) or warm up for longer "
            f"(-warmup_steps {max(2 * config.warmup_steps, 200):.0f} instead of {config.warmup_steps:g})."
        )
