"""The commands that use weights, one file each."""
