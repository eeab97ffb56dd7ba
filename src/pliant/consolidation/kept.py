"""What is kept beside a model between calls, and when it no longer holds."""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from pliant.errors import EditError
from pliant.models import DynamicCausalLM
from pliant.models.checkpoint import digest, fingerprint
from pliant.models.ledger import EditHook

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """One value a model, the newest: it is dropped with the model, or once it is asked for in another state."""

    def __init__(self) -> None:
        self._values: WeakKeyDictionary[PreTrainedModel, tuple[object, Value]] = WeakKeyDictionary()

    def at(self, model: PreTrainedModel, state: object, make: Callable[[], Value]) -> Value:
        """Returns the value of a model that was made in an equal ``state``; else makes it."""
        known = self._values.get(model)
        if known is None or known[0] != state:
            known = self._values[model] = state, make()
        return known[1]


def base_of(model: PreTrainedModel) -> str:
    """Returns what stands for the base of a model, whatever was converted or edited in it."""
    return digest(fingerprint(model))


def state_of(model: PreTrainedModel) -> object:
    """Returns what decides what a model computes; equal until a weight, a threshold, an edit or a switch changes.

    Raises:
        EditError: The model has inference tensors, whose changes cannot be seen.
    """
    held = [*model.parameters(), *model.buffers()]
    if any(tensor.is_inference() for tensor in held):
        raise EditError(
            "the model must be loaded and converted outside of torch.inference_mode, whose tensors do not tell of "
            "their changes; some of its tensors were made in it. Load it again under torch.no_grad or no mode at all."
        )
    tensors = [(id(tensor), tensor._version) for tensor in held]
    switches = [(getattr(module, "active", None), module.training) for module in model.modules()]
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    edited = [hook.active for hook in hooks if isinstance(hook, EditHook)]
    own = ([edit.id for edit in model.edits], repr(model.config.pliant)) if isinstance(model, DynamicCausalLM) else ()
    return base_of(model), tensors, switches, edited, own
