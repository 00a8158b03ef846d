"""The whole path on synthetic CT, for the first ten minutes."""
