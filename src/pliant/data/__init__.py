"""Texts and the tokens made from them."""

from pliant.data.calibration import calibration_tokens
from pliant.data.embedded import EMBEDDED_SOURCES, EmbeddedSource, documents
from pliant.data.text import read_text, token_windows

__all__ = [
    "EMBEDDED_SOURCES",
    "EmbeddedSource",
    "calibration_tokens",
    "documents",
    "read_text",
    "token_windows",
]
