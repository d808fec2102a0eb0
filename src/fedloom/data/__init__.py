"""From rows of text to each client's tokens."""
