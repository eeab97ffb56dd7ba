"""What every pliant model can do beyond its base: switch the change off, report it, save and load it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, initialization

from pliant.architectures import AddedModule, RoutedLayer, added_parameters
from pliant.errors import CheckpointError, ConfigError
from pliant.models import checkpoint as files
from pliant.models import ledger_file
from pliant.models.consolidate_weights import Positions, consolidate_weights
from pliant.models.ledger import Ledger
from pliant.models.quantised import keep_packing
from pliant.models.report import ModelReport, record
from pliant.models.routed_cache import prepare_cache, token_documents
from pliant.models.selection import Layers, select_layers
from pliant.models.spec import PliantSpec

# Mixed in before a family's own class, which brings the base that only type checkers see here.
_Base = PreTrainedModel if TYPE_CHECKING else object


Readout = Callable[[nn.Module, Tensor], Any]
"""Called with the LM head and the last hidden state (batch, seq, d_model), in place of the head itself."""


class _Unhooked(nn.Module):
    """A module without the hooks around it: FSDP's may run only once a forward, and in no inner backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.call = module, module.forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self.call(hidden)


def _read(head: nn.Module, hidden: Tensor, readout: Readout) -> Any:
    """Runs ``readout`` as the forward of ``head``, so that the hooks of the head run around all of it."""
    before, unhooked = vars(head).get("forward"), _Unhooked(head)
    head.forward = partial(readout, unhooked)
    try:
        return head(hidden)
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def with_readout(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the keyword ``readout`` to the ``forward`` of a causal LM.

    What ``readout`` returns is what the forward returns: a loss that takes the logits piece by piece, say, so that
    they never exist whole. It runs inside the forward, where wrappers (DDP, FSDP, peft, autocast) are at work.
    """

    @wraps(forward)
    def forward_with_readout(self: Any, *args: Any, readout: Readout | None = None, **kwargs: Any) -> Any:
        if readout is None:
            return forward(self, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        return _read(self.lm_head, self.model(*args, **given, use_cache=False).last_hidden_state, readout)

    return forward_with_readout


class _StartValues(_Base):
    """Gives added modules their own start; mixed into the inner model and the LM, since each starts its own."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"plastic", "router", "prior"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AddedModule):
            module.reset_parameters(initialization)
        else:
            super()._init_weights(module)


def follow_thresholds(layers: Iterable[RoutedLayer]) -> None:
    """Lets the threshold of each routed layer follow the scores of its last training batch, if it has not yet."""
    for layer in layers:
        if layer.routes:
            layer.router.follow()


class DynamicModel(_StartValues):
    """Inner model of a pliant family: the base's, with the layers that ``config.pliant`` names replaced."""

    layers: nn.ModuleList
    dynamic_layer: Callable[[str], type[nn.Module]]
    gradient_checkpointing: bool

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        spec = PliantSpec.of(config)
        spec.check_quantisation(getattr(config, "quantization_config", None))
        layer_class = self.dynamic_layer(spec.architecture)
        for index, layer_config in spec.layers.items():
            self.layers[index] = layer_class(config, index, layer_config)
        self.connect_layers()
        if spec.layers:
            self.post_init()
        # FSDP looks for every class that is named here, and raises for one that no layer has.
        self._no_split_modules = {type(layer).__name__ for layer in self.layers}

    def connect_layers(self) -> None:
        """Shows the layers that look at another one the layers there are."""
        for layer in self.layers:
            if isinstance(layer, RoutedLayer):
                layer.connect(self.layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward; routed layers learn which tokens count, and get a cache of their own."""
        routed = [layer for layer in self.layers if isinstance(layer, RoutedLayer) and layer.active]
        if routed:
            follow_thresholds(routed)
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if self.gradient_checkpointing and self.training:
                use_cache, past_key_values = False, None
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if past_key_values is not None:
                prepare_cache(
                    past_key_values, [layer.layer_idx for layer in routed if layer.keeps_keys], len(self.layers)
                )
            given: Any = inputs_embeds if input_ids is None else input_ids
            documents = token_documents(attention_mask, position_ids, past_key_values, given.shape[1])
            kwargs["token_documents"] = None if documents is None else documents.expand(len(given), -1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class DynamicCausalLM(_StartValues):
    """Causal LM of a pliant family: the methods that a converted model adds to its base."""

    model: Any
    lm_head: Any
    base_config_class: type[PreTrainedConfig]

    @property
    def spec(self) -> PliantSpec:
        """Architecture, dynamic layers and base, as ``config.pliant`` records them."""
        return PliantSpec.of(self.config)

    @property
    def dynamic_layers(self) -> Mapping[int, Any]:
        """The converted layers, by index."""
        return {index: self.model.layers[index] for index in sorted(self.spec.layers)}

    @property
    def edits(self) -> Ledger:
        """The ledger: what was written into the projections for good, beside their weights."""
        ledger = vars(self).get("_edits")
        if ledger is None:
            ledger = vars(self)["_edits"] = Ledger(self.model)
        return ledger

    def dynamic_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterates over name and value of every parameter that conversion added."""
        return added_parameters(self)

    def freeze_base(self) -> "DynamicCausalLM":
        """Leaves only the added parameters trainable, and returns the model."""
        self.requires_grad_(False)
        for _, parameter in self.dynamic_parameters():
            parameter.requires_grad_(True)
        return self

    def set_active(self, active: bool, layers: Layers = "all") -> None:
        """Switches the change of some layers on or off; off, a layer is exactly the base's.

        Raises:
            ConversionError: ``layers`` names a layer that does not exist.
            ConfigError: It names one that was never converted.
        """
        converted = self.dynamic_layers
        wanted = converted if layers == "all" else select_layers(layers, self.config.num_hidden_layers)
        if missing := [index for index in wanted if index not in converted]:
            raise ConfigError(f"layers must be converted ones ({list(converted)}); got {missing}. Convert them first.")
        for index in wanted:
            converted[index].active = active

    @property
    def routed_layers(self) -> Mapping[int, RoutedLayer]:
        """The layers that only some tokens enter, by index."""
        return {i: layer for i, layer in self.dynamic_layers.items() if isinstance(layer, RoutedLayer) and layer.routes}

    def set_routing(self, **fields: Any) -> None:
        """Changes fields of the configuration of every routed layer, such as ``capacity_gamma`` and ``gate_share``.

        Thresholds stay as they are: ``pliant.calibrate`` sets them for a capacity.

        Raises:
            ConfigError: A value is outside its rule; nothing is changed.
        """
        changed = {index: replace(layer.layer_config, **fields) for index, layer in self.routed_layers.items()}
        for index, layer_config in changed.items():
            self.model.layers[index].layer_config = layer_config
        self.config.pliant = replace(self.spec, layers={**self.spec.layers, **changed}).to_dict()

    @contextmanager
    def base_mode(self) -> Iterator["DynamicCausalLM"]:
        """Within the block the model is exactly its base: no second copy of the weights, no change left behind.

        Edits are suspended too. Adapters of other libraries stay; switch them off with their own ``disable_adapter``.
        """
        before = {layer: layer.active for layer in self.dynamic_layers.values()}
        self.set_active(False)
        try:
            with self.edits.suspended():
                yield self
        finally:
            for layer, active in before.items():
                layer.active = active

    def report(self, *, writes: bool = False) -> AbstractContextManager[ModelReport]:
        """Records what the dynamic layers do in the forwards of the block, gradients included.

        Run the backward pass of a checkpointed forward inside the block too.

        Args:
            writes: Keep the factors of every weight update, not only norms and penalties.
        """
        return record(self.model, self.dynamic_layers, "writes" if writes else "norms")

    def consolidate_weights(
        self,
        context_tokens: Tensor,
        token_idx: Positions = -1,
        alpha: float = 0.1,
        layers: Layers | None = None,
    ) -> dict[str | int, Any]:
        """Makes permanent what the converted layers do to themselves at a token: adds ``α ΔW_t`` as an edit.

        It writes what the layer's form writes: ``v1`` and ``v2`` ``δ_add ⊗ z/‖z‖² + diag(δ_mult) W`` on the gate,
        ``outer`` ``Σ_k v_b ⊗ v_a``, ``keyed`` ``v_o ⊗ k`` on ``down_proj``, and ``keyed_pre`` all three projections.
        Of several tokens it writes the mean.

        Args:
            context_tokens: Ids of one text, (tokens) or (1, tokens).
            token_idx: The token or tokens to take; negative ones count from the end. ``"all"`` takes every one.
            alpha: Strength.
            layers: Converted layers to write to; by default all of them.

        Returns:
            Layer → ``{"norm": ‖α ΔW‖_F, "ratio": ‖α ΔW‖_F/‖W‖_F}`` over the projections it writes to, and under
            ``"edit"`` the id in the ledger, for ``edits.revert``.

        Raises:
            EditError: The model is dense, a layer is not converted or switched off, or an argument does not fit.
                The model is unchanged.
        """
        return consolidate_weights(self, context_tokens, token_idx, alpha, layers)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Switches on or off that each layer runs again in the backward pass in place of keeping its activations.

        The same under every version of transformers, which have several names for it.
        """
        self._set_gradient_checkpointing(enabled, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Where every public switch for checkpointing ends up, whatever this version of transformers calls it.

        Raises:
            ConfigError: Reentrant checkpointing is asked for; under it the regulariser has no gradient.
        """
        function = options.get("gradient_checkpointing_func")
        if enable and isinstance(function, partial) and function.keywords.get("use_reentrant"):
            raise ConfigError(
                "gradient_checkpointing_kwargs.use_reentrant must be false: reentrant checkpointing drops the "
                "gradient of the reports; got True. Leave it out."
            )
        if enable and isinstance(function, partial):
            options["gradient_checkpointing_func"] = partial(function, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, **options)

    def save_pretrained(self, save_directory: str | os.PathLike, *, delta: bool = False, **options: Any) -> None:
        """Saves the model, and its tokenizer if that is at hand, as a Hugging Face directory.

        Edits go into a file of their own; the weights are saved without them.

        Args:
            save_directory: Folder to write to; made if missing.
            delta: Save only the added parameters, with the name and the fingerprint of the base.
            options: Those of ``PreTrainedModel.save_pretrained``; with ``delta`` only ``is_main_process`` and
                ``state_dict``.

        Raises:
            CheckpointError: The folder holds a checkpoint of the other kind, or there is nothing to save.
            EditError: There are edits, and ``options`` or adapters of peft leave no place for them.
        """
        files.check_destination(save_directory, delta=delta)
        is_main_process, state_dict = options.get("is_main_process", True), options.get("state_dict")
        ledger_file.check_saving(self, options)
        vars(self.config).pop("auto_map", None)  # of a folder with remote code; this one gets none
        if delta:
            if further := options.keys() - {"is_main_process", "state_dict"}:
                raise CheckpointError(
                    f"delta=True takes no further options; got {', '.join(sorted(further))}. Leave them out."
                )
            if not is_main_process:
                return
            files.save_delta(self, save_directory, state_dict)
        else:
            super().save_pretrained(save_directory, **options)
        if is_main_process:
            ledger_file.save_ledger(self, save_directory, state_dict)
        files.save_tokenizer(self.config._name_or_path, save_directory)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, **options: Any) -> "DynamicCausalLM":
        """Loads a full or a delta checkpoint, or a base, with its edits; no key may be missing or left over.

        Args:
            name: Directory or hub id.
            args: As for ``PreTrainedModel.from_pretrained``.
            options: Likewise; ``base`` names the base to load a delta over, in place of the recorded one, and
                ``edits=False`` leaves the edits out.

        Raises:
            CheckpointError: Keys or shapes do not fit, a file is damaged, or the base is the wrong one.
            EditError: The edits are damaged, or of another base.
        """
        ledger = ledger_file.find_edits(name, options) if options.pop("edits", True) else None
        has_info = options.get("output_loading_info", False)
        loaded: Any
        if (delta := files.find_delta(name, options)) is not None:
            loaded = files.load_delta(cls, name, delta, *args, **options)
        else:
            loaded = files.load_strictly(super().from_pretrained, name, *args, **options)
        model = loaded[0] if has_info else loaded
        keep_packing(model)
        if ledger is not None:
            ledger_file.load_ledger(model, ledger)
        return loaded
