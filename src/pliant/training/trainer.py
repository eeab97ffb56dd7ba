"""The one trainer: transformers' own loop, with pliant's objectives, stages, checkpoints and perplexities."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pliant.config import RunConfig
from pliant.config.sections import STAGES
from pliant.errors import DataError
from pliant.models import DynamicCausalLM
from pliant.statistics import evaluating
from pliant.training import checkpoints
from pliant.training.build import can_save_delta
from pliant.training.callbacks import (
    FiniteGuard,
    modulation_norms,
    route_by,
    routing_at,
    routing_shares,
    routing_sums,
)
from pliant.training.meter import Meter
from pliant.training.objectives import OBJECTIVES, Student, evaluation_scores
from pliant.training.optim import Stage, parameter_groups, schedule, stage_at
from pliant.training.readout import predicted

MAX_EXPONENT = 709.0
SCORES = ("nll", "base_nll", "kl", "agreement")


class PliantTrainer(Trainer):
    """Trains a dynamic model by the objectives of its stages.

    A batch's loss is the mean over all predicted positions of the optimizer step: over accumulated micro-batches and
    over processes, whatever the number of positions in each.

    Args:
        model: A dynamic model, or a peft model around one.
        tokenizer: Saved beside it.
        run: Configuration of the run.
        teacher: A model to match where the base itself is trained.
        probe: A few validation tokens (batch, seq) on which to measure the modulation.
        options: Those of ``transformers.Trainer``.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        run: RunConfig,
        teacher: DynamicCausalLM | None = None,
        probe: Tensor | None = None,
        **options: Any,
    ) -> None:
        self.dynamic: DynamicCausalLM = model if isinstance(model, DynamicCausalLM) else model.get_base_model()
        self.adapted = None if isinstance(model, DynamicCausalLM) else model
        self.run, self.tokenizer, self.teacher, self.probe = run, tokenizer, teacher, probe
        self.folder = Path(run.training.output_dir)
        self.stages: tuple[Stage, ...] = ()
        self.meter = Meter()
        self.guard = FiniteGuard(run.training.output_dir, mixed_precision=run.training.mixed_precision)
        self.last_log = time.monotonic()
        self._items, self._counts = 0, iter(())  # predicted positions of the optimizer step, and of its micro-batches
        self._rows: list[int] = []
        self._losses: list[Tensor] = []
        self._open_report: Any = None
        with _trainable_quantised(self.dynamic):
            super().__init__(model=model, processing_class=tokenizer, **options)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's own would round losses, scores and sums of gradients too.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )
        self.model_accepts_loss_kwargs = False  # losses are scaled here, in compute_loss
        self.add_callback(_RunEvents(self))

    # What is minimised

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Returns the micro-batches of the next optimizer step, and counts their predicted positions."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [int(predicted(batch["labels"]).sum()) for batch in batches]
        total: Any = self.accelerator.reduce(torch.tensor(sum(counts), device=self.accelerator.device), "sum")
        self._items, self._counts = max(int(total), 1), iter(counts)
        self._rows = [row for batch in batches for row in batch["row"].tolist()]
        self._losses = []
        return batches, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward; a checkpointed backward needs the report still open."""
        with self._report() as self._open_report:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's objective, as this micro-batch's share of the mean over the optimizer step."""
        batch = {name: value for name, value in inputs.items() if name != "row"}
        stage = stage_at(self.stages, self.state.global_step)
        sums = OBJECTIVES[stage.name](self._student(model), batch)
        loss, positions = sums["loss"], next(self._counts)
        if self._open_report is not None:
            mask = predicted(batch["labels"])
            penalty = self._open_report.regulariser(mask) * positions
            weight = 1.0 if self.run.is_routed else self.run.training.regularization_lambda
            loss = loss + weight * penalty
            sums["router_loss" if self.run.is_routed else "regulariser"] = penalty.detach()
            sums |= routing_sums(self.dynamic, self._open_report.layers, mask)
        self.meter.add({**sums, "loss": loss.detach()}, positions)
        loss = loss * (self.accelerator.num_processes * self.current_gradient_accumulation_steps / self._items)
        return (loss, None) if return_outputs else loss

    @property
    def wrapped(self) -> nn.Module:
        """The model, or what DDP, FSDP or autocast have put around it."""
        wrapped: Any = self.model_wrapped
        return wrapped

    def _student(self, wrapped: nn.Module) -> Student:
        return Student(
            wrapped=wrapped,
            model=self.dynamic,
            adapted=self.adapted,
            teacher=self.teacher,
            config=self.run.training,
        )

    def _report(self) -> AbstractContextManager[Any]:
        """Of what the losses or the log need; the losses of routers are always among them."""
        needed = self.run.training.use_regularization or self.run.is_routed
        return self.dynamic.report() if needed else nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        step = self.state.global_step + 1
        self.guard.check_loss(torch.stack(self._losses), self._rows, step)
        norm: Any = super()._clip_grad_norm(model)
        self.guard.check_gradients(norm, self._rows, step)
        return norm

    # How it is minimised

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the components' parameter groups."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(parameter_groups(target, self.run.training), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warmup and decay of every stage."""
        if self.lr_scheduler is None:
            self.stages = plan_stages(self.run, self.dynamic, num_training_steps)
            self.lr_scheduler = schedule(optimizer or self.optimizer, self.run.training, self.stages)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def enter_stage(self, stage: Stage, *, is_first: bool) -> None:
        """Prepares the model for a stage; a later one starts with fresh moments: its gradients are of another size."""
        if self.run.training.gradient_checkpointing:
            # The layer-wise stage switches layers on and off within a forward, and keeps little anyway.
            self.dynamic.checkpoint_activations(stage.name != "layerwise")
        if not is_first:
            self.optimizer.state.clear()

    def route(self, step: int) -> None:
        """Routes tokens as the schedules say for optimizer step ``step``."""
        if self.run.is_routed:
            route_by(self.dynamic, routing_at(self.run, step, self.state.max_steps))

    # What is measured

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Perplexity on the validation rows; beside the base where the objective is to match it."""
        started = time.monotonic()
        beside_base = self.run.training.objective == "equivalence"
        sums, count = self._score(self.get_eval_dataloader(eval_dataset), beside_base=beside_base)
        means = dict(zip(SCORES[: len(sums)], (sums / count).tolist(), strict=True))
        self.guard.check_evaluation(means["nll"], self.state.global_step)
        metrics = {"eval_perplexity": perplexity_of(means["nll"]), "eval_loss": means["nll"]}
        if beside_base:
            base = perplexity_of(means["base_nll"])
            metrics |= {"eval_base_perplexity": base, "eval_ratio": metrics["eval_perplexity"] / base}
            metrics |= {"eval_kl": means["kl"], "eval_agreement": means["agreement"]}
        if self.probe is not None and not self.is_fsdp_enabled:
            probe = self.probe.to(self.accelerator.device)
            metrics |= modulation_norms(self.dynamic, probe)
            metrics |= routing_shares(self.dynamic, probe, self.state.global_step)
        metrics["eval_seconds"] = time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.state.global_step:
            self._keep_if_best()
        self.last_log += time.monotonic() - started
        return metrics

    @torch.no_grad()
    def _score(self, loader: Any, *, beside_base: bool) -> tuple[Float[Tensor, " scores"], Float[Tensor, ""]]:
        sums, count = None, None
        self.callback_handler.eval_dataloader = loader
        with evaluating(self.dynamic):
            for batch in loader:
                batch = self._prepare_inputs({name: value for name, value in batch.items() if name != "row"})
                row = evaluation_scores(self._student(self.wrapped), batch, beside_base=beside_base)
                rows, counts = self.accelerator.gather_for_metrics(row)
                rows, counts = rows.cpu().double(), counts.cpu().double()
                sums = rows.sum(0) if sums is None else sums + rows.sum(0)
                count = counts.sum() if count is None else count + counts.sum()
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if sums is None or count is None or count == 0:
            raise DataError("the validation rows must hold tokens to predict; there are none. Give more text.")
        return sums, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; a training loss is the mean over the positions since the last one, with its parts and the speed."""
        if "loss" in logs:
            now = time.monotonic()
            means, positions = self.meter.drain(self.accelerator)
            if "nll" in means:  # without the penalty that the loss may hold
                logs["perplexity"] = perplexity_of(means.pop("nll"))
            logs |= means
            logs["tokens_per_second"] = positions / (now - self.last_log)
            self.last_log = now
        super().log(logs, start_time)

    # What is kept

    def finish(self) -> None:
        """Evaluates and saves a run that ended before its last planned step."""
        last = checkpoints.last_checkpoint(self.folder)
        if last is None or last.name != f"checkpoint-{self.state.global_step}":
            self.evaluate()
            self._save_checkpoint(self.wrapped)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with self._staged(name) as folder:
            self.args.output_dir = str(folder.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(self.folder)
            self.meter.save(folder, rank=self.args.process_index)
        if self.args.should_save:
            checkpoints.rotate(self.folder, self.run.training.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, whole also where it is sharded, whatever FSDP keeps beside it to resume from."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves the model as a Hugging Face directory: a delta, adapters, or all of it."""
        if not self.args.should_save:
            return
        target = output_dir or str(self.folder)
        self.tokenizer.save_pretrained(target)  # first: the folder that a resumed model came from may be gone
        if self.adapted is not None:
            self.adapted.save_pretrained(target, state_dict=state_dict)
        else:
            self.dynamic.save_pretrained(target, delta=self.saves_delta, state_dict=state_dict)

    @property
    def saves_delta(self) -> bool:
        """Whether checkpoints hold only what conversion added."""
        wanted = self.run.training.save_delta
        return can_save_delta(self.dynamic, self.run) if wanted is None else wanted

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.check_sharding(resume_from_checkpoint, is_sharded=self.is_fsdp_enabled)
        if self.adapted is not None or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.restore(self.dynamic, resume_from_checkpoint)

    def _keep_if_best(self) -> None:
        """Saves ``checkpoint-best`` if no evaluation since the start had a lower perplexity; stops if patience ends."""
        if self._evaluations_since_best(self.state) == 0:
            with self._staged(checkpoints.BEST) as folder:
                self.save_model(str(folder), _internal_call=True)
        elif self._is_out_of_patience(self.state):
            self.control.should_training_stop = True
            self.control.should_save = True

    def _evaluations_since_best(self, state: TrainerState) -> int:
        """How many evaluations of training came after the one with the lowest perplexity."""
        history = [
            entry["eval_perplexity"] for entry in state.log_history if "eval_perplexity" in entry and entry["step"]
        ]
        return len(history) - 1 - history.index(min(history)) if history else 0

    def _is_out_of_patience(self, state: TrainerState) -> bool:
        patience = self.run.training.early_stopping_patience
        return patience is not None and self._evaluations_since_best(state) >= patience

    def restore_if_complete(self, checkpoint: Path) -> bool:
        """Takes up a run that has taken all its steps, or ran out of patience, without a further one."""
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE_FILE))
        planned = self.run.training.max_steps or state.max_steps
        if state.global_step < planned and not self._is_out_of_patience(state):
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _staged(self, name: str) -> AbstractContextManager[Path]:
        wait = self.accelerator.wait_for_everyone
        return checkpoints.staged(self.folder, name, is_main=self.args.should_save, wait=wait)


class _RunEvents(TrainerCallback):
    """Tells the trainer when a stage begins, and when to evaluate and to save; restores the meter of a resumed run."""

    def __init__(self, trainer: PliantTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.enter_stage(stage_at(trainer.stages, state.global_step), is_first=True)
        trainer.route(state.global_step)
        if state.global_step:
            folder = trainer.folder / f"checkpoint-{state.global_step}"
            trainer.meter.load(
                folder, rank=args.process_index, num_processes=args.world_size, device=trainer.accelerator.device
            )
        trainer.last_log = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for stage in self.trainer.stages[1:]:
            if state.global_step == stage.start:
                self.trainer.enter_stage(stage, is_first=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        training, step = self.trainer.run.training, state.global_step
        self.trainer.route(step)
        is_last = step >= state.max_steps
        control.should_evaluate |= is_last or (training.eval_steps is not None and step % training.eval_steps == 0)
        control.should_save |= is_last or (training.save_steps is not None and step % training.save_steps == 0)


def plan_stages(run: RunConfig, model: DynamicCausalLM, num_steps: int) -> tuple[Stage, ...]:
    """Returns the objectives of a run of ``num_steps`` optimizer steps, in turn."""
    training = run.training
    if training.objective != "equivalence":
        return (Stage(name=training.objective, start=0, end=num_steps),)
    names = list(training.stages)
    if training.stages == "auto":
        layers = model.spec.layers.values()
        is_solved = all(layer.starts_at_layerwise_optimum() for layer in layers)
        needs_both = training.trainable == "modulation" and not is_solved and num_steps > 1
        names = list(STAGES) if needs_both else [STAGES[1]]
    if len(names) == 1:
        return (Stage(name=names[0], start=0, end=num_steps),)
    boundary = min(max(1, round(training.layerwise_fraction * num_steps)), num_steps)
    return (Stage(name=names[0], start=0, end=boundary), Stage(name=names[1], start=boundary, end=num_steps))


def perplexity_of(nll: float) -> float:
    """``exp(nll)``, infinite where that is out of range."""
    return math.exp(nll) if nll < MAX_EXPONENT else math.inf


@contextmanager
def _trainable_quantised(model: DynamicCausalLM) -> Iterator[None]:
    """Lets ``Trainer`` take a quantised base: what is trained lies beside it, as adapters of peft do."""
    before = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before
