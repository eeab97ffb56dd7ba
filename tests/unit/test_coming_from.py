"""docs/coming-from.md: every command of the original documents has one of ours that runs, every setting a row."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from pliant.architectures import NptConfig
from pliant.cli import main
from pliant.config import RunConfig
from pliant.config.composition import compose, flatten, recipes
from pliant.models import FAMILIES, PliantSpec
from pliant.models.graft import with_spec
from pliant.training import estimate, plan

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")

FIVE = '["wikitext","openwebtext","pile-subset","c4-subset","redpajama-subset"]'
DYNAMIC = """
model_type=dtf model.capacity_gamma=0.5
model_type=mod model.capacity_gamma=0.5
model_type=dtf
model_type=dtf model.base_model_name="Qwen/Qwen2.5-0.5B" model.num_hidden_layers=6 model.hidden_size=512 \
    model.intermediate_size=1536 model.num_attention_heads=8 model.capacity_gamma=0.5 data.dataset_name=wikitext \
    training.num_epochs=10 training.batch_size=8 training.gradient_accumulation_steps=4 training.lr=1e-3 \
    training.warmup_steps=1000
model_type=dtf model.base_model_name="Qwen/Qwen2.5-0.5B" model.capacity_gamma=0.5 model.beta_ce_init=-0.3 \
    model.beta_cu_init=-0.6 data.mixed=true data.dataset_names='["wikitext","openwebtext","pile-subset"]' \
    data.dataset_weights='[0.2,0.5,0.3]' training.batch_size=4 training.gradient_accumulation_steps=8 \
    training.lr=5e-4 training.warmup_steps=2000
model_type=dtf model.base_model_name="Qwen/Qwen2.5-1.5B" model.capacity_gamma=0.5 training.batch_size=2 \
    training.gradient_accumulation_steps=16 training.lr=2e-4
model_type=dtf model.base_model_name="Qwen/Qwen2.5-3B" model.capacity_gamma=0.25 training.batch_size=1 \
    training.gradient_accumulation_steps=32 training.lr=1e-4 training.use_flash_attention=true
model_type=dtf model.base_model_name="Qwen/Qwen2.5-7B" model.capacity_gamma=0.125 training.batch_size=1 \
    training.gradient_accumulation_steps=64 training.lr=5e-5 training.use_flash_attention=true \
    training.gradient_checkpointing=true
model_type=dtf data.dataset_name=wikitext data.mixed=false
model_type=dtf data.mixed=true data.dataset_names='["wikitext","openwebtext"]' data.dataset_weights='[0.3,0.7]'
model_type=dtf data.mixed=true data.dataset_names='FIVE' data.dataset_weights='[0.1,0.3,0.2,0.2,0.2]' \
    data.max_length=2048
model_type=dtf model.base_model_name="Qwen/Qwen2.5-0.5B" model.capacity_gamma=0.25 data.dataset_name=wikitext \
    training.batch_size=1 training.gradient_accumulation_steps=16 training.gradient_checkpointing=true \
    training.mixed_precision="fp16"
model_type=dtf model.base_model_name="Qwen/Qwen2.5-1.5B" training.batch_size=16 \
    training.gradient_accumulation_steps=1 training.use_flash_attention=true training.mixed_precision="bf16" \
    training.compile_model=true
"""
"""The settings of every command of the Dynamic Transformer README, less the epochs of the streamed mixture."""
ORIGINALS = DYNAMIC.replace("FIVE", FIVE).replace("\\\n", " ").strip().splitlines()


def names(text: str) -> list[str]:
    """Words as a list."""
    return text.split()


FLAGS = names("""
--model_name --adapter_rank --use_quantization --use_fp16 --dataset_name --dataset_split --train_split --eval_split
--streaming --batch_size --eval_batch_size --gradient_accumulation_steps --learning_rate --weight_decay
--regularization_lambda --use_regularization --num_epochs --warmup_steps --max_grad_norm --max_steps --max_length
--mixed_precision --output_dir --log_steps --save_steps --eval_steps --use_wandb --use_tensorboard --run_name
--checkpoint_path
""")
KEYS = names("""
model_type model.base_model_name model.capacity_gamma model.beta_ce_init model.beta_cu_init model.prior_loss_weight
model.num_hidden_layers model.hidden_size model.intermediate_size model.num_attention_heads
data.dataset_name data.mixed data.dataset_names data.dataset_weights data.max_length
training.num_epochs training.batch_size training.gradient_accumulation_steps training.lr training.warmup_steps
training.mixed_precision training.gradient_checkpointing training.compile_model training.use_flash_attention
training.lr_multipliers.base_model training.lr_multipliers.router training.lr_multipliers.prior
""")
OTHERS = names("""
--config-name --multi_gpu --num_processes --logdir --model_size --compare_versions device_map
r modulation_type consolidation_alpha consolidate_weights demonstrate_permanent_update convert_llama_to_npt_v2
compute_equivalence_loss_v2 factual_recall reasoning creative NPComponent train_equivalence.py evaluate_model.py
""")
ROUTED = names("model.capacity_gamma model.beta_ce_init model.beta_cu_init model.prior_loss_weight")


def rows() -> list[tuple[str, str]]:
    """The first two cells of every table row."""
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("| ") else []
        if cells and not set(cells[0]) <= set("- ") and cells[0] != "original":
            found.append((cells[0], cells[1]))
    return found


ROWS = rows()


def commands() -> list[str]:
    """Our commands, from the fenced blocks and the tables."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    cells = [code for _, cell in ROWS for code in re.findall(r"`([^`]+)`", cell)]
    return lines + [code for code in cells if code.startswith(("pliant ", "accelerate "))]


def training_arguments(command: str) -> list[str] | None:
    """What is after ``pliant train``, or after the module that ``accelerate launch`` runs."""
    words = shlex.split(command)
    if words[:2] == ["pliant", "train"]:
        return words[2:]
    if words[:2] == ["accelerate", "launch"]:
        assert words[words.index("-m") + 1] == "pliant.cli.train"
        return words[words.index("-m") + 2 :]
    return None


def composed(arguments: list[str]) -> RunConfig:
    """The configuration of the arguments of ``pliant train``."""
    if arguments[:1] == ["--config-name"]:
        return compose(arguments[1], arguments[2:])
    return compose("base", arguments)


def resolved_words(arguments: list[str]) -> set[str]:
    """The overrides among the arguments, and the model type that a recipe sets."""
    words = set(arguments)
    if arguments[:1] == ["--config-name"] and arguments[1] in recipes():
        words.add(f"model_type={compose(arguments[1]).model_type}")
    return words


TRAINED = {"objective": "causal_lm", "trainable": "all"}
"""What the Dynamic Transformer trains."""
TRAINING = [arguments for command in commands() if (arguments := training_arguments(command)) is not None]
SETTINGS = [
    pytest.param(cell[1:-1], id=name)
    for name, cell in ROWS
    if re.fullmatch(r"`[^`]+`", cell) and re.match(r"`(--config-name \w+ )?(model|data|training)[\w.]*=", cell)
]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A folder with the file that the page shows, on a machine with a GPU, offline."""
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    Path("config/my_training.yaml").write_text(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0], encoding="utf-8")
    monkeypatch.setattr(plan, "compute_device_type", lambda: "cuda")
    monkeypatch.setattr(plan, "available_memory", lambda _: 0)
    monkeypatch.setattr(plan, "is_installed", lambda _: True)
    for module in (plan, estimate):
        monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("pliant.data.check_data", lambda *_, **__: [])


def save_first_phase() -> None:
    """Saves the configuration of a checkpoint where the page's first phase leaves one."""
    base = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    spec = PliantSpec(architecture="npt", layers={0: NptConfig.preset("v1_single"), 1: NptConfig.preset("v1_single")})
    with_spec(base, FAMILIES["llama"].config, spec).save_pretrained("outputs/npt-pretrained/checkpoint-best")


@pytest.mark.parametrize("arguments", TRAINING, ids=" ".join)
def test_every_training_command_can_be_planned(elsewhere, arguments):
    if any(argument.startswith("model.checkpoint_path=") for argument in arguments):
        save_first_phase()
    result = CliRunner().invoke(main, ["train", *arguments, "--dry-run"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "Nothing was trained" in result.stdout


def test_the_page_has_a_command_for_each_of_the_originals():
    assert len(TRAINING) >= 30


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("pliant ") and "train" not in c.split()[1]])
def test_other_commands_exist(command):
    verb = shlex.split(command)[1]
    assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0


def test_flash_attention_has_its_precision_beside_it():
    with_it = [arguments for arguments in TRAINING if "training.use_flash_attention=true" in arguments]
    assert len(with_it) >= 3
    assert all("training.mixed_precision=bf16" in arguments for arguments in with_it)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_changes_the_configuration(setting):
    words = setting.split(" ")
    name = "base"
    if words[0] == "--config-name":
        name, words = words[1], words[2:]
    overrides = re.split(r" (?=[a-z_.]+=)", " ".join(words))
    assert compose(name, overrides) != compose(name)


@pytest.mark.parametrize("name", [*FLAGS, *KEYS])
def test_every_flag_and_key_has_a_row_of_its_own(name):
    assert any(first == f"`{name}`" for first, _ in ROWS)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_in_a_row(name):
    assert any(re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", first) for first, _ in ROWS)


def test_every_flag_and_key_is_tested():
    tested = {param.id for param in SETTINGS}
    assert {f"`{name}`" for name in (*FLAGS, *KEYS)} <= tested


@pytest.mark.parametrize("name", ROUTED)
def test_keys_of_routed_depth_arrive(name):
    (setting,) = (cell[1:-1] for first, cell in ROWS if first == f"`{name}`")
    chosen = dict(word.split("=") for word in setting.split())
    resolved = flatten(compose("base", setting.split()))
    assert resolved["model_type"] == chosen["model_type"] == "dtf"
    assert resolved[name] == float(chosen[name])


@pytest.mark.parametrize("original", ORIGINALS)
def test_every_command_of_the_dynamic_transformer_has_one_with_its_settings(original):
    wanted = set(shlex.split(original))
    found = [arguments for arguments in TRAINING if wanted <= resolved_words(arguments)]
    assert found
    resolved = [flatten(composed(arguments)) for arguments in found]
    assert any(all(each[f"training.{k}"] == v for k, v in TRAINED.items()) for each in resolved)


@pytest.mark.parametrize("value", ["dtf", "sdt", "mod", "stt"])
def test_routed_depth_can_be_planned(elsewhere, value):
    result = CliRunner().invoke(main, ["train", f"model_type={value}", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "capacity 0.5" in result.stdout


def test_flash_attention_goes_with_packed_rows_where_tokens_are_routed():
    with_it = [arguments for arguments in TRAINING if "training.use_flash_attention=true" in arguments]
    routed = [composed(arguments) for arguments in with_it if composed(arguments).is_routed]
    assert len(routed) >= 3
    assert all(config.data.packing for config in routed)
