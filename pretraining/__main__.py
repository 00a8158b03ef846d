"""``python -m pretraining``, for torchrun."""

from pretraining.cli import main

main()
