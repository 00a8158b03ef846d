"""From foreign scans to nnU-Net's preprocessed volumes."""
