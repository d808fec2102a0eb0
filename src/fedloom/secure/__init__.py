"""Sums of uploads of which nobody sees a single one: SecAgg+ as messages, without a transport."""
