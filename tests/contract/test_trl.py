"""trl's own trainer takes a converted model, and leaves a checkpoint that ``pliant.load`` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import pliant

trl = pytest.importorskip("trl")

# trl 1.16 still sets what transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")


def test_sft_trains_the_modulation_alone_and_the_checkpoint_loads(
    tmp_path: Path,
    make_base: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.eos_token = "<bos>"  # trl closes every text with it
    model = pliant.convert(make_base("llama"), pliant.NptConfig.preset("v1", rank=6)).freeze_base()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    texts = Dataset.from_list([{"text": " ".join(str(2 + (i + j) % 90) for j in range(12))} for i in range(16)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        max_length=16,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    added = {name for name, _ in model.dynamic_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (name not in added), name

    folder = tmp_path / "run" / "checkpoint-4"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "pliant_llama"
    loaded = pliant.load(folder).eval()
    tokens = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
