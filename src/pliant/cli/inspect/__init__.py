"""``pliant inspect``: what was written, the words it points at, and the pictures of it."""
