"""From a recipe or a file of yours, and overrides, to a checked ``RunConfig``: Hydra's compose with plain errors.

A file without a ``defaults`` list goes over ``base.yaml``; whatever it says, the result goes over the schema, so
that an unknown key is an error everywhere.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from pliant.architectures.base import nearest
from pliant.config.schema import RunConfig
from pliant.errors import ConfigError

HYDRA_VERSION = "1.3"
CONF = "pliant.conf"
SCHEMA = "schema"
SUFFIXES = (".yaml", ".yml")
LOCAL_FOLDERS = ("config", ".")
"""Where a file is looked for without ``--config-dir``."""

RENAMED = {
    "model_name": "model.base_model_name",
    "use_quantization": "model.quantization",
    "r": "model.adapter_rank",
    "rank": "model.adapter_rank",
    "use_fp16": "training.mixed_precision",
    "dataset_split": "data.train_split",
    "learning_rate": "training.lr",
    "use_wandb": "training.report_to",
    "use_tensorboard": "training.report_to",
}
"""What the original commands call a setting, where the last part of our key is another word."""

ELSEWHERE = {"consolidation_alpha": "pliant consolidate --alpha"}
"""Settings of the original commands that training does not have, and what takes them."""

TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def compose(name: str = "base", overrides: Sequence[str] = (), config_dir: Path | None = None) -> RunConfig:
    """Returns the configuration that a recipe or file and overrides make, all of it checked.

    Args:
        name: A recipe (:func:`recipes`), a file's name without ``.yaml`` in ``config_dir`` (without one, in
            ``./config`` or the current folder), or a path to a YAML file.
        overrides: ``key=value`` in Hydra's syntax; sweeps must have been expanded (:func:`jobs`).
        config_dir: Folder with files of yours; they go before recipes of the same name.

    Raises:
        ConfigError: A name, key or value is unknown or outside its rule, or two values contradict each other.
    """
    for override in parse_overrides(overrides):
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.key_or_group} must have one value; got the sweep {override.input_line!r}. Write a list as "
                "[a,b], or try each value with --multirun."
            )
    with primary(name, config_dir) as chosen, _own_errors():
        with hydra.initialize_config_module(CONF, version_base=HYDRA_VERSION):
            composed = hydra.compose(chosen.config_name, [*chosen.overrides, *overrides])
        return to_run_config(composed)


def to_run_config(composed: Any) -> RunConfig:
    """Returns what Hydra has composed, a ``DictConfig``, as a ``RunConfig``, checked.

    Raises:
        ConfigError: As :func:`compose`.
    """
    with _own_errors():
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), composed))
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: RunConfig) -> str:
    """Returns every setting as YAML; :func:`compose` of that file gives ``config`` again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Returns every setting by its dotted key."""

    def walk(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if f"{prefix}{name}" in sections:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    sections = {key for key, kind in schema_keys().items() if is_dataclass(kind)}
    return dict(walk(asdict(config), ""))


def recipes() -> list[str]:
    """Returns the names of the configurations that come with pliant, ``base`` first."""
    folder = resources.files(CONF)
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return ["base", *(name for name in names if name != "base")]


def schema_keys() -> dict[str, Any]:
    """Returns every dotted key of a ``RunConfig`` with its type, sections included."""
    return dict(_walk_schema(RunConfig, ""))


def _walk_schema(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for item in fields(section):
        key, kind = f"{prefix}{item.name}", hints[item.name]
        yield key, kind
        if is_dataclass(kind):
            yield from _walk_schema(kind, f"{key}.")


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parses overrides, and refuses keys that the schema does not have; ``hydra.…`` is Hydra's own.

    Raises:
        ConfigError: One is not ``key=value``, removes a key, or names one that does not exist.
    """
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"an override must be key=value, such as training.lr=1e-4; got {text!r}. Put two pairs of quotes round "
                "a value with signs in it: \"key='~/a, b'\"."
            ) from error
        parsed.append(override)
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra":
            continue
        if override.is_delete():
            raise ConfigError(f"{key} must keep a value; got {text!r}. Set it to null, or leave it as it is.")
        if override.is_sweep_override():
            check_key(key)
        else:
            _check_tree({key: override.value()}, "")
    return parsed


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Returns the overrides of every job of a sweep: ``training.lr=1e-3,1e-4`` makes two.

    Raises:
        ConfigError: An override is wrong, or sweeps in a way that the basic sweeper cannot.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = [override for override in parse_overrides(overrides) if not override.key_or_group.startswith("hydra")]
    with _own_errors():
        (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return batch


def nearest_key(key: str) -> str:
    """Returns the schema's key that ``key`` most likely means, or an empty string."""
    keys = [name for name, kind in schema_keys().items() if not is_dataclass(kind)]
    last = key.rpartition(".")[2]
    if last in RENAMED:
        return RENAMED[last]
    if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.85):
        return close[0]
    for name in keys:
        if name.rpartition(".")[2] == last:
            return name
    if close := difflib.get_close_matches(key, keys, n=1):
        return close[0]
    by_last = {name.rpartition(".")[2]: name for name in keys}
    close = difflib.get_close_matches(last, list(by_last), n=1)
    return by_last[close[0]] if close else ""


def check_key(key: str) -> None:
    """Refuses a key that the schema does not have.

    Raises:
        ConfigError: It names the nearest one.
    """
    if key in schema_keys():
        return
    last = key.rpartition(".")[2]
    if last in ELSEWHERE:
        raise ConfigError(f"{key} must be left out of training; {ELSEWHERE[last]} takes it. Give it there.")
    close = nearest_key(key)
    hint = f" Did you mean {close}?" if close else " `pliant train --cfg job` prints them all."
    raise ConfigError(f"{key} must be a setting of pliant; there is none of that name.{hint}")


def _check_tree(tree: Mapping[Any, Any], prefix: str) -> None:
    """Checks every key of ``tree``, down to the schema's leaves."""
    keys = schema_keys()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        check_key(key)
        if is_dataclass(keys[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} must be a section with keys of its own; got {value!r}.")
            _check_tree(value, f"{key}.")


@dataclass(frozen=True, kw_only=True)
class Primary:
    """What Hydra is given: the name of a configuration, and overrides that let it be found."""

    config_name: str
    overrides: tuple[str, ...] = ()


@contextmanager
def primary(name: str, config_dir: Path | None = None) -> Iterator[Primary]:
    """Within the block Hydra finds the configuration ``name`` under the name yielded.

    Raises:
        ConfigError: There is none, or the file cannot be read.
    """
    store = ConfigStore.instance()
    store.store(SCHEMA, node=RunConfig)
    OmegaConf.register_new_resolver("shipped", _shipped, replace=True)
    file = _find(name, config_dir)
    if file is None:
        yield Primary(config_name=name)
        return
    node = _read(file)
    if "defaults" not in node:
        node = {"defaults": ["base", "_self_"], **node}
    stored = f"{file.stem} (yours)"
    folder = str(file.parent.resolve()).replace("\\", "/").replace("'", r"\'")
    store.store(stored, node=node)
    try:
        yield Primary(config_name=stored, overrides=(f"hydra.searchpath=['file://{folder}']",))
    finally:
        del store.repo[f"{stored}.yaml"]


def _shipped(name: str) -> str:
    """``${shipped:chat.jsonl}`` in a recipe: the path of a text file that comes with pliant."""
    return str(resources.files(CONF) / "texts" / name)


def _find(name: str, config_dir: Path | None) -> Path | None:
    """Returns the file that ``name`` means, ``None`` for a recipe."""
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir must be a folder; {str(config_dir)!r} is none. Check the path.")
    if name.endswith(SUFFIXES) or "/" in name or "\\" in name:
        return _file_at(name, config_dir)
    known = recipes()
    folders = [config_dir] if config_dir is not None else [Path(folder) for folder in LOCAL_FOLDERS]
    there = [file for folder in folders for suffix in SUFFIXES if (file := folder / f"{name}{suffix}").is_file()]
    if config_dir is None and name in known:
        if there and name != "base" and there[0].parent.name == LOCAL_FOLDERS[0]:
            raise ConfigError(
                f"--config-name {name} is a recipe of pliant and a file of yours, {there[0]}. Say which: "
                f"--config-dir {LOCAL_FOLDERS[0]} for yours, or give your file another name."
            )
        return None
    if there:
        return there[0]
    if name in known:
        return None
    own = sorted({file.stem for folder in folders for suffix in SUFFIXES for file in folder.glob(f"[!.]*{suffix}")})
    searched = " or ".join(f"{str(folder)!r}" for folder in folders)
    raise ConfigError(
        f"--config-name must be a recipe ({', '.join(known)}) or a YAML file in {searched}"
        f"{' (' + ', '.join(own) + ')' if own else ''}; got {name!r}.{nearest(name, [*known, *own])}"
    )


def _file_at(name: str, config_dir: Path | None) -> Path:
    folder = config_dir or Path()
    candidates = [folder / Path(name).expanduser()]
    if not name.endswith(SUFFIXES):
        candidates = [folder / Path(f"{name}{suffix}").expanduser() for suffix in SUFFIXES]
    for file in candidates:
        if file.is_file():
            return file
    raise ConfigError(
        f"--config-name must be a recipe or an existing YAML file; {str(candidates[0])!r} does not exist. The recipes "
        f"are {', '.join(recipes())}."
    )


def _read(file: Path) -> dict[str, Any]:
    """Returns what a file of the user's says; its keys are known to be ours."""
    try:
        node = OmegaConf.load(file)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} must be a YAML file; it cannot be read: {' '.join(str(error).split())}") from error
    tree = OmegaConf.to_container(node)
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold sections such as model: and training:; it holds a {type(tree).__name__}.")
    own = {str(key): value for key, value in tree.items()}
    try:
        _check_tree({key: value for key, value in own.items() if key not in ("defaults", "hydra")}, "")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    training = own.get("training")
    if training is not None and training.get("mixed_precision") is False:  # YAML reads `no` as false
        training["mixed_precision"] = "no"
    return own


@contextmanager
def _own_errors() -> Iterator[None]:
    """Within the block errors of Hydra and OmegaConf come out as ``ConfigError``, in one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    """Says which key has what wrong, as far as the chain of causes tells."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in reversed(chain):
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            key = str(link.full_key)
            said = str(link).splitlines()[0].rstrip(".")
            if isinstance(link, InterpolationResolutionError):
                return f"{key} refers to what does not exist: {said}."
            return f"{key} must be {_rule(key)}: {said}."
    said = " ".join(str(error).split())
    return f"the configuration cannot be composed: {said}"


def _rule(key: str) -> str:
    """Says of which type the values of ``key`` are."""
    kind = schema_keys().get(key)
    members = get_args(kind)
    if get_origin(kind) is list:
        return f"a list, [a,b], each {TYPES[members[0]]}"
    plain = [member for member in members if member is not type(None)]  # int of int | None
    return TYPES.get(plain[0] if len(plain) == 1 else kind, "a key of Hydra's, with a value of its type")
