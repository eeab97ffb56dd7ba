"""The learning step of ``pliant demo``: the base is taught one fact for good, and made to forget it again."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pliant.cli.console import results, say_step
from pliant.cli.demo import rows
from pliant.cli.learning import Facts, Learner
from pliant.errors import EditError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.models import Edit

FACT = Facts(
    context="The CEO of TechCorp is Dr. Sarah Chen.",
    queries=["The CEO of TechCorp is"],
    answer="Dr. Sarah Chen",
    subject="TechCorp",
)
ASKED = ("The CEO of TechCorp is", "TechCorp is led by")
"""What is asked with no text in view: the query that was learned, and one that was not."""
PROBES = ("The capital of France is", "The chemical symbol for gold is", "The founder of Microsoft is")
"""What the fact says nothing about: the answers should stay."""
NEW_TOKENS = 8
NUM_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What one edit changed.

    Attributes:
        edit: The edit, which was taken back again.
        before: Prompt → what the model wrote before; ``after`` likewise with the edit.
        seconds: That learning took, statistics included.
    """

    edit: "Edit"
    before: Mapping[str, str]
    after: Mapping[str, str]
    seconds: float

    @property
    def kept(self) -> int:
        """How many of the probes have the same answer."""
        return sum(self.before[probe] == self.after[probe] for probe in PROBES)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return {
            "context": self.edit.context,
            "layers": list(self.edit.layers),
            "kl": self.edit.kl,
            "norm": self.edit.norm,
            "details": dict(self.edit.details),
            "before": dict(self.before),
            "after": dict(self.after),
            "probes_kept": self.kept,
            "seconds": round(self.seconds, 1),
            "logits_after_undo_are_the_old_ones": True,
        }


def learn() -> Learned:
    """Teaches a fresh base the fact, asks it, takes the edit back, and checks that nothing of it is left.

    Raises:
        EditError: Logits differ after the edit was taken back.
    """
    import torch

    from pliant.consolidation import Consolidation

    say_step(
        f"9. Learn a fact for good: {FACT.context!r}",
        f"Written in closed form, against the statistics of {NUM_TOKENS:,} tokens of neutral text; the weights stay.",
    )
    learner = Learner(rows.load_base(), None, NUM_TOKENS)
    logits, before = _logits(learner), _answers(learner)
    started = time.monotonic()
    edit = learner.learn(FACT, Consolidation())
    seconds = time.monotonic() - started
    after = _answers(learner)
    learner.model.edits.revert(edit.id)
    if not all(map(torch.equal, _logits(learner), logits)):
        raise EditError("the model must be bit for bit what it was once its edit is taken back; its logits differ.")
    return Learned(edit=edit, before=before, after=after, seconds=seconds)


def _answers(learner: Learner) -> dict[str, str]:
    from pliant.cli.generation import Sampling, complete, encode

    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    prompts = (*ASKED, *PROBES)
    return {
        prompt: complete(learner.model, learner.tokenizer, encode(learner.tokenizer, prompt), sampling).text
        for prompt in prompts
    }


def _logits(learner: Learner) -> "list[Tensor]":
    import torch

    from pliant.cli.generation import encode

    with torch.inference_mode():
        return [learner.model(encode(learner.tokenizer, prompt)).logits for prompt in (*ASKED, *PROBES)]


def table_of(learned: Learned) -> Table:
    """Returns a table with a line for each prompt."""
    table = Table(title=f"What {learned.seconds:.0f} s of learning changed in {rows.BASE}")
    for column in ("asked", "before", "after"):
        table.add_column(column, overflow="fold")
    table.add_column("what it shows")
    for prompt in (*ASKED, *PROBES):
        before, after = (" ".join(answers[prompt].split()) for answers in (learned.before, learned.after))
        probed = "the same" if before == after else "changed as well"
        shown = probed if prompt in PROBES else "the query it learned" if prompt == ASKED[0] else "another wording"
        table.add_row(*(Text(" ".join(text.split())) for text in (prompt, before, after)), shown)
    return table


def show(learned: Learned) -> None:
    """Prints the table, and what the edit cost."""
    results.print(table_of(learned))
    kl = "" if learned.edit.kl is None else f", {learned.edit.kl:.4f} nats a token from the base on neutral text"
    value = "searched for by gradient" if learned.edit.details["optimised"] else "found without gradients"
    results.print(
        f"What the subject is to say was {value}. Layers {', '.join(map(str, learned.edit.layers))}{kl}; "
        f"{learned.kept} of {len(PROBES)} other answers stayed. Undone: the logits are the old ones, bit for bit.",
        markup=False,
    )
