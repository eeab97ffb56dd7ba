"""A plan counts exactly, estimates memory line by line, and refuses what is known to fail."""

import os
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

import pliant
from pliant.architectures import NptConfig
from pliant.config import RunConfig, TrainingConfig
from pliant.config.composition import compose
from pliant.errors import CheckpointError, ConfigError, PliantError
from pliant.models import FAMILIES, PliantSpec
from pliant.models.graft import with_spec
from pliant.training import estimate, plan
from pliant.training.build import adapter_config
from pliant.training.plan import make_plan

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TRAINED = ["training.objective=causal_lm", "training.trainable=all"]
SCRATCH = ["model_type=dense", "model.init=scratch", *TRAINED]
OFFLINE = "not checked (offline)"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A CPU that cannot reach the hub, in an empty folder; data are looked at by their own tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "compute_device_type", lambda: "cpu")
    for module in (plan, estimate):
        monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("pliant.data.check_data", lambda *_, **__: [])


@pytest.fixture
def base(tmp_path):
    """A folder with the configuration of a tiny base."""
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "base")
    return "base"


@pytest.fixture
def converted(tmp_path):
    """A folder with the configuration of that base with one layer converted."""
    spec = PliantSpec(architecture="npt", layers={1: NptConfig.preset("v2", rank=5)})
    with_spec(LlamaConfig(**SHAPE), FAMILIES["llama"].config, spec).save_pretrained(tmp_path / "converted")
    return "converted"


def planned(*overrides: str, name: str = "base") -> plan.Plan:
    return make_plan(compose(name, overrides))


def line(made: plan.Plan, what: str) -> estimate.MemoryLine:
    return next(line for line in made.memory if line.what == what)


@pytest.mark.parametrize(
    ("overrides", "form", "options", "layers"),
    [
        (["model.preset=v2", "model.adapter_rank=5"], "v2", {"rank": 5}, "all"),
        (["model.preset=keyed", "model.adapter_rank=7", "model.layers=1-2"], "keyed", {"rank": 7}, "1-2"),
        (
            ["model.preset=outer", "model.adapter_rank=4", "model.num_updates=2"],
            "outer",
            {"rank": 4, "num_updates": 2},
            "all",
        ),
    ],
)
def test_counts_are_those_of_the_conversion(base, make_base, calibration, overrides, form, options, layers):
    model = make_base(**{**SHAPE, "attention_bias": False})
    pliant.convert(model, NptConfig.preset(form, **options), layers=layers, calibration=calibration)
    added = sum(parameter.numel() for _, parameter in model.dynamic_parameters())
    made = planned(f"model.base_model_name={base}", *overrides)
    assert made.model.parameters == model.num_parameters()
    assert made.model.trainable == added
    assert sorted(made.model.layers) == sorted(model.spec.layers)
    assert not made.model.is_upper_bound


def test_a_map_gives_layers_different_forms(base):
    made = planned(f"model.base_model_name={base}", "model.layers={0: v2, 1-2: keyed:9}")
    assert [(i, form.form, form.rank) for i, form in made.model.layers.items()] == [
        (0, "v2", 16),
        (1, "keyed", 9),
        (2, "keyed", 9),
    ]


def test_automatic_ranks_give_an_upper_bound(base):
    made, full = (planned(f"model.base_model_name={base}", f"model.adapter_rank={rank}") for rank in ("auto", 32))
    assert made.model.is_upper_bound
    assert made.model.trainable == full.model.trainable


@pytest.mark.parametrize("model_type", ["mod", "dtf", "stt"])
def test_layers_that_are_measured_at_the_start_are_counted_as_every_other_one(base, model_type):
    given = [f"model.base_model_name={base}", f"model_type={model_type}", *TRAINED]
    made, other = planned(*given, "model.layers=cheapest"), planned(*given)
    assert made.model.is_upper_bound
    assert not other.model.is_upper_bound
    assert made.model.parameters == other.model.parameters


@pytest.mark.parametrize("targets", [["q_proj"], ["gate_proj", "down_proj"]])
def test_adapters_are_counted_as_peft_makes_them(base, make_base, targets):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_base(**{**SHAPE, "attention_bias": False}),
        peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"),
    )
    made = planned(
        f"model.base_model_name={base}",
        *("model_type=dense", "training.objective=sft", "training.trainable=lora", "training.lora_rank=3"),
        f"training.lora_targets=[{','.join(targets)}]",
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert (made.model.trainable, made.model.parameters) == (trainable, total)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_other_adapters_are_counted_as_peft_makes_them(base, make_base, kind):
    peft = pytest.importorskip("peft")
    training = TrainingConfig(trainable=kind, objective="sft", lora_rank=3)
    model = peft.get_peft_model(make_base(**{**SHAPE, "attention_bias": False}), adapter_config(training))
    made = planned(
        f"model.base_model_name={base}",
        *("model_type=dense", "training.objective=sft", f"training.trainable={kind}", "training.lora_rank=3"),
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert (made.model.trainable, made.model.parameters) == (trainable, total)


def test_a_shape_stands_in_for_a_hub_id_out_of_reach():
    made = planned("model.base_model_name=Qwen/Qwen2.5-0.5B", "model.preset=v1_single")
    assert (made.model.family, made.model.num_layers, len(made.model.layers)) == ("qwen2", 24, 24)
    assert made.model.parameters - made.model.trainable == 494_032_768


def test_an_unknown_hub_id_out_of_reach_is_not_checked():
    made = planned("model.base_model_name=someone/some-model")
    assert OFFLINE in made.model.not_checked
    assert made.model.parameters is None
    assert made.memory == []


def test_fresh_weights_of_another_shape(base):
    sizes = ["model.num_hidden_layers=2", "model.hidden_size=64", "model.num_attention_heads=8"]
    made = planned(f"model.base_model_name={base}", *SCRATCH, *sizes)
    attention, mlp, norms = 2 * 64 * 64 + 2 * 64 * 16, 3 * 64 * 48, 2 * 64
    assert made.model.parameters == 2 * 97 * 64 + 2 * (attention + mlp + norms) + 64
    assert made.model.trainable == made.model.parameters


def test_from_scratch_50m_is_what_its_comment_says():
    made = planned(name="from_scratch_50m")
    assert round(made.model.parameters / 1e6) == 43
    made = planned("model.base_model_name=Qwen/Qwen2.5-0.5B", name="from_scratch_50m")
    assert round(made.model.parameters / 1e6) == 96


def test_a_checkpoint_keeps_its_layers(converted):
    made = planned(f"model.checkpoint_path={converted}", "model.preset=keyed")
    assert {index: form.form for index, form in made.model.layers.items()} == {1: "v2"}


def test_memory_lines_follow_from_the_counts(base):
    made = planned(f"model.base_model_name={base}", "model.preset=v2", "data.max_length=10", "training.batch_size=3")
    count, trainable = made.model.parameters - made.model.trainable, made.model.trainable
    assert line(made, "base weights").num_bytes == 4 * count
    assert line(made, "added weights").num_bytes == 4 * trainable
    assert line(made, "gradients").num_bytes == 4 * trainable
    assert line(made, "Adam's moments").num_bytes == 8 * trainable
    assert line(made, "activations").num_bytes == 30 * 3 * (12 * 32 + 4 * 48) * 4
    assert line(made, "logits").num_bytes == 3 * 128 * 97 * 4


def test_a_trained_base_has_a_teacher_beside_it(base):
    name = f"model.base_model_name={base}"
    made = planned(name, "training.trainable=all")
    assert line(made, "teacher").num_bytes == line(made, "base weights").num_bytes
    for others in ([], ["training.trainable=lora"], ["training.trainable=all", "training.objective=causal_lm"]):
        assert "teacher" not in [line.what for line in planned(name, *others).memory]


def test_memory_settings_act(base):
    name = f"model.base_model_name={base}"
    plain = planned(name)
    assert line(planned(name, "training.mixed_precision=bf16"), "base weights").num_bytes * 2 == (
        line(plain, "base weights").num_bytes
    )
    checkpointed = planned(name, "training.gradient_checkpointing=true")
    assert line(checkpointed, "activations").num_bytes < line(plain, "activations").num_bytes
    nf4, int8 = (line(planned(name, f"model.quantization={q}"), "base weights").num_bytes for q in ("nf4", "int8"))
    assert nf4 < int8 < line(plain, "base weights").num_bytes


def test_a_base_that_is_trained_stays_in_full_precision(base):
    for precision in ("no", "bf16"):
        made = planned(f"model.base_model_name={base}", *SCRATCH, f"training.mixed_precision={precision}")
        assert line(made, "base weights").num_bytes == 4 * made.model.parameters
        assert line(made, "base weights").how.endswith("float32")


def test_too_little_memory_is_a_warning(base, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda _: 1)
    assert any("GiB are needed" in warning for warning in planned(f"model.base_model_name={base}").warnings)


@pytest.mark.parametrize("is_fast", [True, False])
def test_bf16_where_the_processor_has_no_instructions_for_it_is_a_warning(base, monkeypatch, is_fast):
    monkeypatch.setattr(plan, "multiplies_bfloat16", lambda: is_fast)
    half, full = (
        planned(f"model.base_model_name={base}", f"training.mixed_precision={precision}")
        for precision in ("bf16", "no")
    )
    assert any("slower than fp32" in warning for warning in half.warnings) is not is_fast
    assert not any("slower than fp32" in warning for warning in full.warnings)


def test_memory_of_this_machine_is_known():
    assert plan.available_memory("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_steps_and_tokens(base, monkeypatch):
    given = [f"model.base_model_name={base}", "training.batch_size=3", "training.gradient_accumulation_steps=5"]
    assert planned(*given).steps is None
    made = planned(*given, "training.max_steps=7", "data.max_length=11")
    assert (made.steps, made.tokens_per_step) == (7, 3 * 5 * 11)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert planned(*given, "data.max_length=11").tokens_per_step == 2 * 3 * 5 * 11


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.max_steps=10", "training.warmup_steps=10"], "training.warmup_steps=10"),
        (["training.lr_multipliers.router=10"], "no such component"),
        (["training.use_regularization=true"], "closed form"),
        (["training.objective=sft", "training.stages=[layerwise]"], "training.stages"),
    ],
)
def test_what_probably_is_not_meant_is_a_warning(base, overrides, words):
    made = planned(f"model.base_model_name={base}", *overrides)
    assert any(words in warning for warning in made.warnings)
    assert not planned(f"model.base_model_name={base}").warnings


def test_a_recipe_gives_way_to_the_checkpoint_with_a_warning(converted):
    given = [f"model.checkpoint_path={converted}", "training.objective=sft"]
    (warning,) = planned(*given, name="debug_sft").warnings
    assert "model.preset and model.adapter_rank are those of the checkpoint" in warning
    assert "model.preset=v1 and model.adapter_rank=8" in warning
    assert not planned(*given).warnings
    assert not planned(*given, "model.preset=v2", "model.adapter_rank=5").warnings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.adapter_rank=33"], ("model.adapter_rank", "1..32", "33")),
        (["model.layers={0-1: v2, 2: keyed:40}"], ("model.adapter_rank", "40", "layer 2")),
        (["model.layers=2-5"], ("model.layers", "0..2")),
        (["model.layers=[3]"], ("model.layers", "0..2")),
        (["model.layers=upper"], ("model.layers", "upper_half")),
        (["model.layers={0-1: v2, 1: keyed}"], ("model.layers", "layer 1")),
        (["model.layers=1.5"], ("model.layers", "1.5")),
        ([*SCRATCH, "model_type=mod", "model.layers=cheapest"], ("model.layers=cheapest", "pretrained", "alternate")),
        (["model.calibration=nothing.txt"], ("model.calibration", "nothing.txt")),
        ([*SCRATCH, "model.hidden_size=33"], ("model.hidden_size", "33")),
        ([*SCRATCH, "model.num_attention_heads=3"], ("num_attention_heads", "3")),
        ([*SCRATCH, "model.num_key_value_heads=3"], ("model.num_attention_heads", "3")),
        (["model.quantization=int8", "model.preset=keyed_pre"], ("model.quantization=int8", "keyed_pre")),
        (["training.mixed_precision=fp16"], ("training.mixed_precision=fp16", "bf16")),
        (
            ["training.use_flash_attention=true", "training.mixed_precision=bf16"],
            ("training.use_flash_attention", "NVIDIA"),
        ),
        (
            ["model_type=dense", "training.objective=sft", "training.trainable=lora", "training.lora_targets=[query]"],
            ("training.lora_targets", "query", "q_proj"),
        ),
    ],
)
def test_what_cannot_work_is_refused(base, overrides, words):
    with pytest.raises(ConfigError) as raised:
        planned(f"model.base_model_name={base}", *overrides)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.base_model_name=./nowhere"], ("model.base_model_name", "nowhere")),
        (["model.base_model_name=smollm2-136m"], ("smollm2-135m",)),
        (["model.base_model_name=llama-3.1-8b"], ("shape", "meta-llama/Llama-3.1-8B")),
        (["model.checkpoint_path=./nowhere"], ("model.checkpoint_path", "nowhere")),
        (["model.base_model_name=converted"], ("converted already", "model.checkpoint_path")),
        (["model.checkpoint_path=dense"], ("model_type=dense",)),
        (
            ["model.checkpoint_path=converted", "model_type=dense", "training.objective=sft", "training.trainable=all"],
            ("model_type=npt",),
        ),
        (["model.base_model_name=gpt2"], ("model.base_model_name", "llama")),
        (["model.base_model_name=damaged"], ("model.base_model_name", "damaged")),
        (
            ["model.base_model_name=dense", "model.preset=v2", "model.calibration=text.txt"],
            ("model.calibration", "keyed"),
        ),
    ],
)
def test_what_cannot_be_read_or_converted_is_refused(converted, tmp_path, overrides, words):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "dense")
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{", encoding="utf-8")
    (tmp_path / "text.txt").write_text("words", encoding="utf-8")
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        planned(*overrides)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("override", "package"),
    [
        ("model.quantization=nf4", "bitsandbytes"),
        ("training.trainable=lora", "peft"),
        ("training.trainable=ia3", "peft"),
        ("training.report_to=[wandb]", "wandb"),
        ("training.report_to=[tensorboard]", "tensorboard"),
    ],
)
def test_a_missing_package_is_named(base, monkeypatch, override, package):
    monkeypatch.setattr(plan, "is_installed", lambda name: name != package)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        planned(f"model.base_model_name={base}", override)


def make_run(folder: Path, *, with_checkpoint: bool) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text("", encoding="utf-8")
    if with_checkpoint:
        (folder / "checkpoint-20").mkdir()
        (folder / "checkpoint-20/trainer_state.json").write_text("{}", encoding="utf-8")


def test_the_output_folder_is_described(base, tmp_path):
    given = [f"model.base_model_name={base}", "training.output_dir=out/a"]
    assert planned(*given).output == "will be made"
    assert not (tmp_path / "out").exists()
    (tmp_path / "out/a").mkdir(parents=True)
    assert planned(*given).output == "exists, empty"


def test_a_run_goes_on_only_when_asked(base, tmp_path, monkeypatch):
    make_run(tmp_path / "run", with_checkpoint=True)
    given = [f"model.base_model_name={base}", "training.output_dir=run"]
    with pytest.raises(ConfigError, match="--resume"):
        planned(*given)
    assert planned(*given, "training.resume=true").output == "holds a run; goes on from checkpoint-20"
    monkeypatch.setenv("RANK", "1")  # the first process may have begun to fill it
    assert "first process" in planned(*given).output


def test_a_run_without_a_checkpoint_begins_anew(base, tmp_path):
    make_run(tmp_path / "run", with_checkpoint=False)
    assert (
        "begins anew"
        in planned(f"model.base_model_name={base}", "training.output_dir=run", "training.resume=true").output
    )


@pytest.mark.parametrize("resume", ["false", "true"])
@pytest.mark.parametrize("kind", ["file", "below a file", "something else", "not writable"])
def test_an_output_folder_that_cannot_be_used_is_refused(base, tmp_path, monkeypatch, kind, resume):
    target = tmp_path / "out"
    if kind == "something else":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work", encoding="utf-8")
    elif kind == "not writable":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        target.write_text("", encoding="utf-8")
        target = target / "deeper" if kind == "below a file" else target
    with pytest.raises(ConfigError, match=r"training\.output_dir"):
        planned(f"model.base_model_name={base}", f"training.output_dir={target}", f"training.resume={resume}")


@pytest.mark.parametrize(("objective", "kind"), [("equivalence", "text"), ("causal_lm", "text"), ("sft", "chat")])
def test_data_are_checked_for_the_objective(base, monkeypatch, objective, kind):
    asked = []
    monkeypatch.setattr("pliant.data.check_data", lambda config, *, kind: asked.append((config, kind)) or ["checked"])
    config = compose(overrides=[f"model.base_model_name={base}", f"training.objective={objective}"])
    assert make_plan(config).data == ["checked"]
    assert asked == [(config.data, kind)]


def test_conversations_are_not_taken_from_text(base, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Only words.\n" * 50, encoding="utf-8")
    with pytest.raises(PliantError, match=r"text\.txt"):
        planned(f"model.base_model_name={base}", "training.objective=sft", "data.dataset_name=text.txt")


def test_the_hub_is_not_asked_again_when_it_is_out_of_reach(base, monkeypatch):
    from huggingface_hub import constants

    before, seen = constants.HF_HUB_OFFLINE, []
    monkeypatch.setattr("pliant.data.check_data", lambda *_, **__: seen.append(constants.HF_HUB_OFFLINE) or [])
    planned(f"model.base_model_name={base}", "data.dataset_name=someone/texts")
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is before


def test_offline_mode_is_out_of_reach(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not estimate.hub_is_reachable()


def test_nothing_is_written(base, tmp_path):
    make_plan(RunConfig())
    assert [path.name for path in tmp_path.iterdir()] == [base]
