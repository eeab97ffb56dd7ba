"""Ways to train a base, compared on one recipe; and what a step of each costs."""
