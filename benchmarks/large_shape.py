"""Claim: an 8B shape trains on one 24 GiB GPU: NF4 base, fp16, v1 of rank 16 on every layer, 1 × 2048 tokens.

The base has the real shape and random weights, quantised one projection at a time, so nothing is downloaded.

Usage: python benchmarks/large_shape.py [--shape llama-3.1-8b] [--length 2048] [--device cuda]
"""

import argparse

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from record import environment, save
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import pliant
from pliant.models import shape_config

LIMIT_GIB = 24


def quantised_base(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A causal LM of the given shape with random weights: projections in NF4, the rest in ``dtype``."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantised(module, dtype, device))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                value = torch.ones if parameter.ndim == 1 else torch.randn
                scale = 1.0 if parameter.ndim == 1 else 0.02
                module.register_parameter(
                    key, nn.Parameter(value(parameter.shape, dtype=dtype, device=device) * scale, requires_grad=False)
                )
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    model.tie_weights()
    return model


def quantised(linear: nn.Linear, dtype: torch.dtype, device: str) -> Linear4bit:
    """An NF4 layer of the shape of ``linear`` with random weights."""
    new = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = torch.randn(linear.out_features, linear.in_features, dtype=dtype) * 0.02
    new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    if linear.bias is not None:
        new.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    arguments = parser.parse_args()
    torch.manual_seed(0)

    model = quantised_base(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
    pliant.convert(model, pliant.NptConfig.preset("v1", rank=16))
    model.freeze_base().train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.length), device=arguments.device)
    with model.report() as report:
        loss = model(ids, labels=ids, use_cache=False).loss + 0.01 * report.regulariser()
        loss.backward()
    gradients = [parameter.grad for _, parameter in model.dynamic_parameters()]
    finite = bool(loss.isfinite()) and all(g is not None and bool(g.isfinite().all()) for g in gradients)
    peak = torch.cuda.max_memory_allocated() / 2**30 if arguments.device.startswith("cuda") else None
    result = {
        "environment": environment(arguments.device),
        "shape": arguments.shape,
        "length": arguments.length,
        "dtype": arguments.dtype,
        "loss": loss.item(),
        "finite": finite,
        "peak_gib": peak,
        "limit_gib": LIMIT_GIB,
    }
    print(result)
    save(f"large_shape-{arguments.shape}-{arguments.device}", result)


if __name__ == "__main__":
    main()
