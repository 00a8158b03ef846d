"""Pictures of what pre-training learned: reconstructions, attention, features."""
