"""Is everything there that a run needs? Findings, each with the command that fixes it."""
