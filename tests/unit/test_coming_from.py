"""docs/coming-from.md: every command of the original documents has one of ours that runs, every setting a row."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from pliant.architectures import NptConfig
from pliant.cli import main
from pliant.config.composition import compose
from pliant.models import FAMILIES, PliantSpec
from pliant.models.graft import with_spec
from pliant.training import estimate, plan

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")
NOT_YET = "not available yet"


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
NOT_BUILT = names("model.capacity_gamma model.beta_ce_init model.beta_cu_init model.prior_loss_weight")


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


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_is_said_to_be(name):
    assert (f"`{name}`", NOT_YET) in ROWS


def test_every_available_flag_is_tested():
    tested = {param.id for param in SETTINGS}
    available = {name for name in (*FLAGS, *KEYS) if (f"`{name}`", NOT_YET) not in ROWS}
    assert {f"`{name}`" for name in available} <= tested


@pytest.mark.parametrize("value", ["dtf", "mod"])
def test_routed_depth_is_refused_as_not_available(value):
    result = CliRunner().invoke(main, ["train", f"model_type={value}", "--dry-run"])
    assert result.exit_code == 1
    assert NOT_YET in result.stderr
