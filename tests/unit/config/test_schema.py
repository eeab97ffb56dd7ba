"""Each section refuses a value outside its rule, and names the field, the value and the remedy."""

import pytest

from pliant.config import DataConfig, LrMultipliers, ModelConfig, RunConfig, TrainingConfig
from pliant.errors import ConfigError

SCRATCH = {"init": "scratch"}
DENSE = {"objective": "causal_lm", "trainable": "all"}
MAP = {"layers": {"0-9": "v2", "10-29": "keyed:192"}}
CHECKPOINT = {"checkpoint_path": "outputs/run/checkpoint-best"}
FORM_OPTIONS = {
    "energy": 0.9,
    "allocation": "sensitivity",
    "tied": True,
    "modulation_type": "additive",
    "targets": "gate_up",
    "num_updates": 2,
    "regulariser": "effect",
}
"""Options of a form, each with a value that is not its default."""


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        (ModelConfig, {"init": "random"}, ("model.init", "pretrained, scratch", "'random'")),
        (ModelConfig, {"dtype": "fp16"}, ("model.dtype", "float16", "'fp16'")),
        (ModelConfig, {"quantization": "nf5"}, ("model.quantization", "'nf4'")),
        (ModelConfig, {"calibration_tokens": 0}, ("model.calibration_tokens", "at least 1", "0")),
        (ModelConfig, {"hidden_size": 512}, ("model.hidden_size", "model.init=scratch", "512")),
        (ModelConfig, {**SCRATCH, "num_hidden_layers": 0}, ("model.num_hidden_layers", "at least 1")),
        (ModelConfig, {**SCRATCH, "checkpoint_path": "x"}, ("model.checkpoint_path", "Drop one")),
        (ModelConfig, {**SCRATCH, "quantization": "nf4"}, ("model.quantization=nf4", "none")),
        (DataConfig, {"max_length": 1}, ("data.max_length", "at least 2")),
        (DataConfig, {"num_workers": -1}, ("data.num_workers", "at least 0", "-1")),
        (DataConfig, {"validation_fraction": 1.0}, ("data.validation_fraction", "(0, 1)", "0.05")),
        (DataConfig, {"dataset_names": ["a"]}, ("data.mixed=true",)),
        (DataConfig, {"mixed": True, "dataset_names": ["a"], "dataset_weights": [0.5, 0.5]}, ("one weight for each",)),
        (DataConfig, {"mixed": True, "dataset_names": ["a"], "dataset_weights": [0.5]}, ("sum to 1", "0.5")),
        (
            DataConfig,
            {"mixed": True, "dataset_names": ["a", "b"], "dataset_weights": [1.5, -0.5]},
            ("data.dataset_weights", "above 0"),
        ),
        (
            DataConfig,
            {"mixed": True, "dataset_names": ["a", "a"], "dataset_weights": [0.5, 0.5]},
            ("data.dataset_names", "once"),
        ),
        (LrMultipliers, {"router": -1.0}, ("training.lr_multipliers.router", "at least 0")),
        (TrainingConfig, {"objective": "equivalenc"}, ("training.objective", "'equivalence'")),
        (TrainingConfig, {"batch_size": 0}, ("training.batch_size", "at least 1")),
        (TrainingConfig, {"lr": 0.0}, ("training.lr", "above 0")),
        (TrainingConfig, {"lr": float("nan")}, ("training.lr", "above 0")),
        (TrainingConfig, {"layerwise_fraction": 1.0}, ("training.layerwise_fraction", "training.stages")),
        (TrainingConfig, {"report_to": ["wandbb"]}, ("training.report_to", "'wandb'")),
        (TrainingConfig, {"kl_weight": 0.0, "hidden_weight": 0.0}, ("training.kl_weight", "training.hidden_weight")),
        (TrainingConfig, {"stages": ["end_to_end", "layerwise"]}, ("training.stages", "[layerwise,end_to_end]")),
        (TrainingConfig, {"stages": "layerwise"}, ("training.stages", "'layerwise'")),
        (
            TrainingConfig,
            {"stages": ["layerwise", "end_to_end"], "max_steps": 1},
            ("training.stages=[layerwise,end_to_end]", "training.max_steps must be at least 2", "got 1", "one stage"),
        ),
        (TrainingConfig, {"lora_dropout": 1.0}, ("training.lora_dropout", "[0, 1)", "1.0")),
        (TrainingConfig, {"lora_dropout": -0.1}, ("training.lora_dropout", "[0, 1)", "-0.1")),
        (
            TrainingConfig,
            {"early_stopping_patience": 3},
            ("training.early_stopping_patience=3", "training.eval_steps=null", "Set training.eval_steps"),
        ),
        (
            ModelConfig,
            {**SCRATCH, "dtype": "bfloat16"},
            ("model.init=scratch", "model.dtype=bfloat16", "model.dtype=auto", "training.mixed_precision=bf16"),
        ),
        (ModelConfig, {**SCRATCH, "dtype": "float16"}, ("model.dtype=float16", "training.mixed_precision=fp16")),
        (
            ModelConfig,
            {**SCRATCH, "device_map": "auto"},
            ("model.device_map=auto", "model.init=scratch", "model.device_map=null"),
        ),
    ],
)
def test_a_section_refuses_what_is_outside_its_rule(section, fields, words):
    with pytest.raises(ConfigError) as raised:
        section(**fields)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "model", "training", "words"),
    [
        ("nptt", {}, {}, ("model_type", "'npt'")),
        ("npt", {"preset": "v3"}, {}, ("model", "preset")),
        ("npt", {"preset": "v1", "energy": 0.9}, {}, ("model", "energy")),
        ("npt", {"adapter_rank": 0}, {}, ("model", "1..d_model")),
        ("npt", {"preset": "v1"}, {}, ("objective=equivalence", "v1")),
        ("dense", {}, {"trainable": "all"}, ("training.objective=equivalence", "model_type=dense")),
        ("dense", {}, {"objective": "sft"}, ("training.trainable=modulation", "model_type=dense")),
        ("npt", SCRATCH, {}, ("model.init=scratch", "training.trainable=all")),
        ("npt", SCRATCH, {"trainable": "all"}, ("model.init=scratch", "causal_lm")),
        ("npt", {"quantization": "nf4"}, {"trainable": "all"}, ("training.trainable=all", "nf4")),
        ("npt", {}, {"trainable": "all", "save_delta": True}, ("training.save_delta",)),
        ("npt", {}, {"trainable": "lora", "save_delta": False}, ("training.save_delta",)),
        (
            "npt",
            {"quantization": "nf4"},
            {"save_delta": False},
            ("training.save_delta=false", "model.quantization=nf4", "Leave save_delta out"),
        ),
        (
            "dense",
            {},
            {**DENSE, "use_regularization": True},
            ("training.use_regularization=true", "dynamic layers", "model_type=dense", "use_regularization=false"),
        ),
        (
            "npt",
            {},
            {"use_flash_attention": True},
            ("training.use_flash_attention=true", "16 bit", "model.dtype=auto", "training.mixed_precision=bf16"),
        ),
        ("npt", {"dtype": "float32"}, {"use_flash_attention": True}, ("16 bit", "model.dtype=float32")),
        (
            "npt",
            {"dtype": "float16"},
            DENSE,
            ("training.trainable=all", "fp16", "model.dtype=float16", "model.dtype=auto"),
        ),
        (
            "npt",
            {"dtype": "float32"},
            {"mixed_precision": "bf16"},
            ("training.mixed_precision=bf16", "bfloat16", "model.dtype=float32", "model.dtype=auto"),
        ),
        (
            "npt",
            {"dtype": "bfloat16"},
            {"mixed_precision": "fp16", "trainable": "lora"},
            ("training.mixed_precision=fp16", "float16", "model.dtype=bfloat16"),
        ),
    ],
)
def test_a_run_refuses_sections_that_contradict_each_other(model_type, model, training, words):
    with pytest.raises(ConfigError) as raised:
        RunConfig(model_type=model_type, model=ModelConfig(**model), training=TrainingConfig(**training))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_the_defaults_are_a_run():
    config = RunConfig()
    assert config.model.npt.form == "keyed"
    assert config.model.npt.rank == "auto"
    assert config.model.sizes == {}


def test_sizes_are_those_that_are_set():
    config = ModelConfig(init="scratch", hidden_size=64, tie_word_embeddings=False)
    assert config.sizes == {"hidden_size": 64, "tie_word_embeddings": False}


def test_npt_options_become_one_layer_configuration():
    npt = ModelConfig(preset="v2", adapter_rank=7, modulation_type="additive", regulariser="effect").npt
    assert (npt.form, npt.rank, npt.modulation, npt.regulariser) == ("v2", 7, "additive", "effect")


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({}, {"use_flash_attention": True, "mixed_precision": "bf16"}),
        ({"dtype": "float16"}, {"use_flash_attention": True}),
        ({"dtype": "bfloat16"}, {"mixed_precision": "bf16"}),
        ({"dtype": "float16"}, {"mixed_precision": "fp16"}),
        ({"dtype": "float16"}, {"mixed_precision": "no"}),
        ({"dtype": "float32"}, {"mixed_precision": "bf16", **DENSE}),
        ({"dtype": "bfloat16"}, DENSE),
        ({**SCRATCH, "dtype": "float32"}, {"mixed_precision": "bf16", **DENSE}),
        ({"quantization": "nf4"}, {"save_delta": True}),
        ({}, {"save_delta": False}),
        ({}, {"lora_dropout": 0.99}),
        ({}, {"early_stopping_patience": 3, "eval_steps": 10}),
        ({}, {"stages": ["layerwise", "end_to_end"], "max_steps": 2}),
        ({}, {"stages": ["layerwise", "end_to_end"]}),
        ({}, {"stages": ["end_to_end"], "max_steps": 1}),
    ],
)
def test_a_run_takes_what_goes_together(model, training):
    RunConfig(model=ModelConfig(**model), training=TrainingConfig(**training))


@pytest.mark.parametrize(
    ("model_type", "model", "training", "words"),
    [
        ("npt", MAP, {}, ("model.layers", "each layer's form (form:rank)")),
        ("npt", CHECKPOINT, {}, ("model.checkpoint_path='outputs/run/checkpoint-best'", "converted already")),
        ("dense", {}, DENSE, ("model_type=dense", "converts nothing")),
    ],
    ids=["map", "checkpoint", "dense"],
)
@pytest.mark.parametrize("name", FORM_OPTIONS)
def test_an_option_of_a_form_is_refused_where_nothing_reads_it(model_type, model, training, words, name):
    value = FORM_OPTIONS[name]
    with pytest.raises(ConfigError) as raised:
        RunConfig(
            model_type=model_type, model=ModelConfig(**model, **{name: value}), training=TrainingConfig(**training)
        )
    unset = "false" if name == "tied" else "null"
    for word in (*words, f"got model.{name}={value}", f"Set model.{name}={unset}."):
        assert word in str(raised.value), str(raised.value)
    RunConfig(model_type=model_type, model=ModelConfig(**model), training=TrainingConfig(**training))


@pytest.mark.parametrize(
    ("model_type", "model", "training", "name", "is_refused"),
    [
        ("npt", MAP, {}, "adapter_rank", True),
        ("npt", MAP, {}, "calibration", False),
        ("npt", CHECKPOINT, {}, "adapter_rank", False),
        ("npt", CHECKPOINT, {}, "calibration", True),
        ("dense", {}, DENSE, "adapter_rank", True),
        ("dense", {}, DENSE, "calibration", True),
    ],
)
def test_rank_and_calibration_are_refused_where_no_recipe_sets_them(model_type, model, training, name, is_refused):
    value = {"adapter_rank": 16, "calibration": "text.txt"}[name]
    sections = {"model": ModelConfig(**model, **{name: value}), "training": TrainingConfig(**training)}
    if not is_refused:
        RunConfig(model_type=model_type, **sections)
        return
    with pytest.raises(ConfigError, match=rf"model\.{name}=null"):
        RunConfig(model_type=model_type, **sections)


def test_a_preset_of_a_recipe_goes_with_a_checkpoint():
    config = RunConfig(model=ModelConfig(**CHECKPOINT, preset="v2", adapter_rank=16))
    assert config.model.npt.form == "v2"
