r"""Claim: what it is worth to learn which tokens to leave out: routed attention, random tokens, a shallower model.

Every method starts from the embedded base, trains all weights for the same steps on the same text (embedded English
without LAMBADA's passages, and --domain) at each of the same learning rates, and keeps the one with the best perplexity
on a slice of --domain that no method trains on. Methods: mod and dtf (attention of every other layer, γ of the tokens),
random (the same with a hash of the position for a score), shallower (dense, without the layers whose linear FLOPs the
others save, chosen greedily by perplexity on that slice), and dense. With --layers cheapest all route the third of the
layers that the base does best without and that pair up for dtf; these results have a file of their own. The metric was
fixed beforehand: WikiText-2 test perplexity (first 12,288 tokens, windows of 512, fp32) over that of the untouched
base; LAMBADA (500) and HellaSwag (200), in what is trained in, stand beside it. Runs that are done are not repeated.

Usage: python benchmarks/routed_transfer.py --text wikitext-2/test.txt --domain wikitext-2/valid.txt
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from equivalence_training import write_texts
from quality import EVALUATION_TOKENS, lambada_accuracy, passages
from record import RESULTS, environment, finished, save
from torch import Tensor
from transformers import AutoTokenizer

import pliant
from pliant.architectures import ARCHITECTURES
from pliant.architectures.base import Architecture
from pliant.architectures.routing import Memory, Route, RoutedLayer, Router
from pliant.architectures.routing.config import RoutedConfig
from pliant.config import DataConfig, LrMultipliers, ModelConfig, RunConfig, TrainingConfig
from pliant.conversion import cheapest_layers
from pliant.conversion.cheapest import CHEAPEST
from pliant.data import calibration_tokens, read_text, token_windows
from pliant.evaluation import choice_records, hellaswag
from pliant.models import select_layers

METHODS = ("mod", "dtf", "random", "shallower", "dense")
ROUTED = ("mod", "dtf", "random")
WINDOW = 512
SEARCH_TOKENS = 4_096
NAME = "routed-transfer"


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomConfig(RoutedConfig):
    """A layer that random tokens enter."""


class RandomLayer(RoutedLayer):
    """Decoder layer with a hash of position and layer for a score."""

    def __init__(self, config: Any, layer_idx: int, layer_config: RandomConfig) -> None:
        super().__init__(config, layer_idx, layer_config)
        self.router = Router()  # only the threshold
        self.positions: Tensor | None = None

    def forward(self, hidden_states: Tensor, token_documents: Tensor | None = None, **kwargs: Any) -> Tensor:
        self.positions = kwargs["position_ids"]
        return super().forward(hidden_states, token_documents, **kwargs)

    def route(self, h: Tensor, documents: Tensor | None, memory: Memory | None) -> Route:
        assert self.positions is not None
        mask = 2**32 - 1
        key = (self.positions + 1) * 0x9E3779B1 + self.layer_idx * 0x85EBCA6B
        for _ in range(2):  # shifts and products that leave no order
            key = (((key & mask) >> 16) ^ (key & mask)) * 0x45D9F3B
        scores = ((key & mask) >> 8).float().expand(h.shape[:2]) / 2**24
        return Route(scores=scores, gate=torch.ones_like(scores), signals={})

    def losses(self, route: Route, runs: Tensor) -> dict[str, tuple[float, Tensor]]:
        return {}  # nothing learns


ARCHITECTURES["random"] = Architecture(
    name="random", summary="random tokens enter a layer", config=RandomConfig, layer=RandomLayer
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--domain", type=Path, required=True, help="more text to train on")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--layers", choices=("alternate", CHEAPEST), default="alternate", help="that are routed")
    parser.add_argument("--capacity", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-5, 1e-4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    parser.add_argument("--work", type=Path, help="by default a folder of that choice of layers in outputs/benchmarks")
    arguments = parser.parse_args()
    name = NAME if arguments.layers == "alternate" else f"{NAME}-{arguments.layers}"
    arguments.work = arguments.work or Path("outputs/benchmarks") / name
    file = RESULTS / f"{name}.json"
    result = json.loads(file.read_text()) if file.exists() else {"runs": []}
    settings = {key: getattr(arguments, key) for key in ("capacity", "steps", "batch_size", "seed", "dtype")}
    if result.get("settings", settings) != settings:
        raise SystemExit(f"{file} holds runs of other settings: {result['settings']}; move it away")
    texts = Texts(arguments)
    if "layers" not in result:
        result["layers"] = routed_layers(arguments.layers, texts)
    arguments.routed = result["layers"]
    result |= {"environment": environment(), "settings": settings, "linear_flops": flops(arguments)}
    for method in arguments.methods:
        for lr in arguments.lrs:
            if not any((run["method"], run["lr"]) == (method, lr) for run in result["runs"]):
                result["runs"].append(run(method, lr, arguments, texts))
                print(result["runs"][-1], flush=True)
                save(name, result)
    if "untouched" not in result:
        result["untouched"] = texts.qualities("smollm2-135m")
        save(name, result)
    chosen = result.setdefault("chosen", {})
    for method in dict.fromkeys(run["method"] for run in result["runs"]):
        best = min((r for r in result["runs"] if r["method"] == method), key=lambda r: r["search_perplexity"])
        if chosen.get(method, {}).get("lr") != best["lr"]:
            found = texts.qualities(folder_of(arguments, method, best["lr"]) / "calibrated")
            ratio = found["perplexity"] / result["untouched"]["perplexity"]
            chosen[method] = {**best, **found, "ratio": ratio}
            print(method, chosen[method], flush=True)
            save(name, result)


def routed_layers(layers: str, texts: "Texts") -> list[int]:
    """The layers that every method routes."""
    if layers == CHEAPEST:
        base: Any = pliant.load("smollm2-135m", dtype=texts.dtype).eval()
        return cheapest_layers(base, pliant.DtfConfig(granularity="attention"), calibration=texts.calibration)
    return select_layers(layers, pliant.load("smollm2-135m").config.num_hidden_layers)


class Texts:
    """What is trained on, chosen by, and measured on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dtype: torch.dtype = getattr(torch, arguments.dtype)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(pliant.load("smollm2-135m").config._name_or_path)
        pieces = passages(read_text(arguments.domain))
        held = pieces[:: len(pieces) // 60]  # of the domain, spread over it
        arguments.work.mkdir(parents=True, exist_ok=True)
        kept = arguments.work / "domain.txt"
        kept.write_text("\n".join(piece for piece in pieces if piece not in set(held)), encoding="utf-8")
        self.training = write_texts(arguments.work, kept)
        self.search = token_windows(held, self.tokenizer, num_tokens=SEARCH_TOKENS)
        self.measured = token_windows([read_text(arguments.text)], self.tokenizer, num_tokens=EVALUATION_TOKENS)
        self.calibration = calibration_tokens(self.tokenizer, kept, num_tokens=16_384)

    def qualities(self, name: str | Path) -> dict[str, float]:
        """The metric, and what stands beside it, of a saved model."""
        perplexity = pliant.perplexity(pliant.load(name, dtype=torch.float32).eval(), self.measured)
        model: Any = pliant.load(name, dtype=self.dtype).eval()
        return {
            "perplexity": perplexity,
            "lambada": lambada_accuracy(model, self.tokenizer, 500),
            "hellaswag": mean(record["correct"] for record in choice_records(model, self.tokenizer, hellaswag(200))),
        }


def folder_of(arguments: argparse.Namespace, method: str, lr: float) -> Path:
    """Where a run of a method is."""
    return arguments.work / f"{method}-{lr}"


def run(method: str, lr: float, arguments: argparse.Namespace, texts: Texts) -> dict[str, Any]:
    """Trains one method at one learning rate, and measures it on the slice to choose by."""
    start = time.process_time()
    base = shallower(arguments, texts) if method == "shallower" else "smollm2-135m"
    config = configure(method, lr, str(base), arguments, texts)
    trained = pliant.train(config)
    finished(trained)
    model = trained.model.float().eval()
    row: dict[str, Any] = {"method": method, "lr": lr, "core_minutes": (time.process_time() - start) / 60}
    if method in ROUTED:
        pliant.calibrate(model, arguments.capacity, calibration=texts.calibration)
        row["capacity"] = measured_capacity(model, texts.measured)
    model.save_pretrained(folder_of(arguments, method, lr) / "calibrated")
    return {**row, "search_perplexity": pliant.perplexity(model, texts.search)}


def configure(method: str, lr: float, base: str, arguments: argparse.Namespace, texts: Texts) -> RunConfig:
    """The run of one method: only what is dynamic differs."""
    is_routed = method in ROUTED
    options = {"capacity_gamma": arguments.capacity, "granularity": "attention"} if is_routed else {}
    options |= {"layers": arguments.routed} if is_routed else {}
    schedule = {"capacity_anneal_fraction": 0.3, "threshold_fraction": 0.1} if is_routed else {}
    return RunConfig(
        model_type=method if is_routed else "dense",
        model=ModelConfig(base_model_name=base, **options),
        data=DataConfig(
            dataset_name=str(texts.training[0]),
            mixed=True,
            dataset_names=[str(t) for t in texts.training],
            dataset_weights=[0.9, 0.1],
            max_length=WINDOW,
            max_validation_windows=4,
        ),
        training=TrainingConfig(
            output_dir=str(folder_of(arguments, method, lr)),
            objective="causal_lm",
            trainable="all",
            max_steps=arguments.steps,
            batch_size=arguments.batch_size,
            lr=lr,
            lr_multipliers=LrMultipliers(router=10.0, prior=10.0),
            warmup_steps=5,
            mixed_precision="bf16" if arguments.dtype == "bfloat16" else "no",
            seed=arguments.seed,
            **schedule,
        ),
    )


def flops(arguments: argparse.Namespace) -> dict[str, float]:
    """Linear FLOPs a token over those of the dense base: of the routed methods, and of as many whole layers."""
    config = pliant.load("smollm2-135m").config
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * config.hidden_size**2 + 2 * config.hidden_size * kv
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    routed = len(arguments.routed)
    saved = routed * (1 - arguments.capacity) * attention
    dropped = round(saved / layer)
    total = config.num_hidden_layers * layer
    width = max(2, 2 * math.ceil(config.hidden_size * pliant.DtfConfig().prior_factor / 2))
    priors = routed * 3 * config.hidden_size * width
    return {
        "routed": 1 - saved / total,
        "dtf": 1 - (saved - priors) / total,
        "shallower": 1 - dropped * layer / total,
        "layers_dropped": dropped,
    }


def shallower(arguments: argparse.Namespace, texts: Texts) -> Path:
    """Saves the base without the layers that cost least perplexity, one after the other."""
    count = int(flops(arguments)["layers_dropped"])
    folder = arguments.work / f"shallower-base-{count}"
    if (folder / "tokenizer_config.json").exists():  # written last
        return folder
    model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    layers = model.model.layers
    for _ in range(count):
        costs = []
        for dropped in range(1, len(layers)):
            model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != dropped)
            model.config.num_hidden_layers = len(model.model.layers)
            costs.append((pliant.perplexity(model, texts.search[:2]), dropped))
        _, least = min(costs)
        layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != least)
    model.model.layers = layers
    model.config.num_hidden_layers = len(layers)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def measured_capacity(model: Any, tokens: Tensor) -> float:
    """Share of the tokens that ran, over routed layers."""
    shares = []
    for window in tokens:
        with model.report() as report:
            model(window[None], use_cache=False, logits_to_keep=1)
        shares += [float(layer.routing.runs.float().mean()) for layer in report.layers.values()]
    return mean(shares)


if __name__ == "__main__":
    main()
