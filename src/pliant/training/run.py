"""``pliant.train``: a run from its configuration to its last checkpoint."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor
from transformers import TrainingArguments, set_seed

from pliant.config import RunConfig
from pliant.config.composition import compose, flatten, to_yaml
from pliant.config.sections import ROUTING_SCHEDULES
from pliant.data import TrainingData, training_data
from pliant.errors import ConfigError
from pliant.training import checkpoints
from pliant.training.build import autocast_dtype, build_model, tokenizer_for
from pliant.training.callbacks import GenerationSamples, MetricsFile, RunProgress, StopSignals
from pliant.training.plan import CONFIG_FILE, METRICS_FILE, compute_device_type, make_plan
from pliant.training.trainer import PliantTrainer

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
DECIDING = (
    *("model_type", "model.", "data.", "training.objective", "training.stages", "training.layerwise_fraction"),
    *("training.trainable", "training.lora_", "training.seed", "training.mixed_precision"),
    *("training.kl_weight", "training.hidden_", "training.use_regular", "training.regularization_lambda"),
    *(f"training.{name}" for name in ROUTING_SCHEDULES),
)
"""Settings that a resumed run may not change."""
PROBE_ROWS, PROBE_TOKENS = 2, 128


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        model: The model after its last step, in memory.
        output_dir: The run's folder.
        steps: Optimizer steps taken, those before a resume included.
        before: Validation metrics at step 0, also where the run was resumed since.
        after: Those of the last evaluation.
        checkpoint: Newest ``checkpoint-N``.
        best: ``checkpoint-best``, the lowest validation perplexity; ``None`` before the first evaluation.
        stopped_by: The signal that ended the run early, or ``None``.
    """

    model: Any
    output_dir: Path
    steps: int
    before: Mapping[str, int | float]
    after: Mapping[str, int | float]
    checkpoint: Path | None
    best: Path | None
    stopped_by: signal.Signals | None


def train(
    config: RunConfig | str = "base", overrides: Sequence[str] = (), *, console: Console | None = None
) -> TrainingResult:
    """Trains a model as ``config`` says, and leaves checkpoints that ``pliant.load`` reads.

    Args:
        config: A configuration, or the name of a recipe or the path of a YAML file to compose one from.
        overrides: Hydra overrides of a named configuration: ``["training.lr=1e-4"]``.
        console: Where progress is drawn; the standard error stream by default.

    Raises:
        ConfigError: A setting is unknown, out of range or contradicts another.
        DataError: Texts are missing, unreadable or too short.
        CheckpointError: A model cannot be loaded or a checkpoint not be written.
        TrainingError: A loss or gradient stopped being finite.
    """
    if not isinstance(config, RunConfig):
        config = compose(config, overrides)
    elif overrides:
        raise ConfigError("overrides change a named configuration; got a RunConfig too. Set its fields instead.")
    make_plan(config)
    state = PartialState(cpu=compute_device_type() == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ConfigError(
            f"WORLD_SIZE={launched} processes were launched, and accelerate sees {state.num_processes}: each would "
            "train a model of its own. Launch them with accelerate launch, or one a GPU with torchrun."
        )
    folder = Path(config.training.output_dir)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_staging(folder)
    state.wait_for_everyone()
    resume_from = checkpoints.last_checkpoint(folder) if config.training.resume else None
    if resume_from is not None:
        _refuse_other_settings(config, folder)
    set_seed(config.training.seed)
    tokenizer = tokenizer_for(config)
    kind = "chat" if config.training.objective == "sft" else "text"
    with state.main_process_first():  # what is prepared once is read by the others
        data = training_data(config.data, tokenizer, kind=kind, seed=config.training.seed)
    model, teacher = build_model(config, resume_from)
    if state.is_main_process:
        written = folder / f".{CONFIG_FILE}"
        written.write_text(to_yaml(config), encoding="utf-8")
        os.replace(written, folder / CONFIG_FILE)
    trainer = PliantTrainer(
        model=model,
        run=config,
        teacher=teacher,
        probe=_probe(data),
        args=_arguments(config, resumed=resume_from is not None),
        train_dataset=data.train,
        eval_dataset=data.validation,
        # Flash attention finds the documents of a batch of one row only, which is then as long as all of them.
        data_collator=replace(data.collate, flatten=_is_flattened(config)),
        tokenizer=tokenizer,
    )
    return _run(trainer, config, resume_from, console)


def _refuse_other_settings(config: RunConfig, folder: Path) -> None:
    """Refuses to go on with a run under settings that it was not begun with.

    Raises:
        ConfigError: One that decides the run differs; how long it runs, and what is logged and saved, may change.
    """
    if not (folder / CONFIG_FILE).is_file():
        return
    before = flatten(compose(str(folder / CONFIG_FILE)))
    for key, value in flatten(config).items():
        if key in before and before[key] != value and key.startswith(DECIDING):
            raise ConfigError(
                f"{key} must be what {folder / CONFIG_FILE} says when a run goes on, {before[key]!r}; got {value!r}. "
                "Set it back, or begin anew in another training.output_dir."
            )


def _run(
    trainer: PliantTrainer, config: RunConfig, resume_from: Path | None, console: Console | None
) -> TrainingResult:
    folder, training = Path(config.training.output_dir), config.training
    stop, progress = StopSignals(), RunProgress(console)
    progress.attach(trainer)
    for callback in (MetricsFile(folder / METRICS_FILE), stop):
        trainer.add_callback(callback)
    if training.sample_prompts:
        trainer.add_callback(GenerationSamples(training.sample_prompts, trainer.tokenizer, folder / SAMPLES_FILE))
    try:
        if resume_from is None or not trainer.restore_if_complete(resume_from):
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
            if not stop.stopping:
                trainer.finish()
    finally:  # transformers tells its callbacks nothing of an error
        progress.close()
        stop.restore()
    evaluations = [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]
    best = folder / checkpoints.BEST
    return TrainingResult(
        model=trainer.adapted or trainer.dynamic,
        output_dir=folder,
        steps=trainer.state.global_step,
        before=next((entry for entry in evaluations if entry["step"] == 0), {}),
        after=evaluations[-1] if evaluations else {},
        checkpoint=checkpoints.last_checkpoint(folder),
        best=best if best.exists() else None,
        stopped_by=stop.received if stop.stopping else None,
    )


def _arguments(config: RunConfig, *, resumed: bool) -> TrainingArguments:
    """What transformers' loop needs to know; losses, schedules, evaluation and saving are the trainer's own."""
    training, cast = config.training, autocast_dtype(config)
    arguments = TrainingArguments(
        output_dir=training.output_dir,
        run_name=training.run_name,
        seed=training.seed,
        data_seed=training.seed,
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        # A flattened batch has one score, and rows that processes repeat could not be left out of it.
        per_device_eval_batch_size=1 if _is_flattened(config) else training.eval_batch_size or training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.lr,
        max_grad_norm=training.max_grad_norm,
        use_cpu=compute_device_type() == "cpu",  # else it refuses bf16 there
        bf16=cast == torch.bfloat16,
        fp16=cast == torch.float16,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,
        eval_on_start=not resumed,
        eval_strategy="no",
        save_strategy="no",
        report_to=list(training.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cache=True,  # the trainer would write its False into the model's configuration
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_num_workers=min(config.data.num_workers, 1) if config.data.streaming else config.data.num_workers,
        # Else it would cut the batches of a stream from rows of equal length only.
        accelerator_config={"dispatch_batches": False},
    )
    if arguments.n_gpu > 1:  # else transformers wraps the model in DataParallel, which cuts batches apart
        logger.warning("one of %d GPUs is used; `accelerate launch -m pliant.cli.train …` uses all", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def _is_flattened(config: RunConfig) -> bool:
    return config.training.use_flash_attention and config.data.packing


def _probe(data: TrainingData) -> Tensor:
    """A few validation tokens to measure the modulation on."""
    rows = [data.validation[i] for i in range(min(PROBE_ROWS, len(data.validation)))]
    return data.collate(rows)["input_ids"][:, :PROBE_TOKENS]
