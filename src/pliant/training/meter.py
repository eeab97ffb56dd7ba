"""Running means of named losses between two log lines, which survive a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "meter_{}.json"


class Meter:
    """Adds up sums over positions, without waiting for the device, and gives their means."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.positions: dict[str, int] = {}

    def add(self, sums: dict[str, Tensor], positions: int) -> None:
        """Adds the sums of one micro-batch of this process, taken over ``positions`` positions."""
        for name, value in sums.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.positions[name] = self.positions.get(name, 0) + positions

    def drain(self, accelerator: Any) -> tuple[dict[str, float], int]:
        """Returns each name's mean over the positions of all processes, and the most positions; starts anew."""
        means, most = {}, 0
        for name in sorted(self.sums):
            count = torch.tensor(self.positions[name], device=accelerator.device)
            positions = int(accelerator.reduce(count, "sum"))
            means[name] = float(accelerator.reduce(self.sums[name], "sum")) / max(positions, 1)
            most = max(most, positions)
        self.sums, self.positions = {}, {}
        return means, most

    def save(self, folder: Path, *, rank: int) -> None:
        """Writes what this process has added since the last ``drain``, exactly."""
        sums = {name: float(value) for name, value in self.sums.items()}
        file = folder / FILE.format(rank)
        file.write_text(json.dumps({"sums": sums, "positions": self.positions}), encoding="utf-8")

    def load(self, folder: Path, *, rank: int, num_processes: int, device: torch.device) -> None:
        """Goes on from saved meters: its own, or where their number has changed, the first process from all of them."""
        files = sorted(folder.glob(FILE.format("*")))
        has_own = len(files) == num_processes
        if has_own:
            files = [folder / FILE.format(rank)]
        saved = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        names = {name for each in saved for name in each["sums"]}
        totals = {name: sum(each["sums"].get(name, 0.0) for each in saved) for name in names}
        share = 1 if has_own or rank == 0 else 0  # the others need the names, for all must reduce the same ones
        self.sums = {name: torch.tensor(share * value, device=device) for name, value in totals.items()}
        self.positions = {name: share * sum(each["positions"].get(name, 0) for each in saved) for name in names}
