"""What routed architectures share: who runs, what they may look at, and a layer that only some tokens enter."""

from pliant.architectures.routing.attention import Memory
from pliant.architectures.routing.layer import Route, RoutedLayer, Router
from pliant.architectures.routing.selection import Selection

__all__ = ["Memory", "Route", "RoutedLayer", "Router", "Selection"]
