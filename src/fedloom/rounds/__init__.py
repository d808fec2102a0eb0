"""The run: rounds, checkpoints, reports."""
