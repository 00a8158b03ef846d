"""Use Hi-End-MAE weights inside nnU-Net v2: architectures, intensities, weights, trainer, planner.

Nothing here imports ``pretraining``: predicting with a fine-tuned model needs this package only.
"""

import os

__version__ = "0.1.0"

# nnU-Net reads these when it is imported, and fails without naming them.
for _name, _least in {"nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1}.items():
    _value = os.environ.get(_name, "1")
    if not _value.strip().isdecimal() or int(_value) < _least:
        raise SystemExit(f"The environment variable {_name} is '{_value}'; it must be a number of at least {_least}.")
