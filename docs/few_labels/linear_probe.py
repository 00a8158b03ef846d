"""What a linear map reads from each layer of an encoder.

    nnUNet_results=$(mktemp -d) python .../docs/few_labels/linear_probe.py weights/hi.pth weights/mae.pth

Tokens (4³ voxels of 5 mm) of crops around organs, from the 38 training cases, are mapped by ridge regression onto the
share of each organ in them; average precision is measured on crops of the 10 test cases. No network is trained, so the
numbers hardly depend on chance. Needs the preprocessed data and the weights of ``run.sh``, and starts where that ran.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn.functional import avg_pool3d

from nnunetv2_hiendmae.command import CommandParser
from nnunetv2_hiendmae.files import preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE, nnUNetTrainerHiEndMAE_scratch

DATASET, PLANS, CROP, TRAIN_BATCHES, TEST_BATCHES, RIDGE, POSITIVE = "501", "nnUNet5mmPlans", 32, 120, 60, 30.0, 0.3
Batches = list[dict[str, Any]]


def trainer_with(weights: str | None) -> nnUNetTrainerHiEndMAE:
    """A trainer whose network has the weights, or random ones, and whose loaders crop around organs."""
    folder = preprocessed_folder(DATASET)
    plans = read_plans(folder / f"{PLANS}.json", "Run run.sh first.")
    configuration = plans["configurations"]["3d_fullres"]
    source = {"weights": weights} if weights else {"architecture": "nano"}
    configuration |= {"patch_size": [CROP] * 3, "hiendmae": {"no_augmentation": True, "feature_size": 8, **source}}
    cls = nnUNetTrainerHiEndMAE if weights else nnUNetTrainerHiEndMAE_scratch
    dataset = read_json(folder / "dataset.json")
    trainer = cls({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.oversample_foreground_percent = 1.0
    trainer.initialize()
    trainer.on_train_start()
    return trainer


@torch.no_grad()
def layers_and_shares(trainer: nnUNetTrainerHiEndMAE, batches: Batches, organs: int) -> tuple[list[np.ndarray], Any]:
    """Tokens of the tapped layers and the final one, each ``(tokens, E)``, and organ shares ``(tokens, organs)``."""
    network: Any = trainer.network.eval()
    layers, shares = [], []
    for batch in batches:
        taps, final = network.vit(network.intensity(batch["data"]))
        layers.append([tokens.flatten(0, 1).numpy() for tokens in (*taps, final)])
        label = batch["target"][:, 0]
        masks = torch.stack([(label == k).float() for k in range(1, organs + 1)], 1)
        pooled = avg_pool3d(masks, network.vit.config.patch_size)  # (B, organs, grid)
        shares.append(pooled.flatten(2).transpose(1, 2).flatten(0, 1).numpy())
    return [np.concatenate(column) for column in zip(*layers, strict=True)], np.concatenate(shares)


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Mean precision at each positive, best score first."""
    ranked = positive[np.argsort(-score)]
    return float((np.cumsum(ranked) / np.arange(1, len(ranked) + 1) * ranked).sum() / ranked.sum())


def probe(train: np.ndarray, shares: np.ndarray, test: np.ndarray, truth: np.ndarray) -> list[float]:
    """Average precision of each organ."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    a, b = (np.hstack([(x - mean) / deviation, np.ones((len(x), 1))]) for x in (train, test))
    scores = b @ np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ shares)
    return [average_precision(scores[:, k], truth[:, k] > POSITIVE) for k in range(shares.shape[1])]


def main() -> None:
    p = CommandParser(description=__doc__)
    p.add_argument("weights", nargs="*", help="weights files; random weights are probed in any case")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = trainer_with(None)
    labels = PlansManager(random.plans_manager.plans).get_label_manager(random.dataset_json)
    np.random.seed(3)
    train = [next(random.dataloader_train) for _ in range(TRAIN_BATCHES)]
    test = [next(random.dataloader_val) for _ in range(TEST_BATCHES)]
    lines = []
    for weights in (None, *args.weights):
        trainer = trainer_with(weights) if weights else random
        (a, shares), (b, truth) = (layers_and_shares(trainer, x, len(labels.foreground_labels)) for x in (train, test))
        names = [*(f"block {i + 1}" for i in trainer.network.vit.config.taps), "final", "all four"]
        for name, x, y in zip(names, [*a, np.hstack(a)], [*b, np.hstack(b)], strict=True):
            values = " ".join(f"{v:.3f}" for v in probe(x, shares, y, truth))
            lines.append(f"{weights or 'random'} {name}: {values}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
