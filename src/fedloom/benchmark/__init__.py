"""Methods times seeds in one table: which runs a plan asks for, what came of them, and how it is written down."""
