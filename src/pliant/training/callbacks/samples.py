"""What the model writes, at every evaluation."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from jaxtyping import Int
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pliant.errors import ConfigError
from pliant.statistics import evaluating, input_device
from pliant.training.callbacks.norms import unwrapped
from pliant.training.callbacks.step_lines import StepLines

logger = logging.getLogger("pliant.training")

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

# Nothing is left to the model's own generation settings: Qwen's, for one, have a repetition penalty.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "use_cache": True,
}


class GenerationSamples(TrainerCallback):
    """Continues prompts greedily at every evaluation, one JSON line and one log message a sample.

    Draws no random numbers, and leaves every module in the mode it was in. Only the main process generates; with
    sharded weights (FSDP, DeepSpeed) it cannot do so alone, so there samples are left out with a warning.

    Args:
        prompts: What to continue.
        tokenizer: The model's.
        path: Gets ``{"step", "prompt", "continuation"}`` a line; on exact resume it is cut like ``metrics.jsonl``.
        max_new_tokens: Longest continuation.

    Raises:
        ConfigError: A prompt has no tokens, or, when training begins, leaves no room in the model's context.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        path: str | os.PathLike,
        max_new_tokens: int = 32,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.lines = StepLines(path)
        self.last_step: int | None = None
        self.prompts = {prompt: torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long) for prompt in prompts}
        if empty := [prompt for prompt, ids in self.prompts.items() if ids.shape[1] == 0]:
            raise ConfigError(f"training.sample_prompts must have at least one token each; got {empty[0]!r}.")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **kwargs: Any
    ) -> None:
        """Checks the lengths of the prompts, and takes up the file at the step of the checkpoint."""
        self.last_step = None
        longest = unwrapped(model).config.max_position_embeddings - self.max_new_tokens
        for prompt, ids in self.prompts.items():
            if ids.shape[1] > longest:
                raise ConfigError(
                    f"training.sample_prompts must have at most {longest} tokens, the model's positions without the "
                    f"{self.max_new_tokens} to be written; {prompt[:60]!r} has {ids.shape[1]}. Shorten it."
                )
        if state.is_world_process_zero:
            self.lines.begin(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **kwargs: Any
    ) -> None:
        """Writes one sample a prompt, once a step however many data sets are evaluated."""
        if not state.is_world_process_zero or state.global_step == self.last_step or not self.prompts:
            return
        self.last_step = state.global_step
        if is_initialized() and AcceleratorState().distributed_type in SHARDED:
            logger.warning("samples are left out: the weights are sharded over the processes")
            return
        bare = unwrapped(model)
        with evaluating(bare):
            for prompt, ids in self.prompts.items():
                text = self._continuation(bare, ids)
                self.lines.append({"step": state.global_step, "prompt": prompt, "continuation": text})
                logger.info("step %d, sample: %r → %r", state.global_step, prompt, text)

    def _continuation(self, model: Any, ids: Int[Tensor, "1 tokens"]) -> str:
        end, padding = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        ids = ids.to(input_device(model))
        output: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=end if padding is None else padding,
            max_new_tokens=self.max_new_tokens,
            **GREEDY,
        )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
