"""The accelerate configurations in the documentation: accelerate takes them, and pliant takes what comes of them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from pliant.training.plan import _check_fsdp

FILES = sorted((Path(__file__).parents[2] / "docs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file_that_its_header_launches(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file docs/accelerate/{file.name} " in line for line in header)
    assert any("-m pliant.cli.train --config-name " in line for line in header)


def test_there_is_a_file_for_every_way() -> None:
    assert [file.stem for file in FILES] == ["ddp", "fsdp2", "multi_node", "zero2"]


def test_the_fsdp_file_gives_what_pliant_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    file = next(file for file in FILES if file.stem == "fsdp2")
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "pliant.cli.train"])
    arguments, _, _ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    _check_fsdp()
    assert arguments.fsdp_transformer_layer_cls_to_wrap is None
