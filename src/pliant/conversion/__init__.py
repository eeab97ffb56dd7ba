"""From a loaded base to a dynamic model, with the best start that needs no training."""

from pliant.conversion.calibrate import calibrate
from pliant.conversion.cheapest import cheapest_layers, layer_costs
from pliant.conversion.convert import convert

__all__ = ["calibrate", "cheapest_layers", "convert", "layer_costs"]
