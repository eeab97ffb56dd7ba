"""Recipes, files of the user's and overrides compose to a checked configuration; what is wrong is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from pliant.config import RunConfig
from pliant.config.composition import compose, jobs, nearest_key, recipes, schema_keys, to_yaml
from pliant.errors import ConfigError

MINE = """
model_type: "npt"
model:
  base_model_name: "Qwen/Qwen2.5-0.5B"
  preset: v2
data:
  dataset_name: "wikitext"
training:
  lr: 5e-4
  mixed_precision: no
  lr_multipliers:
    router: 10.0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_base_says_what_the_dataclasses_say():
    assert compose() == RunConfig()


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_composes_and_survives_a_file(folder, name):
    config = compose(name)
    write(folder / "again.yaml", to_yaml(config))
    assert compose("again.yaml") == config


def test_recipes_say_what_they_are_for():
    readme, guide, plan = (compose(name) for name in ("readme", "guide", "plan"))
    assert (readme.model.preset, readme.model.adapter_rank, readme.training.regularization_lambda) == (
        "v1_single",
        16,
        0.01,
    )
    assert (guide.model.preset, guide.model.modulation_type, guide.training.kl_weight) == ("v2", "both", 0.0)
    assert (guide.training.hidden_loss, guide.training.hidden_weight) == ("mse", 1.0)
    assert (plan.model.preset, plan.model.adapter_rank, plan.model.num_updates, plan.training.lr) == (
        "outer",
        64,
        1,
        1e-4,
    )
    lora, finetune = compose("lora_baseline"), compose("npt_finetune")
    assert lora.data == finetune.data
    assert lora.training.lora_rank == finetune.model.adapter_rank


@pytest.mark.parametrize("name", [name for name in recipes() if name != "base"])
def test_recipes_write_into_folders_of_their_own(name):
    folders = [compose(other).training.output_dir for other in recipes()]
    assert folders.count(compose(name).training.output_dir) == 1


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("model.layers=8-15", "model", "layers", "8-15"),
        ("model.layers=[0,4]", "model", "layers", [0, 4]),
        ("model.layers={0-9: v1_single, 10-29: v2}", "model", "layers", {"0-9": "v1_single", "10-29": "v2"}),
        ("model.adapter_rank=auto", "model", "adapter_rank", "auto"),
        ("model.base_model_name=Qwen/Qwen2.5-0.5B", "model", "base_model_name", "Qwen/Qwen2.5-0.5B"),
        ("training.mixed_precision=no", "training", "mixed_precision", "no"),
        ("training.lr=5e-4", "training", "lr", 5e-4),
        ("training.max_steps=null", "training", "max_steps", None),
        ("training.report_to=[wandb]", "training", "report_to", ["wandb"]),
        ('training.sample_prompts=["a, b"]', "training", "sample_prompts", ["a, b"]),
        ("training.output_dir=./a b/c", "training", "output_dir", "./a b/c"),
        ("training.output_dir=outputs/lr-${training.lr}", "training", "output_dir", "outputs/lr-0.0003"),
    ],
)
def test_overrides_arrive(override, section, field, value):
    assert getattr(getattr(compose(overrides=[override]), section), field) == value


def test_a_map_beside_the_rank_of_a_recipe_needs_it_unset():
    layers = "model.layers={0-9: v2, 10-29: keyed:192}"
    with pytest.raises(ConfigError, match=r"model\.adapter_rank=128\. Set model\.adapter_rank=null"):
        compose("npt_equivalence", [layers])
    assert compose("npt_equivalence", [layers, "model.adapter_rank=null"]).model.adapter_rank is None


@pytest.mark.parametrize("name", ["npt_finetune", "debug_sft", "readme", "npt_equivalence"])
def test_recipes_go_on_from_a_checkpoint(name):
    assert compose(name, ["model.checkpoint_path=outputs/run/checkpoint-best"]).model.checkpoint_path is not None


def test_two_weights_of_a_mixture():
    overrides = ["data.mixed=true", 'data.dataset_names=["wikitext","c4"]', "data.dataset_weights=[0.3,0.7]"]
    assert compose(overrides=overrides).data.dataset_weights == [0.3, 0.7]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate=1", ("training.learning_rate", "training.lr?")),
        ("training.learn=1", ("training.learn",)),
        ("model.rank=3", ("model.rank", "model.adapter_rank")),
        ("adapter_rank=3", ("adapter_rank", "model.adapter_rank")),
        ("model.base_model=x", ("model.base_model", "model.base_model_name")),
        ("training.lr_multipliers.routr=1", ("training.lr_multipliers.router",)),
        ("+training.foo_steps=1", ("training.foo_steps", "Did you mean training.")),
        ("zzz=1", ("zzz", "--cfg job")),
        ("data={dataset_nam: x}", ("data.dataset_nam", "data.dataset_name")),
        ("model=3", ("model", "section")),
        ("model.capacity_gamma=0.5", ("model.capacity_gamma", "model_type mod, dtf or stt", "null")),
        ("model.capacity_gama=0.5", ("model.capacity_gama", "model.capacity_gamma?")),
        ("model.consolidation_alpha=0.1", ("must be left out of training", "pliant consolidate --alpha")),
        ("model_type=dft", ("model_type", "'dft'", "dtf")),
        ("training.lr=abc", ("training.lr", "a number", "abc")),
        ("training.lr=null", ("training.lr", "a number")),
        ("training.batch_size=1.5", ("training.batch_size", "an integer", "1.5")),
        ("training.resume=maybe", ("training.resume", "true or false", "maybe")),
        ("training.report_to=wandb", ("training.report_to", "a list")),
        ("data.dataset_weights=[a]", ("data.dataset_weights", "a")),
        ("training.output_dir=${nothing}", ("training.output_dir", "nothing")),
        ("training.lr=1e-3,1e-4", ("training.lr", "--multirun")),
        ("training.lr", ("key=value", "'training.lr'")),
        ("training.output_dir='x", ("key=value",)),
        ("~training.lr", ("training.lr", "null")),
        ("hydra.nothing=1", ("hydra.nothing",)),
        ("training.batch_size=0", ("training.batch_size", "at least 1")),
        ("model.preset=v9", ("preset", "v9")),
        ("data.mixed=true", ("data.dataset_weights",)),
        ("training.early_stopping_patience=3", ("training.eval_steps",)),
        ("training.use_flash_attention=true", ("training.mixed_precision=bf16",)),
    ],
)
def test_what_is_wrong_in_an_override_is_named(override, words):
    with pytest.raises(ConfigError) as raised:
        compose(overrides=[override])
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_options_of_routed_depth_arrive():
    options = {"capacity_gamma": 0.25, "beta_ce_init": -0.5, "beta_cu_init": -0.75, "prior_loss_weight": 0.1}
    config = compose("base", ["model_type=dtf", *(f"model.{name}={value}" for name, value in options.items())])
    assert config.model_type == "dtf"
    assert config.is_routed
    assert config != compose("base", ["model_type=dtf"])
    assert {name: getattr(config.model, name) for name in options} == options
    layer = config.model.routed("dtf")
    assert {name: getattr(layer, name) for name in options} == options


@pytest.mark.parametrize(
    ("model_type", "settled"),
    [("dtf", "dtf"), ("sdt", "dtf"), ("mod", "mod"), ("stt", "stt")],
)
def test_routed_architectures_compose(model_type, settled):
    config = compose("base", [f"model_type={model_type}", "model.capacity_gamma=0.5"])
    assert (config.model_type, config.is_routed, config.model.capacity_gamma) == (settled, True, 0.5)
    assert not compose("base").is_routed


def test_a_file_with_routed_depth_resolves(folder):
    write(folder / "mine.yaml", "model_type: dtf\nmodel:\n  capacity_gamma: 0.5\n  beta_ce_init: -0.3\n")
    model = compose("mine").model
    assert (model.capacity_gamma, model.beta_ce_init, model.beta_cu_init) == (0.5, -0.3, None)


def test_recipes_of_routed_depth_say_what_they_are_for():
    attention, scratch = compose("mod_attention"), compose("mod_scratch")
    assert (attention.model.granularity, attention.model.capacity_gamma) == ("attention", 0.75)
    assert (scratch.model.capacity_gamma, scratch.model.gate, scratch.model.gate_share) == (0.125, "raw", 1.0)
    for name in ("dtf_transfer", "dtf_scratch", "stt_transfer"):
        config = compose(name)
        assert (config.model_type, config.model.capacity_gamma) == (name.partition("_")[0], 0.5)
        assert (config.training.lr_multipliers.router, config.training.lr_multipliers.prior) == (10.0, 10.0)
    for name in ("mod_attention", "dtf_transfer", "stt_transfer"):
        assert (compose(name).training.objective, compose(name).training.trainable) == ("equivalence", "all")
        assert compose(name).model.layers == "cheapest"


def test_the_nearest_key_is_a_key():
    assert all(nearest_key(key) == key for key in schema_keys() if key.count(".") == 1 and "lr_m" not in key)
    assert nearest_key("use_wandb") == "training.report_to"


@pytest.mark.parametrize(
    ("place", "name", "config_dir"),
    [
        ("config/mine.yaml", "mine", None),
        ("mine.yaml", "mine", None),
        ("config/mine.yml", "mine", None),
        ("else where/mine.yaml", "mine", "else where"),
        ("else/mine.yaml", "else/mine.yaml", None),
        ("else/mine.yaml", "mine.yaml", "else"),
        ("else/base.yaml", "base", "else"),
        ("else/readme.yaml", "readme", "else"),
    ],
)
def test_a_file_of_the_users_goes_over_base(folder, place, name, config_dir):
    write(folder / place, MINE)
    config = compose(name, ["training.seed=3"], None if config_dir is None else Path(config_dir))
    assert (config.model.base_model_name, config.model.preset) == ("Qwen/Qwen2.5-0.5B", "v2")
    assert (config.training.lr, config.training.lr_multipliers.router, config.training.seed) == (5e-4, 10.0, 3)
    assert config.training.mixed_precision == "no"
    assert config.training.log_steps == RunConfig().training.log_steps


def test_a_file_may_build_on_a_recipe_or_on_another_file(folder):
    write(folder / "config/small.yaml", "training:\n  batch_size: 2\n")
    write(folder / "config/mine.yaml", "defaults: [guide, small, _self_]\ntraining:\n  seed: 5\n")
    config = compose("mine")
    assert (config.model.preset, config.training.batch_size, config.training.seed) == ("v2", 2, 5)


def test_a_folder_of_the_users_does_not_hide_recipes(folder):
    write(folder / "else/mine.yaml", MINE)
    assert compose("guide", config_dir=Path("else")) == compose("guide")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  learning_rate: 1\n", ("mine.yaml", "training.learning_rate", "training.lr")),
        ("modl:\n  preset: v2\n", ("mine.yaml", "modl")),
        ("model:\n  capacity_gamma: 0.5\n", ("model.capacity_gamma", "model_type mod, dtf or stt", "null")),
        ("model:\n  capacity_gama: 0.5\n", ("mine.yaml", "model.capacity_gama", "model.capacity_gamma")),
        ("training:\n  lr: high\n", ("training.lr", "a number", "high")),
        ("training:\n  batch_size: 0\n", ("training.batch_size", "at least 1")),
        ("training: [\n", ("mine.yaml", "YAML")),
        ("- a\n- b\n", ("mine.yaml", "sections")),
        ("just words", ("mine.yaml",)),
        ("training: 3\n", ("mine.yaml", "training", "section")),
        ("defaults: [nothing]\n", ("nothing",)),
        ("defaults: [other, _self_]\n", ("training.learning_rate",)),
    ],
)
def test_what_is_wrong_in_a_file_is_named(folder, text, words):
    write(folder / "mine.yaml", text)
    write(folder / "other.yaml", "training:\n  learning_rate: 1\n")
    with pytest.raises(ConfigError) as raised:
        compose("mine")
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("name", "config_dir", "words"),
    [
        ("readm", None, ("readm", "'readme'", "npt_equivalence")),
        ("my_trainin", "config", ("'my_training'", "config")),
        ("no/such.yaml", None, ("no/such.yaml", "does not exist")),
        ("readme", "nowhere", ("--config-dir", "nowhere")),
        ("guide", None, ("--config-dir config",)),
    ],
)
def test_an_unknown_recipe_is_named_with_the_nearest(folder, name, config_dir, words):
    write(folder / "config/my_training.yaml", MINE)
    write(folder / "config/guide.yaml", MINE)
    with pytest.raises(ConfigError) as raised:
        compose(name, config_dir=None if config_dir is None else Path(config_dir))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_nothing_of_hydra_is_left_behind(folder):
    write(folder / "mine.yaml", MINE)
    before = set(ConfigStore.instance().repo)
    compose("mine")
    with pytest.raises(ConfigError):
        compose("mine", ["training.lr=x"])
    assert not GlobalHydra.instance().is_initialized()
    assert set(ConfigStore.instance().repo) - before <= {"schema.yaml"}
    assert sorted(path.name for path in folder.iterdir()) == ["mine.yaml"]


def test_a_sweep_becomes_jobs():
    assert jobs(["training.lr=1e-3,1e-4", "model.adapter_rank=64,128", "training.seed=1"]) == [
        [f"training.lr={lr}", f"model.adapter_rank={rank}", "training.seed=1"]
        for lr in ("0.001", "0.0001")
        for rank in (64, 128)
    ]
    assert jobs([]) == [[]]


def test_a_sweep_over_an_interval_is_refused():
    with pytest.raises(ConfigError, match="INTERVAL"):
        jobs(["training.lr=interval(0,1)"])


def test_recipes_are_found_from_any_folder(folder):
    """As from an installed wheel: only the package is looked at, no checkout."""
    write(folder / "config/my_training.yaml", MINE)
    calls = "compose('my_training').model.preset, compose('plan').model.preset"
    program = f"from pliant.config.composition import compose; print({calls})"
    command = [sys.executable, "-W", "error", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "v2 outer\n"), finished.stderr
