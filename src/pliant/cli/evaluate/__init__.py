"""``pliant evaluate``: the command and its tables."""
