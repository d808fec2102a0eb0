"""A search for a recipe's settings: which are tried, for how long, what came of them, and how it is written down."""
