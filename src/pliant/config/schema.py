"""What a run is made of, as Hydra takes it: the sections, and the rules that concern several of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from pliant.architectures import ARCHITECTURES, RoutedConfig
from pliant.architectures.base import nearest
from pliant.config.model import FORM_OPTIONS, ROUTED_OPTIONS, ModelConfig
from pliant.config.sections import ADAPTERS, HALF, ROUTING_SCHEDULES, STAGES, DataConfig, TrainingConfig
from pliant.errors import ConfigError

ALIASES = {"sdt": "dtf"}
"""Other names of architectures."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides a run; saved with it as ``config.yaml``.

    Raises:
        ConfigError: A value is outside its rule, or two contradict each other.
    """

    model_type: str = "npt"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        known = tuple(ARCHITECTURES)
        self.model_type = ALIASES.get(self.model_type, self.model_type)
        if self.model_type not in known:
            hint = nearest(self.model_type, known)
            raise ConfigError(f"model_type must be one of {', '.join(known)}; got {self.model_type!r}.{hint}")
        self._check_form_options()
        if self.model_type == "npt":
            self._check_layers()
        elif self.is_routed:
            self._check_routed()
        else:
            self._check_dense()
        self._check_schedules()
        self._check_scratch()
        self._check_trainable()
        self._check_precision()
        self._check_saving()
        if self.data.streaming and self.training.max_steps is None:
            raise ConfigError(
                "data.streaming=true needs training.max_steps, as the length of a stream is not known; got null. "
                "Set it."
            )

    @property
    def is_routed(self) -> bool:
        """Whether tokens are routed through the depth of the model."""
        config_class = ARCHITECTURES[self.model_type].config
        return config_class is not None and issubclass(config_class, RoutedConfig)

    @property
    def held_dtype(self) -> str:
        """What the weights are held in: fp32 where the base is trained, else what mixed precision asks for."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.training.trainable == "all" else HALF.get(self.training.mixed_precision, "float32")

    def _check_form_options(self) -> None:
        """Refuses options of a conversion where another one, or none, is chosen."""
        model, converted = self.model, self.model.checkpoint_path
        rules: list[tuple[Sequence[str], str]] = []
        if self.model_type == "dense":
            everything = (*FORM_OPTIONS, *ROUTED_OPTIONS, "calibration")
            rules += [(everything, "belongs to a conversion, and model_type=dense converts nothing")]
        elif self.is_routed:
            rules += [(("preset", *FORM_OPTIONS), f"belongs to model_type=npt, not to model_type={self.model_type}")]
        else:
            rules += [(ROUTED_OPTIONS, "belongs to model_type mod, dtf or stt, not to model_type=npt")]
        if converted is not None:
            # model.preset and model.adapter_rank are set by recipes that go on from a checkpoint
            scheduled = ("capacity_gamma", "gate_share")
            names = (*(n for n in ROUTED_OPTIONS if n not in scheduled), *FORM_OPTIONS[1:], "calibration")
            rules += [(names, f"belongs to a conversion, and model.checkpoint_path={converted!r} is converted already")]
        elif isinstance(model.layers, Mapping):
            rules += [
                (FORM_OPTIONS, "does not reach into model.layers: the map names each layer's form (form:rank)"),
            ]
        defaults = {f.name: f.default for f in fields(model)}
        for names, rule in rules:
            for name in names:
                value, default = getattr(model, name), defaults[name]
                if value != default:
                    unset = {None: "null", False: "false"}.get(default, default)
                    raise ConfigError(f"model.{name} {rule}; got model.{name}={value}. Set model.{name}={unset}.")

    def _check_layers(self) -> None:
        try:
            forms = self.model.layer_selection
            configs = list(forms.values()) if isinstance(forms, Mapping) else [self.model.npt]
        except ConfigError as error:
            raise ConfigError(f"model: {error}") from error
        is_base = self.model.checkpoint_path is None and all(config.form == "v1" for config in configs)
        if self.training.objective == "equivalence" and is_base:
            raise ConfigError(
                "training.objective=equivalence has nothing to teach model.preset=v1, which equals its base at the "
                "start: loss and gradient are 0. Set training.objective to sft or causal_lm, or choose another preset."
            )

    def _check_routed(self) -> None:
        if isinstance(self.model.layers, Mapping):
            raise ConfigError(
                f"model.layers must not be a map with model_type={self.model_type}, whose layers are all alike; got "
                f"{dict(self.model.layers)}. Name the layers alone."
            )
        if self.training.use_regularization:
            raise ConfigError(
                "training.use_regularization=true adds the penalty of plastic layers; the losses of a router are "
                f"always part of the objective; got model_type={self.model_type}. Set "
                "training.use_regularization=false."
            )
        if self.training.use_flash_attention and not self.data.packing:
            raise ConfigError(
                f"training.use_flash_attention=true with model_type={self.model_type} needs data.packing=true, as "
                "flash attention takes no mask for padding among the tokens that run; got data.packing=false. Set "
                "it, or leave flash attention out."
            )
        try:
            settled = self.model.routed(self.model_type)
            if self.training.gate_anneal_fraction:
                replace(settled, gate_share=1.0)
        except ConfigError as error:
            raise ConfigError(f"model: {error}") from error

    def _check_dense(self) -> None:
        training = self.training
        if training.objective == "equivalence":
            raise ConfigError(
                "training.objective=equivalence trains a converted model towards its base; got model_type=dense. "
                "Set model_type=npt, or training.objective=causal_lm or sft."
            )
        if training.trainable == "modulation":
            raise ConfigError(
                "training.trainable=modulation needs added parameters; got model_type=dense. Set "
                "training.trainable to lora, dora, ia3 or all."
            )
        if training.use_regularization:
            raise ConfigError(
                "training.use_regularization=true needs dynamic layers, whose penalty it adds; got model_type=dense, "
                "which has none. Set training.use_regularization=false, or model_type=npt."
            )

    def _check_schedules(self) -> None:
        model, training = self.model, self.training
        if self.is_routed:
            ends = {"capacity_anneal_fraction": "capacity_gamma", "gate_anneal_fraction": "gate_share"}
            for name, end in ends.items():
                if getattr(training, name) and model.checkpoint_path is not None and getattr(model, end) is None:
                    raise ConfigError(
                        f"training.{name} needs model.{end} where model.checkpoint_path={model.checkpoint_path!r} is "
                        f"gone on from; got null. Set it."
                    )
            return
        for name in ROUTING_SCHEDULES:
            if value := getattr(self.training, name):
                raise ConfigError(
                    f"training.{name} belongs to routed layers; got training.{name}={value} with model_type="
                    f"{self.model_type}. Set training.{name}=0."
                )

    def _check_scratch(self) -> None:
        training = self.training
        if self.model.init != "scratch":
            return
        if training.trainable != "all":
            raise ConfigError(
                f"model.init=scratch trains every weight; got training.trainable={training.trainable}. "
                "Set training.trainable=all."
            )
        if training.objective == "equivalence":
            raise ConfigError(
                "model.init=scratch has no base to be equivalent to; got training.objective=equivalence. "
                "Set training.objective=causal_lm."
            )

    def _check_trainable(self) -> None:
        model, training = self.model, self.training
        if training.trainable != "modulation" and training.stages != "auto" and STAGES[0] in training.stages:
            raise ConfigError(
                "training.stages with layerwise trains the modulation alone; got training.trainable="
                f"{training.trainable}. Set training.stages=[end_to_end]."
            )
        if training.trainable == "all" and model.quantization != "none":
            raise ConfigError(
                f"training.trainable=all trains the base, which model.quantization={model.quantization} freezes. "
                "Set training.trainable to modulation, lora, dora or ia3."
            )

    def _check_precision(self) -> None:
        model, training = self.model, self.training
        half = HALF.get(training.mixed_precision)
        if training.trainable == "all" and model.dtype == "float16":
            raise ConfigError(
                "training.trainable=all must not train weights held in fp16, whose gradients the loss scaler refuses; "
                "got model.dtype=float16. Set model.dtype=auto; training.mixed_precision=fp16 computes in fp16."
            )
        if training.trainable != "all" and half is not None and model.dtype not in ("auto", half):
            raise ConfigError(
                f"training.mixed_precision={training.mixed_precision} holds a frozen base in {half}; got model.dtype="
                f"{model.dtype}. Set model.dtype=auto, or training.mixed_precision=no."
            )
        if training.use_flash_attention and half is None and model.dtype not in HALF.values():
            raise ConfigError(
                "training.use_flash_attention=true computes in 16 bit only; got training.mixed_precision=no and "
                f"model.dtype={model.dtype}. Set training.mixed_precision=bf16."
            )

    def _check_saving(self) -> None:
        model, training = self.model, self.training
        if training.trainable == "all" and training.save_delta:
            raise ConfigError(
                "training.save_delta=true needs a frozen base; got training.trainable=all. Leave save_delta out."
            )
        if training.save_delta is not False:
            return
        if training.trainable in ADAPTERS:
            raise ConfigError(
                f"training.save_delta=false saves the whole model, but training.trainable={training.trainable} saves "
                "adapters. Leave it out."
            )
        if model.quantization != "none":
            raise ConfigError(
                "training.save_delta=false saves the whole model, and a quantised base cannot be kept whole beside "
                f"fp32 additions and resumed; got model.quantization={model.quantization}. Leave save_delta out."
            )
