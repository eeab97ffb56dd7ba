"""Editors on cases: what an edit has learned, and what else it changed."""
