"""How often the verdict is wrong, and how often it finds an effect, on simulated cases.

Each table of cases is simulated, written, and judged by `python -m evaluate compare`, as a user's
would be. Dice is skewed, some lesions are missed, cases lie in groups that are alike in difficulty
and in how the two arms do on them, and every training (arm and seed) has a level of its own.

With `auto`, the number of seeds is decided by the first three, as `seeds: auto` does.

With `--skewed`, patients' effects are skewed instead: log-normal, or a rare bad group.

    python -m benchmarks.verdict_simulation [--repeats 200] [--layouts 30x100 ...] [--seeds auto ...]
    python -m benchmarks.verdict_simulation --skewed
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from maskloom.evaluate.downstream.arms import AUTO
from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet, write_cases
from maskloom.evaluate.downstream.compare import compare
from maskloom.evaluate.downstream.seeds import seed_plan

MOST_SEEDS = 10


@dataclass(frozen=True)
class Cell:
    """What is simulated: the SD of a training's level, and by how much the arm is better."""

    seed_sd: float
    effect: float

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"sd{self.seed_sd}-effect{self.effect}"

    @property
    def title(self) -> str:
        """Its column."""
        kind = f"found +{self.effect}" if self.effect else "wrong"
        return f"{kind} [%], seed SD {self.seed_sd:g}"


CELLS = (*(Cell(sd, 0.0) for sd in (0.0, 0.01, 0.02, 0.04)), Cell(0.0, 0.05), Cell(0.01, 0.05))


@dataclass(frozen=True)
class Layout:
    """Test cases in groups.

    Attributes:
        groups, cases: their numbers.
        unequal: whether sizes fall as 1, 1/2, 1/3 ... (at least one case) or are equal.
    """

    groups: int
    cases: int
    unequal: bool

    def group_numbers(self) -> NDArray[np.int64]:
        """Return the group of each case."""
        weights = 1 / np.arange(1, self.groups + 1) if self.unequal else np.ones(self.groups)
        sizes = np.maximum(1, np.floor(weights / weights.sum() * self.cases).astype(np.int64))
        for k in range(int(self.cases - sizes.sum())):
            sizes[k % self.groups] += 1
        while sizes.sum() > self.cases:
            sizes[sizes.argmax()] -= 1
        return np.repeat(np.arange(self.groups), sizes)


LAYOUTS = (
    Layout(6, 100, False),
    Layout(6, 100, True),
    Layout(12, 100, False),
    Layout(12, 100, True),
    Layout(30, 100, False),
    Layout(30, 100, True),
    Layout(100, 100, False),
    Layout(300, 300, False),
    Layout(300, 900, True),
)


def simulated_dice(
    random: np.random.Generator, layout: Layout, seeds: int, seed_sd: float, effect: float
) -> NDArray[np.float64]:
    """Return the Dice of two arms, (2, seeds, cases), the second better by `effect` on average."""
    group = layout.group_numbers()
    difficulty = np.sqrt(0.5) * (random.normal(size=layout.groups)[group] + random.normal(size=layout.cases))
    by_group = 0.15 * random.normal(size=(2, 1, layout.groups))[..., group]
    noise = 0.2 * random.normal(size=(2, seeds, layout.cases))
    dice = 1 / (1 + np.exp(-(1.2 + 0.9 * difficulty + by_group + noise)))
    dice[random.random(dice.shape) < 0.04 * np.exp(-0.8 * difficulty)] = 0  # lesions that are missed
    dice += seed_sd * random.normal(size=(2, seeds, 1))
    dice[1] += effect
    return dice


def skewed_scores(random: np.random.Generator, groups: NDArray[np.int64], seeds: int, kind: str) -> NDArray[np.float64]:
    """Return the scores of two arms, (2, seeds, cases), that are equal on average over all patients.

    Args:
        random: where numbers are drawn from.
        groups: the group of each case.
        seeds: number of seeds.
        kind: of the groups' effects: `log-normal`, or `rare bad group` (one in 20 loses .5).
    """
    count = int(groups.max()) + 1
    scores = 0.7 + 0.1 * random.normal(size=len(groups)) + 0.03 * random.normal(size=(2, seeds, len(groups)))
    scores += 0.01 * random.normal(size=(2, seeds, 1))
    if kind == "log-normal":
        scores[1] += 0.05 * (np.exp(1.2 * random.normal(size=count)) - np.exp(0.72))[groups]
    else:
        scores[1] += np.where(random.random(count) < 0.05, -0.475, 0.025)[groups]
    return scores


def print_skewed(repeats: int) -> None:
    """Print the share of wrong findings where the effects of patients are skewed, around zero on average."""
    print("| patients' effects | test set | wrong [%], 3 seeds | 5 seeds |")
    for kind in ("log-normal", "rare bad group"):
        for count, size in ((6, 16), (12, 8), (30, 3), (100, 1)):
            groups, shares = np.repeat(np.arange(count), size), []
            samples, names = (tuple(f"{i:04}" for i in column) for column in (range(count * size), groups))
            for seeds in (3, 5):
                drawn = (
                    skewed_scores(np.random.default_rng([count, seeds, k]), groups, seeds, kind) for k in range(repeats)
                )
                tables = [
                    ScoredTestSet("downstream_segmentation", "real test", samples, names, arms_of(one)) for one in drawn
                ]
                shares.append(100 * np.mean([compare(one)[0].finding in ("helped", "hurt") for one in tables]))
            print(f"| {kind} | {count} groups of {size} | {shares[0]:.1f} | {shares[1]:.1f} |", flush=True)


def write_tables(folder: Path, layout: Layout, seeds: str, cell: Cell, repeats: int) -> list[Path]:
    """Write the simulated tables of a cell and return their paths."""
    most = MOST_SEEDS if seeds == AUTO else int(seeds)
    key = [layout.groups, layout.cases, layout.unequal, most, round(cell.seed_sd * 1000), round(cell.effect * 1000)]
    random = np.random.default_rng(key)
    samples = tuple(f"case-{i:04}" for i in range(layout.cases))
    groups = tuple(f"group-{k:04}" for k in layout.group_numbers())
    paths = [folder / f"{cell.name}-{number}.parquet" for number in range(repeats)]
    for path in paths:
        dice = simulated_dice(random, layout, most, cell.seed_sd, cell.effect)
        cases = ScoredTestSet("downstream_segmentation", "real test", samples, groups, arms_of(dice))
        if seeds == AUTO:
            cases = replace(cases, arms=arms_of(dice[:, : seed_plan(cases, "Dice", most).seeds]))
        write_cases(path, [cases])
    return paths


def arms_of(dice: NDArray[np.float64]) -> dict[str, ArmCases]:
    """Return the two arms of simulated Dice, (2, seeds, cases)."""
    seeds = tuple(range(dice.shape[1]))
    return {name: ArmCases(seeds, {"Dice": dice[k]}) for k, name in enumerate(("real", "real_synthetic"))}


def judged(layout: Layout, seeds: str, repeats: int) -> tuple[list[float], float]:
    """Return the share, in %, of wrong findings in each null cell and of helped ones in the others, and the mean number of seeds."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for cell in CELLS for path in write_tables(Path(folder), layout, seeds, cell, repeats)]
        output = Path(folder) / "found.json"
        words = [sys.executable, "-m", "maskloom.evaluate", "compare", *paths, "--score", "Dice"]
        subprocess.run([*words, "--json", str(output)], check=True, capture_output=True)
        findings: dict[str, list[str]] = {cell.name: [] for cell in CELLS}
        entries = json.loads(output.read_text())
        for entry in entries:
            findings[Path(entry["file"]).stem.rpartition("-")[0]].append(entry["finding"])
    wanted = {cell.name: ("helped",) if cell.effect else ("helped", "hurt") for cell in CELLS}
    shares = [100 * float(np.mean([one in wanted[name] for one in found])) for name, found in findings.items()]
    return shares, float(np.mean([entry["seeds"] for entry in entries]))


def main(
    repeats: Annotated[int, typer.Option(min=20, help="simulated tables per cell")] = 200,
    layouts: Annotated[list[str] | None, typer.Option(help="only these, as GROUPSxCASES; may be repeated")] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="only these: a number, or auto; may be repeated")] = None,
    skewed: Annotated[bool, typer.Option("--skewed", help="skewed effects of patients instead")] = False,
) -> None:
    """Print the share of wrong findings without an effect, and of found effects of +.05 Dice."""
    print(f"{repeats} tables per cell")
    if skewed:
        print_skewed(repeats)
        return
    print("| " + " | ".join(["test set", "seeds", *(cell.title for cell in CELLS)]) + " |")
    for layout in LAYOUTS:
        if layouts and f"{layout.groups}x{layout.cases}" not in layouts:
            continue
        for number in seeds or ("3", "5", AUTO):
            name = f"{layout.groups} groups, {layout.cases} cases, {'unequal' if layout.unequal else 'equal'}"
            shares, used = judged(layout, number, repeats)
            shown = " | ".join(f"{share:.1f}" for share in shares)
            print(f"| {name} | {f'auto ({used:.1f})' if number == AUTO else number} | {shown} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
