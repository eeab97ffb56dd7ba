"""What happens beside the training loop: metrics, progress, stop signals, samples, and checks of the numbers."""

from pliant.training.callbacks.finite import FiniteGuard
from pliant.training.callbacks.metrics_file import MetricsFile
from pliant.training.callbacks.norms import modulation_norms, routing_shares
from pliant.training.callbacks.progress import RunProgress
from pliant.training.callbacks.routing import route_by, routing_at, routing_sums
from pliant.training.callbacks.samples import GenerationSamples
from pliant.training.callbacks.signals import StopSignals

__all__ = [
    "FiniteGuard",
    "GenerationSamples",
    "MetricsFile",
    "RunProgress",
    "StopSignals",
    "modulation_norms",
    "route_by",
    "routing_at",
    "routing_shares",
    "routing_sums",
]
