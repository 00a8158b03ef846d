"""``hiendmae_benchmark``: fair comparisons with nnU-Net's own trainers, from a grid to a report."""
