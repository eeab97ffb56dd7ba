"""``pliant demo``: its steps, one file each."""
