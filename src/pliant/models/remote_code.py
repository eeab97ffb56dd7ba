"""Remote code: the one file by which transformers loads and runs a converted model where pliant is not installed.

It is made from the sources of the architectures and of the model classes, so that nothing is written twice. What
conversion, training and editing need is not in it.
"""

import json
import os
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from pliant.architectures import ARCHITECTURES
from pliant.errors import CheckpointError
from pliant.models.families import Family
from pliant.models.flatten import flatten
from pliant.models.spec import PliantSpec

REMOTE_CODE_NAME = "modeling_pliant.py"
PACKAGE = "pliant"
ROOTS = (("pliant.models.families", "FAMILIES"),)
ALLOWED = ("huggingface_hub", "safetensors", "torch", "transformers")
"""What the file may import: transformers itself needs all of these."""
KEPT: dict[str, tuple[str, ...]] = {"DynamicCausalLM": ()}
"""Its methods are for training, editing and saving; the base's own run the model."""
GENERIC_CLASS = "AutoModelForCausalLM"
"""What the configuration calls the class, as ``transformers serve`` looks the name up in transformers."""


@cache
def remote_code() -> str:
    """Returns the source of ``modeling_pliant.py``: the same for every model."""
    header = (
        f'"""Models of pliant {metadata.version(PACKAGE)}, for use without it. Made from its sources; do not edit.\n\n'
        "NPT: attention rewrites the MLP of a layer token by token. MoD, DTF, STT: some tokens only enter a layer.\n"
        'SPDX-License-Identifier: MIT\n"""\n'
    )
    return f"{header}\n{flatten(resources.files(PACKAGE), PACKAGE, ROOTS, allowed=ALLOWED, kept=KEPT).lstrip()}"


def check_remote_code(model: Any) -> None:
    """Refuses a model whose layers are not in the file.

    Raises:
        CheckpointError: The architecture was added to ``ARCHITECTURES`` from outside pliant.
    """
    name = PliantSpec.of(model.config).architecture
    config = ARCHITECTURES[name].config
    if config is not None and config.__module__.split(".")[0] != PACKAGE:
        raise CheckpointError(
            f"remote_code takes the architectures that come with pliant; got {name!r}, which {config.__module__} "
            "defines. Export without remote code, or add the architecture to the package."
        )


def add_remote_code(folder: str | os.PathLike, family: Family) -> None:
    """Makes a full checkpoint of a converted model of ``family`` one that loads with ``trust_remote_code``."""
    directory = Path(folder)
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    classes = {"AutoConfig": family.config, "AutoModel": family.model, GENERIC_CLASS: family.causal_lm}
    module = REMOTE_CODE_NAME.removesuffix(".py")
    config["auto_map"] = {auto: f"{module}.{one.__name__}" for auto, one in classes.items()}
    config["architectures"] = [GENERIC_CLASS]
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
    (directory / REMOTE_CODE_NAME).write_text(remote_code(), encoding="utf-8")
