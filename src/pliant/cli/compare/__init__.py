"""``pliant compare``: the command, its tables and its plot."""
