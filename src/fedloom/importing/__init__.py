"""Configurations of other frameworks, read and made recipes; nothing of theirs is run or loaded."""
