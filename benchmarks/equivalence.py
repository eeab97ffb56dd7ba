"""Claim: at full rank a converted model is its base: logits in fp32, and greedy texts.

Usage: python benchmarks/equivalence.py
"""

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.data import documents

NUM_PROMPTS = 20
NEW_TOKENS = 64


def prompts(tokenizer) -> list[torch.Tensor]:
    """The first sixteen tokens of twenty embedded validation documents."""
    texts = documents("validation")
    return [tokenizer(next(texts), return_tensors="pt").input_ids[:, :16] for _ in range(NUM_PROMPTS)]


@torch.inference_mode()
def measure(form: str, ids: list[torch.Tensor]) -> dict[str, float | int | str]:
    model = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    rank = {} if form == "v1" else {"rank": model.config.hidden_size}
    pliant.convert(model, pliant.NptConfig.preset(form, **rank))
    worst, equal = 0.0, 0
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": model.config.eos_token_id}
    for prompt in ids:
        logits, text = model(prompt).logits, model.generate(prompt, **options)
        with model.base_mode():
            base_logits, base_text = model(prompt).logits, model.generate(prompt, **options)
        worst = max(worst, ((logits - base_logits).norm() / base_logits.norm()).item())
        equal += torch.equal(text, base_text)
    print(f"{form:10} relative logit error {worst:.2e}; greedy texts equal: {equal} of {len(ids)}", flush=True)
    return {"form": form, "relative_logit_error": worst, "equal_texts": equal, "prompts": len(ids)}


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pliant.load("smollm2-135m").config._name_or_path)
    ids = prompts(tokenizer)
    save(
        "equivalence",
        {"environment": environment(), "rows": [measure(form, ids) for form in ("keyed", "keyed_pre", "v1")]},
    )


if __name__ == "__main__":
    main()
