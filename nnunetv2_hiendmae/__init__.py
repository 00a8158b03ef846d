"""Use Hi-End-MAE weights inside nnU-Net v2: architectures, intensities, weights, trainer, planner.

Nothing here imports ``pretraining``: predicting with a fine-tuned model needs this package only.
"""

__version__ = "0.1.0"
