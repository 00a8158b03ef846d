"""From a heap of scans to an nnU-Net raw data set."""
