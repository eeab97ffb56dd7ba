"""``pliant report``: what it finds in a folder, and a section of the page for each kind."""
