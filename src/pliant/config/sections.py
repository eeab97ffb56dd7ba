"""The data and the training section of a run's configuration, each checking its own values.

OmegaConf knows neither ``Literal`` nor unions of containers: choices are strings, free-form values ``Any``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pliant.architectures.base import nearest
from pliant.config.rules import at_least, one_of
from pliant.errors import ConfigError

OBJECTIVES = ("equivalence", "causal_lm", "sft")
STAGES = ("layerwise", "end_to_end")
ADAPTERS = ("lora", "dora", "ia3")
"""What peft trains beside a frozen base."""
IA3_TARGETS = ("k_proj", "v_proj", "down_proj")
IA3_INPUTS = ("down_proj",)
"""Projections that IA3 scales, and those of them whose input it scales, not their output."""
TRAINABLE = ("modulation", *ADAPTERS, "all")
HIDDEN_LOSSES = ("normalised", "mse")
PRECISIONS = ("no", "bf16", "fp16")
SCHEDULERS = ("cosine", "linear", "constant")
TRACKERS = ("tensorboard", "wandb", "trackio")
ROUTING_SCHEDULES = ("capacity_anneal_fraction", "gate_anneal_fraction", "threshold_fraction")
HALF = {"bf16": "bfloat16", "fp16": "float16"}
"""What mixed precision computes in."""


@dataclass(kw_only=True)
class DataConfig:
    """Which texts are read, and how they are cut.

    Attributes:
        dataset_name: A name that pliant knows (``wikitext``, ``c4``, …), a hub id, ``embedded``, or a local text,
            jsonl, parquet or arrow file, or a folder of such.
        dataset_config: Configuration of a hub data set; ``null`` is the known name's own.
        train_split: Split to train on; ``null`` is the known name's own, else ``train``.
        eval_split: Split to validate on; ``null`` takes the known name's own, else holds out ``validation_fraction``
            of the training documents.
        eval_dataset_name: Another data set to validate on, named like ``dataset_name``.
        text_column: Column with the text, or for ``sft`` with the messages; ``null`` is the known name's own, else
            ``text``.
        validation_fraction: Share of the documents held out where there is no ``eval_split``.
        max_validation_windows: Most rows that one evaluation reads.
        mixed: Draw from ``dataset_names`` with ``dataset_weights``, shares of the documents, in place of
            ``dataset_name``.
        streaming: Read while training, nothing stored.
        shuffle_buffer: Documents that a streamed data set is shuffled within.
        max_length: Tokens a row.
        packing: Fill each row with several documents; attention and positions stop at their boundaries.
        max_documents: Read no more documents than this.
        num_workers: Processes that prepare batches beside the training process.
    """

    dataset_name: str = "embedded"
    dataset_config: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    eval_dataset_name: str | None = None
    text_column: str | None = None
    validation_fraction: float = 0.05
    max_validation_windows: int = 64
    mixed: bool = False
    dataset_names: list[str] = field(default_factory=list)
    dataset_weights: list[float] = field(default_factory=list)
    streaming: bool = False
    shuffle_buffer: int = 1_000
    max_length: int = 512
    packing: bool = True
    max_documents: int | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        at_least("data", self, 2, "max_length")
        at_least("data", self, 1, "max_documents", "shuffle_buffer", "max_validation_windows")
        at_least("data", self, 0, "num_workers")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"data.validation_fraction must be in (0, 1); got {self.validation_fraction}. The default is 0.05."
            )
        self._check_mixture()

    def _check_mixture(self) -> None:
        names, weights = self.dataset_names, self.dataset_weights
        if not self.mixed:
            if names or weights:
                raise ConfigError(
                    "data.dataset_names and data.dataset_weights need data.mixed=true; got data.mixed=false. "
                    "Set it, or name one data set in data.dataset_name."
                )
            return
        if not names or len(names) != len(weights):
            raise ConfigError(
                f"data.dataset_weights must give one weight for each of data.dataset_names; got {len(weights)} weights "
                f"for {len(names)} names."
            )
        if any(weight <= 0 for weight in weights):
            raise ConfigError(f"data.dataset_weights must be above 0; got {list(weights)}. Leave such a data set out.")
        if abs(sum(weights) - 1.0) > 1e-6:
            raise ConfigError(
                f"data.dataset_weights must sum to 1; got {list(weights)}, which sum to {sum(weights):g}. Rescale them."
            )
        if len(set(names)) != len(names):
            raise ConfigError(f"data.dataset_names must name each data set once; got {list(names)}. Add their weights.")


@dataclass(kw_only=True)
class LrMultipliers:
    """What ``training.lr`` is multiplied by for each component of the model."""

    base_model: float = 1.0
    router: float = 1.0
    prior: float = 1.0
    modulation: float = 1.0

    def __post_init__(self) -> None:
        at_least("training.lr_multipliers", self, 0, *(f.name for f in fields(self)))


@dataclass(kw_only=True)
class TrainingConfig:
    """How the model is trained.

    Attributes:
        objective: ``equivalence`` to the frozen base, ``causal_lm`` on text, or ``sft`` on conversations.
        stages: Of ``equivalence``: a list of ``layerwise`` and ``end_to_end``; ``auto`` takes both, or only the second
            where every layer is ``keyed``, whose layer-wise optimum is its closed form.
        layerwise_fraction: Share of the steps that the layer-wise stage takes when both run.
        kl_weight: Of ``KL(base ‖ model)`` of the logits, nats a token.
        hidden_weight: Of the error of the last hidden state.
        hidden_loss: ``normalised``: squared error over the squared norm, token by token; ``mse``: plain.
        use_regularization: Add ``regularization_lambda`` × the mean penalty of the dynamic layers; not with ``dense``.
        capacity_anneal_fraction: Of routed layers: share of the steps in which their capacity falls from 1 to
            ``model.capacity_gamma``, in sixteenths of the way.
        gate_anneal_fraction: Of routed layers: share of the steps in which ``model.gate_share`` rises to 1, in
            sixteenths of the way; 0 leaves it as it is.
        threshold_fraction: Share of the steps, the last ones, in which tokens are chosen by the threshold, as ever
            after, and not as the highest of their row.
        trainable: ``modulation`` (the base stays bit for bit), adapters by peft beside it (``lora``; ``dora``, which
            learns the length of each row of ``W`` apart from its direction, arXiv 2402.09353; ``ia3``, which scales
            keys, values and the input of ``down_proj``, arXiv 2205.05638), or ``all``.
        lora_rank: This and the three after it are of ``lora`` and ``dora``; ``ia3`` has nothing to set.
        max_steps: Optimizer steps; ``null`` runs ``num_epochs``.
        mixed_precision: ``no``, ``bf16`` or ``fp16``. A frozen base is held in that type; a trained one stays fp32
            under autocast.
        use_flash_attention: Attention by the package flash-attn, on NVIDIA GPUs and in 16 bit.
        report_to: Trackers beside ``metrics.jsonl``, of ``tensorboard``, ``wandb`` and ``trackio``.
        resume: Go on from the last checkpoint in ``output_dir``.
        save_delta: Save only what is added; ``null`` does so whenever the base is frozen.
        early_stopping_patience: Evaluations without a better validation perplexity before stopping; with
            ``eval_steps``.
        sample_prompts: Prompts that the model continues at every evaluation.
    """

    output_dir: str = "outputs/run"
    run_name: str | None = None
    seed: int = 0
    objective: str = "equivalence"

    stages: Any = "auto"
    layerwise_fraction: float = 0.3
    kl_weight: float = 1.0
    hidden_weight: float = 0.1
    hidden_loss: str = "normalised"
    use_regularization: bool = False
    regularization_lambda: float = 0.01

    capacity_anneal_fraction: float = 0.0
    gate_anneal_fraction: float = 0.0
    threshold_fraction: float = 0.0

    trainable: str = "modulation"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])

    num_epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    lr: float = 3e-4
    lr_multipliers: LrMultipliers = field(default_factory=LrMultipliers)
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile_model: bool = False
    use_flash_attention: bool = False

    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    save_delta: bool | None = None
    resume: bool = False
    early_stopping_patience: int | None = None
    report_to: list[str] = field(default_factory=list)
    sample_prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        section = "training"
        one_of(
            section,
            self,
            objective=OBJECTIVES,
            hidden_loss=HIDDEN_LOSSES,
            trainable=TRAINABLE,
            lr_scheduler=SCHEDULERS,
            mixed_precision=PRECISIONS,
        )
        at_least(
            section,
            self,
            1,
            *("max_steps", "batch_size", "eval_batch_size", "gradient_accumulation_steps", "log_steps", "eval_steps"),
            *("save_steps", "save_total_limit", "early_stopping_patience", "lora_rank", "lora_alpha"),
        )
        at_least(section, self, 0, "seed", "warmup_steps", "weight_decay", "kl_weight", "hidden_weight")
        at_least(section, self, 0, "regularization_lambda")
        for name in ("lr", "num_epochs", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"training.{name} must be above 0; got {getattr(self, name)}.")
        if not 0.0 < self.layerwise_fraction < 1.0:
            raise ConfigError(
                f"training.layerwise_fraction must be in (0, 1); got {self.layerwise_fraction}. To run one stage only, "
                "name it in training.stages."
            )
        for name in ROUTING_SCHEDULES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"training.{name} must be in [0, 1], a share of the steps; got {getattr(self, name)}. 0 leaves it "
                    "out."
                )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(
                f"training.lora_dropout must be in [0, 1); got {self.lora_dropout}. 0.05 is usual, 0 the default."
            )
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ConfigError(
                "training.early_stopping_patience counts evaluations, so it needs training.eval_steps; got "
                f"training.early_stopping_patience={self.early_stopping_patience} with training.eval_steps=null. "
                "Set training.eval_steps, or leave the patience out."
            )
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise ConfigError(
                    f"training.report_to must name some of {', '.join(TRACKERS)}; got {tracker!r}."
                    f"{nearest(tracker, TRACKERS)} metrics.jsonl is always written."
                )
        if self.objective == "equivalence" and self.kl_weight == self.hidden_weight == 0:
            raise ConfigError(
                "training.kl_weight and training.hidden_weight must not both be 0 when training.objective=equivalence: "
                "nothing would be matched. Set one of them."
            )
        self._check_stages()

    def _check_stages(self) -> None:
        if self.stages == "auto":
            return
        stages = self.stages
        valid = isinstance(stages, Sequence) and not isinstance(stages, str) and list(stages) in STAGE_LISTS
        if not valid:
            raise ConfigError(
                f"training.stages must be auto, [layerwise], [end_to_end] or [layerwise,end_to_end]; got {stages!r}."
            )
        if len(stages) > 1 and self.max_steps is not None and self.max_steps < len(stages):
            raise ConfigError(
                f"training.stages=[{','.join(stages)}] needs a step for each: training.max_steps must be at least "
                f"{len(stages)}; got {self.max_steps}. Raise it, or name one stage."
            )


STAGE_LISTS = ([STAGES[0]], [STAGES[1]], list(STAGES))
