"""What nnU-Net loads: trainers, planner, normalisation, and the settings in its plans."""
