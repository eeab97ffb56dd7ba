"""What happens beside the training loop, alone and in tiny runs of the real trainer."""

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pliant.errors import ConfigError, TrainingError
from pliant.training.callbacks import (
    FiniteGuard,
    GenerationSamples,
    MetricsFile,
    RunProgress,
    StopSignals,
    modulation_norms,
)
from pliant.training.callbacks.progress import logger
from pliant.training.checkpoints import last_checkpoint

TIMES = {"time", "train_runtime", "train_samples_per_second", "train_steps_per_second"} | {
    f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")
}


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """Fails a test that leaves a signal handler behind."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")


def state_at(step: int, *, is_main: bool = True, max_steps: int = 20) -> TrainerState:
    state = TrainerState(global_step=step, max_steps=max_steps, epoch=step / max_steps)
    state.is_world_process_zero = is_main
    return state


def records(path: Path, *, drop: set[str] = TIMES) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


def make_trainer(model: nn.Module, output_dir: Path, *callbacks: Any, **options: Any) -> Trainer:
    rows = torch.randint(2, 97, (24, 8), generator=torch.Generator().manual_seed(5))
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(output_dir), **{**defaults, **options})
    return Trainer(model, args, train_dataset=dataset, eval_dataset=dataset[:4], callbacks=list(callbacks))


class SendSignal(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


# --- metrics.jsonl


def test_metrics_are_one_object_a_line(arguments: TrainingArguments, tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.on_train_begin(arguments, state_at(0), TrainerControl())
    logs = {"loss": 2.5, "norm": torch.tensor(1.5), "worst": math.inf, "epoch": 0.05, "text": "ü"}
    metrics.on_log(arguments, state_at(1), TrainerControl(), logs=logs)
    metrics.on_log(arguments, state_at(2, is_main=False), TrainerControl(), logs=logs)
    (line,) = records(path, drop=set())
    assert line.pop("time") >= 0
    assert line == {"step": 1, "epoch": 0.05, "loss": 2.5, "norm": 1.5, "worst": None, "text": "ü"}
    assert "loss" in logs


def test_resume_cuts_later_lines_and_the_summary(arguments: TrainingArguments, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.on_train_begin(arguments, state_at(0), TrainerControl())
    for step in range(1, 6):
        first.on_log(arguments, state_at(step), TrainerControl(), logs={"loss": step})
    first.on_log(arguments, state_at(5), TrainerControl(), logs={"train_runtime": 1.0})
    first.on_log(arguments, state_at(5), TrainerControl(), logs={"eval_loss": 1.0})
    for resumed, kept in ((5, [1, 2, 3, 4, 5]), (3, [1, 2, 3])):
        again = MetricsFile(path)
        again.on_train_begin(arguments, state_at(resumed), TrainerControl())
        assert [line["step"] for line in records(path)] == kept
        assert all("loss" in line for line in records(path))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["metrics.jsonl"]


def test_time_goes_on_after_resume(arguments: TrainingArguments, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "time": 1000.0, "loss": 1}\n')
    metrics = MetricsFile(path)
    metrics.on_train_begin(arguments, state_at(3), TrainerControl())
    metrics.on_log(arguments, state_at(4), TrainerControl(), logs={"loss": 1})
    assert 1000 <= records(path, drop=set())[-1]["time"] < 1100


@pytest.mark.parametrize(
    "tail", ['{"step": 4, "lo', '{"step": 4', "4", '{"step": 4, "text": "\N{GREEK SMALL LETTER RHO}']
)
def test_a_torn_last_line_is_dropped(
    arguments: TrainingArguments, tmp_path: Path, tail: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 3, "loss": 1}\n'
    path.write_bytes((whole + tail).encode()[: None if tail.isascii() else -1])
    metrics = MetricsFile(path)
    with caplog.at_level(logging.WARNING, "pliant.training"):
        metrics.on_train_begin(arguments, state_at(4), TrainerControl())
    assert "dropped 1 unfinished line" in caplog.text
    assert path.read_text() == whole


def test_a_line_that_only_lacks_its_end_is_kept(arguments: TrainingArguments, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "loss": 1}')
    MetricsFile(path).on_log(arguments, state_at(3), TrainerControl(), logs={"eval_loss": 1})
    assert [line["step"] for line in records(path)] == [3, 3]


def test_a_new_run_begins_anew_but_keeps_its_own_first_lines(arguments: TrainingArguments, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "old": 1}\n{"step": 3, "old": 1}\n')
    metrics = MetricsFile(path)
    metrics.on_log(arguments, state_at(0), TrainerControl(), logs={"eval_loss": 1})
    metrics.on_train_begin(arguments, state_at(0), TrainerControl())
    metrics.on_log(arguments, state_at(1), TrainerControl(), logs={"loss": 1})
    assert [(line["step"], "old" in line) for line in records(path)] == [(0, False), (1, False)]


def test_other_processes_leave_the_file_alone(arguments: TrainingArguments, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "lo')
    MetricsFile(path).on_train_begin(arguments, state_at(0, is_main=False), TrainerControl())
    assert path.read_text() == '{"step": 3, "lo'


@pytest.mark.parametrize(("strategy", "resumed"), [("steps", 3), ("steps", 2), ("epoch", 3)])
def test_stopped_and_resumed_run_leaves_the_files_of_an_unbroken_one(
    make_base: Callable, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, strategy: str, resumed: int
) -> None:
    """Dropout draws random numbers in every step, so this also shows that samples draw none."""
    options = {"eval_strategy": strategy, "save_strategy": strategy, "per_device_train_batch_size": 6}

    def run(name: str, *others: Any, resume: Any = None, max_steps: int = 8) -> Trainer:
        folder = tmp_path / name
        callbacks = [MetricsFile(folder / "metrics.jsonl")]
        if name != "no_samples":
            callbacks.append(GenerationSamples(["5 6 7"], tokenizer, folder / "samples.jsonl", 3))
        model = make_base(attention_dropout=0.5)
        trainer = make_trainer(model, folder, *callbacks, *others, max_steps=max_steps, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run("unbroken")
    run("no_samples")
    stop = StopSignals()
    trainer = run("broken", stop, SendSignal(signal.SIGTERM, 3))
    assert stop.received is signal.SIGTERM
    assert trainer.state.global_step == 3
    assert records(tmp_path / "broken" / "metrics.jsonl")[-1]["step"] == 3
    checkpoint = last_checkpoint(tmp_path / "broken")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    run("broken", resume=str(tmp_path / "broken" / f"checkpoint-{resumed}"))
    # The trainer's summary counts only the steps of its own session.
    drop = TIMES | {"train_loss"}
    expected = records(tmp_path / "unbroken" / "metrics.jsonl", drop=drop)
    assert len(expected) >= 10
    assert records(tmp_path / "broken" / "metrics.jsonl", drop=drop) == expected
    assert records(tmp_path / "no_samples" / "metrics.jsonl", drop=drop) == expected
    samples = records(tmp_path / "unbroken" / "samples.jsonl")
    assert [line["step"] for line in samples] == ([3, 6, 8] if strategy == "steps" else [4, 8])
    assert records(tmp_path / "broken" / "samples.jsonl") == samples


# --- progress


def test_plain_progress_is_one_message_a_log_step(
    arguments: TrainingArguments, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    progress = RunProgress()
    control = TrainerControl()
    logs = {"loss": 2.34567, "perplexity": 10.4, "learning_rate": 1e-3, "tokens_per_second": 12345.6, "epoch": 0.5}
    evaluation = {"eval_loss": 2.0, "eval_perplexity": 7.389, "eval_runtime": 3.0, "eval_modulation_norm/mean": 1.0}
    with caplog.at_level(logging.INFO, "pliant.training"):
        progress.on_train_begin(arguments, state_at(4), control)
        progress.on_step_end(arguments, state_at(5), control)
        progress.on_log(arguments, state_at(5), control, logs=logs)
        progress.on_log(arguments, state_at(5, is_main=False), control, logs=logs)
        progress.on_prediction_step(arguments, state_at(5), control, eval_dataloader=[1, 2])
        progress.on_log(arguments, state_at(5), control, logs=evaluation)
        progress.on_evaluate(arguments, state_at(5), control, metrics=evaluation)
        progress.on_log(arguments, state_at(20), control, logs={"loss": 1.0})
        progress.on_log(arguments, state_at(20), control, logs={"train_runtime": 83.4, "train_loss": 2.0})
        progress.on_log(arguments, state_at(20), control, logs={"unknown": 1.0})
        progress.on_log(arguments, TrainerState(), control, logs={"eval_loss": 1.5})
        progress.on_train_end(arguments, state_at(20), control)
    assert caplog.messages == [
        "step 5 of 20, loss 2.346, perplexity 10.4, lr 0.001, tokens/s 12,346, 0:00:00 left",
        "step 5 of 20, validation: loss 2, perplexity 7.389",
        "step 20 of 20, loss 1",
        "step 20 of 20, trained for 0:01:23",
        "validation: loss 1.5",
    ]
    assert {record.name for record in caplog.records} == {logger.name} == {"pliant.training"}
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(arguments: TrainingArguments, caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    progress = RunProgress(Console(file=screen, force_terminal=True, width=120))
    control = TrainerControl()
    with caplog.at_level(logging.INFO, "pliant.training"):
        progress.on_train_begin(arguments, state_at(4), control)
        progress.on_step_end(arguments, state_at(5), control)
        progress.on_log(arguments, state_at(5), control, logs={"loss": 2.5, "tokens_per_second": 1234.0})
        for _ in range(2):
            progress.on_prediction_step(arguments, state_at(5), control, eval_dataloader=[1, 2])
        assert progress.bars is not None
        progress.bars.refresh()
        progress.on_log(arguments, state_at(5), control, logs={"eval_loss": 2.0})
        progress.on_evaluate(arguments, state_at(5), control, metrics={})
        progress.on_prediction_step(arguments, state_at(5), control, eval_dataloader=iter([1]))
        progress.on_train_end(arguments, state_at(5), control)
    shown = screen.getvalue()
    assert "5/20" in shown
    assert "loss 2.5, tokens/s 1,234, 0:00:00 left" in shown
    assert "Evaluating" in shown
    assert "2/2" in shown
    assert "step 5 of 20, validation: loss 2" in shown
    assert shown.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back
    assert caplog.messages == []
    progress.close()


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_progress_takes_the_place_of_the_trainers(
    make_base: Callable,
    tmp_path: Path,
    disable_tqdm: bool,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
) -> None:
    trainer = make_trainer(make_base(), tmp_path, disable_tqdm=disable_tqdm, logging_steps=2, save_strategy="no")
    RunProgress().attach(trainer)
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not kinds & {ProgressCallback, PrinterCallback}
    with caplog.at_level(logging.INFO, "pliant.training"):
        trainer.train()
    steps = [message.split(" of ")[0] for message in caplog.messages]
    assert steps == ["step 2", "step 3", "step 4", "step 6", "step 6", "step 6"]
    assert capfd.readouterr().out == ""


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    make_base: Callable, tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    stop = StopSignals()
    trainer = make_trainer(make_base(), tmp_path, stop, SendSignal(number, 3), save_strategy="no", max_steps=5)
    trainer.train()
    assert stop.received is number
    assert trainer.state.global_step == 3
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert caplog.messages.count(f"received {number.name}: saving after this step, then stopping") == 1


def test_a_second_ctrl_c_interrupts_and_sigterm_does_not(arguments: TrainingArguments) -> None:
    stop, control = StopSignals(), TrainerControl()
    stop.on_train_begin(arguments, state_at(0), control)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert stop.received is signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.on_step_end(arguments, state_at(1), control).should_save
    stop.on_train_end(arguments, state_at(1), control)
    stop.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_signal_nothing_is_asked_for(arguments: TrainingArguments) -> None:
    stop, control = StopSignals(), TrainerControl()
    stop.on_train_begin(arguments, state_at(0), control)
    stop.on_step_end(arguments, state_at(1), control)
    assert not control.should_save
    assert not control.should_training_stop
    control.should_log = True
    assert stop.on_epoch_end(arguments, state_at(1), control).should_log
    assert stop.received is None
    stop.on_train_end(arguments, state_at(1), control)


def test_ignored_signals_stay_ignored(arguments: TrainingArguments) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = StopSignals()
        stop.on_train_begin(arguments, state_at(0), TrainerControl())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop._receive
        stop.on_train_end(arguments, state_at(0), TrainerControl())
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_installs_nothing(arguments: TrainingArguments) -> None:
    stop = StopSignals()
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop.on_train_begin, args=(arguments, state_at(0), TrainerControl()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    stop.restore()


def test_a_stop_closes_a_whole_epoch_only(arguments: TrainingArguments) -> None:
    stop, control = StopSignals(), TrainerControl()
    stop.received = signal.SIGTERM
    stop.on_step_end(arguments, state_at(7), control)
    for step, closes in ((7, False), (20, True)):
        control.should_log = control.should_evaluate = control.should_save = True
        stop.on_epoch_end(arguments, state_at(step), control)
        assert (control.should_log, control.should_evaluate, control.should_save) == (closes,) * 3


TWO_PROCESSES = """
    import sys, signal, types
    import torch
    from torch import distributed
    from transformers import TrainerControl
    from pliant.training.callbacks import StopSignals

    rank = int(sys.argv[1])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    args, stop = types.SimpleNamespace(device=torch.device("cpu")), StopSignals()
    for step in (1, 2, 3):
        control = TrainerControl()
        if step == 2 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        if step == 1:
            stop.on_train_begin(args, None, control)
        stop.on_step_end(args, None, control)
        if control.should_training_stop:
            break
    stop.restore()
    print("stopped", step, control.should_save, stop.received.name)
    distributed.destroy_process_group()
"""


def test_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert outputs == ["stopped 2 True SIGTERM\n"] * 2


# --- samples


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("wrapping", ["none", "peft", "checkpointing"])
def test_samples_are_the_greedy_continuations(
    make_converted: Callable,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint_activations: Callable,
    arguments: TrainingArguments,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrapping: str,
) -> None:
    model = bare = make_converted("keyed").train()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=7, repetition_penalty=1.3)
    model.config.use_cache = False
    if wrapping == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.full_like(parameter, 0.3))
    if wrapping == "checkpointing":
        checkpoint_activations(model)
    bare.model.layers[1].eval()
    prompts = {"5 6 7": torch.tensor([[5, 6, 7]]), "9": torch.tensor([[9]])}
    samples = GenerationSamples(list(prompts), tokenizer, tmp_path / "samples.jsonl", max_new_tokens=4)
    before, random_state = modes(model), torch.get_rng_state()
    samples.on_train_begin(arguments, state_at(0), TrainerControl(), model=model)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # as when two data sets are evaluated
            samples.on_evaluate(arguments, state_at(2), TrainerControl(), model=model)
    samples.on_evaluate(arguments, state_at(3, is_main=False), TrainerControl(), model=model)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()
    expected = []
    for prompt, ids in prompts.items():
        start = ids.shape[1]
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        text = tokenizer.decode(ids[0, start:].tolist(), skip_special_tokens=True)
        expected.append({"step": 2, "prompt": prompt, "continuation": text})
    assert records(tmp_path / "samples.jsonl") == expected
    messages = [f"step 2, sample: {line['prompt']!r} → {line['continuation']!r}" for line in expected]
    assert caplog.messages == messages


def test_samples_refuse_prompts_that_do_not_fit(
    make_base: Callable, tokenizer: PreTrainedTokenizerFast, arguments: TrainingArguments, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"training\.sample_prompts must have at least one token each; got ''"):
        GenerationSamples([""], tokenizer, tmp_path / "samples.jsonl")
    samples = GenerationSamples(["5 " * 61], tokenizer, tmp_path / "samples.jsonl", max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"at most 60 tokens.* has 61\. Shorten it"):
        samples.on_train_begin(arguments, state_at(0), TrainerControl(), model=make_base())


def test_samples_are_left_out_where_weights_are_sharded(
    make_base: Callable,
    tokenizer: PreTrainedTokenizerFast,
    arguments: TrainingArguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("pliant.training.callbacks.samples.is_initialized", lambda: True)
    monkeypatch.setattr("pliant.training.callbacks.samples.AcceleratorState", lambda: state)
    samples = GenerationSamples(["5"], tokenizer, tmp_path / "samples.jsonl")
    samples.on_evaluate(arguments, state_at(1), TrainerControl(), model=make_base())
    assert caplog.messages == ["samples are left out: the weights are sharded over the processes"]
    assert not (tmp_path / "samples.jsonl").exists()


def test_no_prompts_no_file(
    make_base: Callable, tokenizer: PreTrainedTokenizerFast, arguments: TrainingArguments, tmp_path: Path
) -> None:
    samples = GenerationSamples([], tokenizer, tmp_path / "samples.jsonl")
    samples.on_train_begin(arguments, state_at(0), TrainerControl(), model=make_base())
    samples.on_evaluate(arguments, state_at(1), TrainerControl(), model=make_base())
    assert not (tmp_path / "samples.jsonl").exists()


# --- finite numbers


def checkpoint_folder(folder: Path, step: int, state: str | None = '{"global_step": 1}') -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_the_last_checkpoint_is_the_highest_complete_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "missing") is None
    assert last_checkpoint(tmp_path) is None
    checkpoint_folder(tmp_path, 9)
    good = checkpoint_folder(tmp_path, 10)
    checkpoint_folder(tmp_path, 12, state=None)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == good


def test_the_guard_names_step_rows_checkpoint_and_remedy(tmp_path: Path) -> None:
    guard = FiniteGuard(tmp_path)
    guard.check_loss(torch.tensor(1.0), [1, 2], 4)
    guard.check_gradients(1.0, [1, 2], 4)
    with pytest.raises(TrainingError) as error:
        guard.check_loss(torch.tensor(math.nan), [3, 17], 5)
    assert str(error.value) == (
        f"the loss must be finite; got nan at optimizer step 5, rows [3, 17]; there is no complete checkpoint in "
        f"{tmp_path}. Lower training.lr or raise training.warmup_steps, or set training.mixed_precision=bf16."
    )
    good = checkpoint_folder(tmp_path, 4)
    with pytest.raises(TrainingError, match=r"the gradient norm must be finite; got inf at optimizer step 6") as error:
        guard.check_gradients(torch.tensor(math.inf), list(range(40)), 6)
    assert f"the last good checkpoint is {good}." in str(error.value)
    assert "30, 31 and 8 more]" in str(error.value)
    with pytest.raises(TrainingError) as error:
        FiniteGuard(tmp_path, mixed_precision="bf16").check_loss(torch.tensor([1.0, -math.inf]), [], 5)
    assert str(error.value).endswith("Lower training.lr or raise training.warmup_steps.")


def test_fp16_may_skip_steps_until_its_scale_fits(tmp_path: Path) -> None:
    guard = FiniteGuard(tmp_path, mixed_precision="fp16")
    for step in range(1, 33):
        guard.check_gradients(math.inf, [0], step)
    guard.check_gradients(1.0, [0], 33)
    for step in range(34, 66):
        guard.check_gradients(math.inf, [0], step)
    with pytest.raises(TrainingError, match="optimizer step 66"):
        guard.check_gradients(math.inf, [0], 66)
    with pytest.raises(TrainingError, match="the loss must be finite"):
        guard.check_loss(torch.tensor(math.nan), [0], 67)


# --- norms


def test_modulation_norms_are_means_over_tokens(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("v1", layers=[0, 2]).train()
    model.model.layers[1].eval()
    before, random_state = modes(model), torch.get_rng_state()
    norms = modulation_norms(model, prompt)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    model.eval()
    with torch.no_grad(), model.report() as report:
        model(prompt)
    expected = {f"modulation_norm/layer_{i}": norm.mean().item() for i, norm in report.norms().items()}
    expected["modulation_norm/mean"] = sum(expected.values()) / 2
    assert list(norms) == ["modulation_norm/layer_0", "modulation_norm/layer_2", "modulation_norm/mean"]
    assert norms == pytest.approx(expected, rel=1e-5)
    assert norms["modulation_norm/mean"] > 0


def test_modulation_norms_under_peft(make_converted: Callable, prompt: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = make_converted("keyed")
    expected = modulation_norms(model, prompt)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["plastic"], task_type="CAUSAL_LM")
    assert modulation_norms(peft.get_peft_model(model, config), prompt) == pytest.approx(expected, rel=1e-5)


def test_modulation_norms_of_a_wrapped_model(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("keyed")
    assert modulation_norms(nn.DataParallel(model), prompt) == modulation_norms(model, prompt)


def test_modulation_norms_without_dynamic_layers(make_base: Callable, make_converted: Callable, prompt: Tensor) -> None:
    assert modulation_norms(make_base(), prompt) == {}
    with make_converted("keyed").base_mode() as model:
        assert modulation_norms(model, prompt) == {}
