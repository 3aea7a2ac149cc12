"""Choose the blocks: the damage of replacing them against what that saves, counted, or timed on this machine."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from tqdm import tqdm

from ulsam.base import logs
from ulsam.base.errors import UlsamError
from ulsam.base.threads import cpu_threads
from ulsam.base.timing import Call, Timing, duration, time_in_turn
from ulsam.study.slim_blocks import Block, SwitchableModel
from ulsam.study.slim_budget import WORDS, Budget
from ulsam.study.slim_damage import SampleScore
from ulsam.study.slim_latency import call_of
from ulsam.study.slim_progress import INTERVAL, SearchProgress
from ulsam.study.slim_record import SlimRecord
from ulsam.study.slim_search import Blocks, SearchResult, minimal_sets, saved, search
from ulsam.study.slim_stacked import TOGETHER
from ulsam.surgery.cost import Cost

STEP = 0.005  # share of the time by which more is asked for at least, where the sets that were found are too slow
MAX_TURNS = 2000  # of timing
TIMED = 8  # sets of one search that are timed at most


@dataclass(frozen=True)
class BlockSearch:
    """What the choice needs; every figure goes into ``record`` and is not taken again.

    Args:
        budget: the budget.
        blocks: to choose from, in the order of the model.
        switched: the model in which they are, on the device on which it is measured.
        cost: of the model as it is, one image.
        score: measures the model with each of several sets of blocks replaced, given by their names.
        record: where to keep figures.
        prepare: called before the first block is replaced, once the budget is known to be reachable.
        reconstructed: measures the model with these blocks replaced and the layers behind them reconstructed; None
            where the chosen model will not be.
        log_interval: seconds between two lines about how far it is, where the output is no terminal.
    """

    budget: Budget
    blocks: Sequence[Block]
    switched: SwitchableModel
    cost: Cost
    score: Callable[[Sequence[Sequence[str]]], Sequence[SampleScore]]
    record: SlimRecord
    prepare: Callable[[], None]
    reconstructed: Callable[[Sequence[str]], SampleScore] | None = None
    log_interval: float = INTERVAL

    def choose(self) -> None:
        """Choose the blocks to replace; these, and how they were found, are in the record then, under "chosen".

        Raises:
            UlsamError: all blocks together do not reach the budget.
        """
        by_time = self.budget.measure == "latency"
        bar: tqdm[Any] = logs.progress(desc="damage", unit="set")
        with bar, cpu_threads(self.budget.latency_threads if by_time else None):
            progress = SearchProgress(bar, self._shorter, self.log_interval)
            savings, total = self._savings(progress)
            useful = _useful(savings)
            self._check_reachable(
                useful, lambda: self._ratio(useful) if by_time else 1 - saved(savings, useful) / total
            )
            if by_time and (more := (1 - self._ratio(useful)) / saved(savings, useful)) > 1:
                savings = [more * saving for saving in savings]  # together they save more than the sum
            self.prepare()
            min_saving = total * (1 - self.budget.share)
            progress.say(f"plan    {self._plan(savings, min_saving)}")
            self._measure([frozenset()], progress)
            self._measure([frozenset({number}) for number in useful], progress)  # for the table, whatever is asked for
            progress.expect(sum(self._expected(savings, min_saving)))
            found = self._by_latency(savings, progress) if by_time else self._search(savings, min_saving, progress)
            chosen = self._best_reconstructed(found, progress)
        places = self._places
        self.record.put(
            "chosen",
            {
                "blocks": places(chosen),
                "how": found.how,
                "greedy": places(found.greedy),
                "rivals": [places(rival) for rival in found.rivals],
            },
        )

    @property
    def _shorter(self) -> str:
        ways = ["fewer `images`", "a smaller `max_sets`", "blocks named by `at`"]
        return ", ".join([*ways, *["a smaller `reconstruct_sets`"] * (self.reconstructed is not None)])

    def _plan(self, savings: Sequence[float], min_saving: float) -> str:
        """What will be measured."""
        greedily, after = self._expected(savings, min_saving)
        restored = min(self.budget.reconstruct_sets, after) if self.reconstructed else 0
        return (
            f"{len(_useful(savings))} blocks one by one, up to {greedily} sets in a greedy search, up to {after} sets "
            f"after it{f', and the best {restored} reconstructed' * (restored > 0)}; to shorten it: {self._shorter}"
        )

    def _expected(self, savings: Sequence[float], min_saving: float) -> tuple[int, int]:
        """How many sets the greedy search will measure, about, and how many at most are measured after it."""
        useful = sorted(_useful(savings))
        sets = list(
            itertools.islice(minimal_sets([savings[number] for number in useful], min_saving), self.budget.max_sets + 1)
        )
        longest = max(map(len, sets), default=0)
        return sum(len(useful) - step for step in range(1, longest)), min(len(sets), self.budget.max_sets)

    def _measure(self, sets: Iterable[Blocks], progress: SearchProgress) -> None:
        """Measure those of the sets that were not, many together."""
        due = sorted({blocks for blocks in sets if self.record.score(self._places(blocks)) is None}, key=sorted)
        for first in range(0, len(due), TOGETHER):  # neighbors in this order have most in common
            some, began = due[first : first + TOGETHER], time.monotonic()
            found = self.score([[self.blocks[number].name for number in sorted(blocks)] for blocks in some])
            self.record.add_scores(zip(map(self._places, some), found, strict=True))
            progress.count(len(some), time.monotonic() - began)

    def _scored(self, blocks: Blocks, progress: SearchProgress) -> SampleScore:
        """The score with these blocks replaced; of none: of the model as it is."""
        places = self._places(blocks)
        if self.record.score(places) is None:
            self._measure([blocks], progress)
        return cast(SampleScore, self.record.score(places))

    def _best_reconstructed(self, result: SearchResult, progress: SearchProgress) -> Blocks:
        """Of the sets of least damage that reach the budget the one that is best when it is reconstructed."""
        if self.reconstructed is None:
            return result.blocks
        by_time = self.budget.measure == "latency"
        fitting = [rival for rival in result.rivals if not by_time or self._ratio(rival) <= self.budget.share]
        losses: dict[Blocks, float] = {}
        chosen = fitting[: self.budget.reconstruct_sets]
        for number, blocks in enumerate(chosen):
            began = time.monotonic()
            places = self._places(blocks)
            known = self.record.score(places, reconstructed=True)
            if known is None:
                known = self.reconstructed([self.blocks[number].name for number in sorted(blocks)])
                self.record.add_score(places, known, reconstructed=True)
                if number == 0 and len(chosen) > 1:
                    rest = duration((len(chosen) - 1) * (time.monotonic() - began))
                    progress.say(f"time    {len(chosen) - 1} more sets to reconstruct, about {rest}")
            losses[blocks] = known.loss
            before, base = self._damage(blocks, progress), self._scored(frozenset(), progress)
            progress.say(
                f"damage  {', '.join(places)}: loss {before:+.4f}, {known.loss - base.loss:+.4f} after reconstruction"
            )
        return min(losses, key=lambda blocks: (losses[blocks], sorted(blocks)), default=result.blocks)

    def _damage(self, blocks: Blocks, progress: SearchProgress) -> float:
        """How much the loss grows when these blocks are replaced."""
        return self._scored(blocks, progress).loss - self._scored(frozenset(), progress).loss

    def _savings(self, progress: SearchProgress) -> tuple[list[float], float]:
        """What each block saves, counted or timed, and what there is in all; of time both are shares."""
        if self.budget.measure != "latency":
            return [getattr(block, self.budget.measure) for block in self.blocks], getattr(
                self.cost, self.budget.measure
            )
        if self.record.get("timings") is None:
            progress.say("time    of the model with each block replaced, in turn with the model as it is")
            timed = self._time([frozenset({number}) for number in range(len(self.blocks))])
            entries = [{"blocks": self._places(blocks), **timing.to_json()} for blocks, timing in timed.items()]
            self.record.put("timings", entries)
        ratios = {tuple(entry["blocks"]): entry["ratio"] for entry in self.record.get("timings")}
        return [1 - ratios[(block.place,)] for block in self.blocks], 1.0

    def _search(self, savings: Sequence[float], min_saving: float, progress: SearchProgress) -> SearchResult:
        """Search among the blocks that save something."""
        useful = sorted(_useful(savings))

        def real(blocks: Blocks) -> Blocks:
            return frozenset(useful[number] for number in blocks)

        def damage(blocks: Blocks) -> float:
            return self._damage(real(blocks), progress)

        def ahead(sets: Iterable[Blocks]) -> None:
            self._measure(map(real, sets), progress)

        found = search([savings[number] for number in useful], min_saving, damage, self.budget.max_sets, ahead)
        return SearchResult(real(found.blocks), found.how, real(found.greedy), tuple(map(real, found.rivals)))

    def _by_latency(self, savings: Sequence[float], progress: SearchProgress) -> SearchResult:
        """Search with the time that each block is to save, and time what is found, the least damage first.

        What some blocks save together is still not the sum of these savings. So the first set that is fast enough is
        taken; where none of `TIMED` is, more is asked for.
        """
        useful = _useful(savings)
        ratios: dict[Blocks, float] = {}  # of the sets that were timed

        def found(sets: Sequence[Blocks], how: Literal["timed", "all"], greedy: Blocks) -> SearchResult:
            others = sorted(ratios.keys() - set(sets), key=lambda other: (self._damage(other, progress), sorted(other)))
            return SearchResult(sets[0], how, greedy, (*sets, *others))

        wanted = max(1, self.budget.reconstruct_sets) if self.reconstructed else 1
        min_saving = 1 - self.budget.share
        while saved(savings, useful) >= min_saving:
            best = self._search(savings, min_saving, progress)
            excess, fast = [], []
            for rival in [rival for rival in best.rivals if rival not in ratios][:TIMED]:
                ratios[rival] = self._ratio(rival)
                if ratios[rival] <= self.budget.share:
                    fast.append(rival)
                    if len(fast) == wanted:
                        break
                    continue
                excess.append(ratios[rival] - self.budget.share)
                progress.say(
                    f"time    {', '.join(self._places(rival))}: {ratios[rival]:.3f} of the time; looking further"
                )
            if fast:
                return found(fast, "timed", best.greedy)
            min_saving += max(min(excess, default=STEP), STEP)
        self._damage(useful, progress)
        return found([useful], "all", useful)

    def _ratio(self, blocks: Blocks) -> float:
        """The measured time of the model with these blocks replaced, as a share of the model's own.

        Of many sets one is fast enough by chance: that is timed twice, and the slower reading counts.
        """
        places, timed = self._places(blocks), self.record.get("timed") or []
        known = next((entry for entry in timed if entry["blocks"] == places), None)
        if known is None:
            found = self._time([blocks])[blocks]
            if found.ratio <= self.budget.share:
                found = max(found, self._time([blocks])[blocks], key=lambda timing: timing.ratio)
            known = {"blocks": places, **found.to_json()}
            self.record.put("timed", [*timed, known])
        return float(known["ratio"])

    def _time(self, sets: Sequence[Blocks]) -> dict[Blocks, Timing]:
        """Time the model as it is (the empty set) and with these sets replaced, in turn."""
        calls: dict[Blocks, Call] = {}
        for blocks in (frozenset(), *sets):
            with self.switched.replaced([self.blocks[number].name for number in blocks]) as model:
                calls[blocks] = call_of(
                    model, self.cost.input_size, self.budget.engine, self.budget.latency_batch, torch.get_num_threads()
                )
        return time_in_turn(calls, self.budget.latency_seconds, MAX_TURNS)

    def _places(self, blocks: Blocks) -> list[str]:
        return [self.blocks[number].place for number in sorted(blocks)]

    def _check_reachable(self, useful: Blocks, left: Callable[[], float]) -> None:
        """Raise unless the budget is no less than what is left when all blocks are replaced that save something."""
        word = WORDS[self.budget.measure]
        if not useful:
            raise UlsamError(f"none of the {len(self.blocks)} blocks saves {word} when it is replaced")
        if (least := left()) > self.budget.share:
            raise UlsamError(
                f"all {len(useful)} blocks that save {word}, replaced, leave {math.ceil(1000 * least) / 1000:.3f} "
                f"of the {word}: `{self.budget.measure}` must be that or more, not {self.budget.share}"
            )


def _useful(savings: Sequence[float]) -> Blocks:
    """The blocks that save something."""
    return frozenset(number for number, saving in enumerate(savings) if saving > 0)
