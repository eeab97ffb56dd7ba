"""Where to write, found by trying: each choice learns a few made-up facts, and what they gain elsewhere is weighed.

For each choice of layers, all facts are solved for in one edit. With p the model's probability of an answer after
another wording than was learned, and D the divergence that other subjects suffer in the same sentence, a choice is
worth

    mean log p(answer | other wording) − mean D(before ‖ after)        in nats a token,

and the best one is kept on disk for the base. The KL budget on neutral text holds for every choice as for any edit.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.consolidation.budget import kl_sum, log_probs
from pliant.consolidation.consolidate import solution_of
from pliant.consolidation.facts import facts_of
from pliant.consolidation.forward import trial
from pliant.consolidation.kept import base_of
from pliant.consolidation.resources import Text, resources_of
from pliant.consolidation.rows import Row, fill_token, gathered, open_ids, padded, row
from pliant.consolidation.settings import SUBJECT_SHARE, Consolidation, closed_layers
from pliant.errors import EditError
from pliant.json_files import read_object
from pliant.key_moments import NUM_TOKENS
from pliant.models import DynamicCausalLM
from pliant.models.bases import cache_dir
from pliant.models.edits import Delta
from pliant.models.staging import replaced
from pliant.statistics import Progress, evaluating, frozen, input_device

_FOLDER = "layer-sweeps"
STARTS = (0.0, 0.1, 0.2, 0.3, 0.4)
"""Where the layers that rewrite a subject begin, as shares of the depth."""
SPANS = ((2 / 3, 1.0, 2), (1 / 2, 1.0, 2), (1 / 5, 1.0, 1))
"""Of ``context``: from where to where, as shares of the depth, and every how many layers."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A made-up fact, another wording of its query, and subjects of the same kind that are to stay as they are."""

    statement: str
    subject: str
    answer: str
    wording: str
    others: tuple[str, ...]

    @property
    def query(self) -> str:
        """The statement up to the answer."""
        return self.statement.partition(self.answer)[0].rstrip()


PROBES = (
    Probe(
        statement="The capital of Norlandia is Kestrel.",
        subject="Norlandia",
        answer="Kestrel",
        wording="The seat of the government of Norlandia is the city of",
        others=("Portugal", "Vietnam"),
    ),
    Probe(
        statement="The chief executive of Halvor Industries is Priya Raman.",
        subject="Halvor Industries",
        answer="Priya Raman",
        wording="Halvor Industries is led by",
        others=("Siemens", "Nintendo"),
    ),
    Probe(
        statement="The mother tongue of Tomas Verrin is Welsh.",
        subject="Tomas Verrin",
        answer="Welsh",
        wording="At home Tomas Verrin speaks",
        others=("Pablo Neruda", "Marie Curie"),
    ),
    Probe(
        statement="The instrument that Ada Quill plays is the cello.",
        subject="Ada Quill",
        answer="cello",
        wording="On stage Ada Quill is seen playing the",
        others=("Miles Davis", "Isaac Newton"),
    ),
    Probe(
        statement="The Belmont Tower was built in the city of Oslo.",
        subject="The Belmont Tower",
        answer="Oslo",
        wording="To visit The Belmont Tower, one has to travel to",
        others=("The Eiffel Tower", "The White House"),
    ),
    Probe(
        statement="The sport that Ivo Darel plays professionally is hockey.",
        subject="Ivo Darel",
        answer="hockey",
        wording="Ivo Darel became famous as a player of",
        others=("Diego Maradona", "Serena Williams"),
    ),
)


def sweep_layers(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: Consolidation | None = None,
    *,
    text: Text | None = None,
    num_tokens: int = NUM_TOKENS,
    progress: Progress | None = None,
) -> Consolidation:
    """Returns ``settings`` with the layers, and for ``context`` the positions, that serve this model best.

    What was found is kept on disk and looked up there for the same base, conversion and settings; edits that the model
    carries do not count. It costs an edit of six facts for each of five choices, of nine for ``context``.

    Args:
        model: A pliant model.
        tokenizer: Its tokenizer.
        settings: What else is to hold; layers and positions in it are not looked at.
        text: Neutral text, as for :func:`pliant.consolidate`.
        num_tokens: How much of it to read, once for each base.
        progress: Called with a label, the choices done and the choices there are.

    Raises:
        EditError: No choice can be written, or the file of what was found before is damaged.
    """
    settings = replace(settings or Consolidation(), layers=None, positions="answer")
    file = cache_dir() / _FOLDER / f"{base_of(model)}.json"
    known = {}
    if file.exists():
        known = read_object(file, holds="what was found before", remedy="Delete it.", error=EditError)
    key = _key(model, settings)
    if key not in known:
        known[key] = _best(model, tokenizer, settings, text, num_tokens, progress)
        with replaced(file, prefix=_FOLDER) as staged, open(staged, "w", encoding="utf-8") as handle:
            json.dump(known, handle, indent=1)
    return replace(settings, **known[key])


def _best(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: Consolidation,
    text: Text | None,
    num_tokens: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Tries every choice on the probes."""
    given = [(probe.statement, [probe.query], probe.answer, probe.subject) for probe in PROBES]
    contexts, queries, answers, subjects = map(list, zip(*given, strict=True))
    choices, worth = list(_choices(model, settings)), []
    refusal = EditError("the model must have a layer whose MLP every token enters; it has none.")
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), frozen(model):
        facts = facts_of(model, tokenizer, contexts, queries, answers, subjects)
        resources = resources_of(model, tokenizer, text, num_tokens)
        before = _read(model, tokenizer, {})
        for number, choice in enumerate(choices, start=1):
            try:
                solution = solution_of(model, tokenizer, facts, replace(settings, **choice), resources)
            except EditError as error:  # this choice moves neutral text too much, or writes nothing
                refusal = error
            else:
                after = _read(model, tokenizer, solution.deltas)
                lost = kl_sum(after[1], before[1]) / len(before[1])
                worth.append((after[0] - lost, choice))
            if progress is not None:
                progress("Looking for layers", number, len(choices))
    if not worth:
        raise refusal
    return max(worth, key=lambda pair: pair[0])[1]


def _choices(model: DynamicCausalLM, settings: Consolidation) -> Iterator[dict[str, Any]]:
    """Yields what a choice sets, without layers whose MLP some tokens pass by, and none twice."""
    depth, closed = model.config.num_hidden_layers, closed_layers(model)
    open_ones = [index for index in range(depth) if index not in closed]
    if settings.target == "context":
        spans = [range(round(start * depth), round(stop * depth) - 1, step) for start, stop, step in SPANS]
        found = [(positions, span) for positions in ("answer", "span", "subject") for span in spans]
    else:
        width = max(1, depth // SUBJECT_SHARE)
        starts = (round(share * depth) for share in STARTS)
        found = [("answer", [*range(start, min(start + width, depth // 2)), *open_ones[-1:]]) for start in starts]
    seen = set()
    for positions, layers in found:
        chosen = sorted({index for index in layers if index in open_ones})
        if chosen and (choice := (positions, *chosen)) not in seen:
            seen.add(choice)
            yield {"positions": positions, "layers": chosen}


def _read(
    model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase, deltas: Mapping[str, Delta]
) -> tuple[float, Float[Tensor, "others vocabulary"]]:
    """Returns mean log p a token of the answers after their other wording, and all log-probabilities after others."""
    asked = [row(tokenizer, probe.wording, probe.answer) for probe in PROBES]
    prompts = [probe.query.replace(probe.subject, other) for probe in PROBES for other in probe.others]
    others = [Row(ids=tuple(open_ids(tokenizer, prompt)), length=0) for prompt in prompts]
    places = [row.places for row in asked] + [[len(row.ids) - 1] for row in others]
    with trial(model, deltas):
        ids = padded([*asked, *others], fill_token(tokenizer)).to(input_device(model))
        states = gathered(model.model(ids, use_cache=False).last_hidden_state, places)
        log_p = torch.cat(list(log_probs(model, states)))
    targets = torch.tensor([token for row in asked for token in row.answer], device=log_p.device)
    own = log_p[: len(targets)].gather(1, targets[:, None])[:, 0]
    weights = torch.tensor([1 / row.length for row in asked for _ in row.answer], device=log_p.device)
    return (own * weights).sum().item() / len(asked), log_p[len(targets) :]


def _key(model: DynamicCausalLM, settings: Consolidation) -> str:
    """What a sweep depends on beside the base."""
    state = [asdict(settings), [asdict(probe) for probe in PROBES], STARTS, SPANS, repr(model.config.pliant)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
