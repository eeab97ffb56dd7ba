"""What a conversion costs, told from text that it has not seen."""

import logging

from jaxtyping import Int
from torch import Tensor

from pliant.errors import DataError
from pliant.metrics import compare_to_base
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress

logger = logging.getLogger(__name__)

WARNING_RATIO = 1.2


def warn_if_lossy(
    model: DynamicCausalLM, held_out: Int[Tensor, "windows window"], remedy: str, progress: Progress | None
) -> None:
    """Logs the perplexity of a converted model over its base's; above 1.2 as a warning, with a ``remedy``."""
    try:
        predicted = compare_to_base(model, held_out, progress=progress)
    except DataError as error:
        logger.warning("converted, but what it costs could not be measured on held-out text: %s", error)
        return
    logger.info("predicted perplexity ratio %.3f on %d held-out tokens", predicted.ratio, held_out.numel())
    if predicted.ratio > WARNING_RATIO:
        logger.warning(
            "converted: perplexity is %.2f times the base's on held-out calibration text (above %.1f). %s",
            predicted.ratio,
            WARNING_RATIO,
            remedy,
        )
