"""Texts and the tokens made from them."""

from pliant.data.embedded import EMBEDDED_SOURCES, EmbeddedSource, documents
from pliant.data.text import calibration_tokens, read_text, token_windows

__all__ = [
    "EMBEDDED_SOURCES",
    "EmbeddedSource",
    "calibration_tokens",
    "documents",
    "read_text",
    "token_windows",
]
