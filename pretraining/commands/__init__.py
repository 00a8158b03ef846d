"""The commands that make weights, one file each."""
