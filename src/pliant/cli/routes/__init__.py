"""``pliant routes``: the command and its pictures."""
