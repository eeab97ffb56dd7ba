"""What a run is made of, as Hydra takes it: the sections, and the rules that concern several of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from pliant.architectures import ARCHITECTURES
from pliant.architectures.base import nearest
from pliant.config.sections import (
    FORM_OPTIONS,
    HALF,
    STAGES,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from pliant.errors import ConfigError

ROUTED = ("dtf", "sdt", "stt", "mod")
"""Architectures of the original commands that are not built yet."""


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
        if self.model_type not in known:
            hint = nearest(self.model_type, known)
            if self.model_type in ROUTED:
                hint = " Routed depth (dtf, mod, stt) is not available yet."
            raise ConfigError(f"model_type must be one of {', '.join(known)}; got {self.model_type!r}.{hint}")
        self._check_form_options()
        if self.model_type == "npt":
            self._check_layers()
        else:
            self._check_dense()
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
    def held_dtype(self) -> str:
        """What the weights are held in: fp32 where the base is trained, else what mixed precision asks for."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.training.trainable == "all" else HALF.get(self.training.mixed_precision, "float32")

    def _check_form_options(self) -> None:
        """Refuses options of a form where no form is chosen by them."""
        model = self.model
        if self.model_type == "dense":
            names, rule = (
                (*FORM_OPTIONS, "calibration"),
                "belongs to a conversion, and model_type=dense converts nothing",
            )
        elif model.checkpoint_path is not None:
            # model.preset and model.adapter_rank are set by recipes that go on from a checkpoint
            names = (*FORM_OPTIONS[1:], "calibration")
            rule = f"belongs to a conversion, and model.checkpoint_path={model.checkpoint_path!r} is converted already"
        elif isinstance(model.layers, Mapping):
            names, rule = FORM_OPTIONS, "does not reach into model.layers: the map names each layer's form (form:rank)"
        else:
            return
        defaults = {f.name: f.default for f in fields(model)}
        for name in names:
            value, default = getattr(model, name), defaults[name]
            if value != default:
                unset = "null" if default is None else "false"
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
                "training.trainable to lora or all."
            )
        if training.use_regularization:
            raise ConfigError(
                "training.use_regularization=true needs dynamic layers, whose penalty it adds; got model_type=dense, "
                "which has none. Set training.use_regularization=false, or model_type=npt."
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
                "Set training.trainable to modulation or lora."
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
        if training.trainable == "lora":
            raise ConfigError(
                "training.save_delta=false saves the whole model, but training.trainable=lora saves adapters. "
                "Leave it out."
            )
        if model.quantization != "none":
            raise ConfigError(
                "training.save_delta=false saves the whole model, and a quantised base cannot be kept whole beside "
                f"fp32 additions and resumed; got model.quantization={model.quantization}. Leave save_delta out."
            )
