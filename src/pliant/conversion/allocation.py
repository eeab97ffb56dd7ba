"""How many of its leading directions each layer carries."""

from pliant.architectures import NptConfig
from pliant.conversion.closed_form import Spectrum


def settle_rank(config: NptConfig, spectrum: Spectrum) -> int:
    """Returns the rank of one layer: as given, or the smallest that keeps ``config.energy``."""
    return spectrum.rank_for(config.energy) if config.rank == "auto" else int(config.rank)
