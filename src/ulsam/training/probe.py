"""Choose the memory layout, the precision and compilation of a run by timing its training step.

Only what the settings leave at "auto" is chosen. The probe works on copies of the model and leaves every random
generator as it was: a run whose choice is written into its settings ends in the same weights without a probe.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ulsam.base.distributed import World
from ulsam.base.errors import UlsamError, first_line, is_out_of_memory
from ulsam.base.logs import say
from ulsam.base.timing import duration
from ulsam.training import parts
from ulsam.training.config import TrainConfig
from ulsam.training.distill import Teacher
from ulsam.training.dry_run import dry_run
from ulsam.training.machine import has_bf16, session, why_not_compiled
from ulsam.training.step import LAYOUTS, TrainingStep

MARGIN = 0.05  # so much faster than a plainer one a choice must be, so that noise does not choose
MIN_TURNS, MAX_TURNS = 3, 15  # timed steps of each candidate, after one that is not timed
SHARE, SHORT_SHARE, SHORT_SECONDS = 0.02, 0.05, 20.0  # of the run the probe may take; the larger one up to 20 seconds
COMPILE_SECONDS = 3600.0  # the shortest run for which compilation is tried
NAMES = {"none": "float32", "bf16": "bf16", "fp16": "fp16"}

SETTINGS = ("layout", "amp", "compile")

TakeStep = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Setup:
    """How the training step is computed."""

    layout: Literal["contiguous", "channels_last"] = "channels_last"
    amp: Literal["none", "bf16", "fp16"] = "none"
    compile: Literal["none", "inductor"] = "none"

    def __str__(self) -> str:
        return f"{self.layout} {NAMES[self.amp]} {'eager' if self.compile == 'none' else 'compiled'}"


TimeSteps = Callable[[Mapping[Setup, TakeStep], int], dict[Setup, float]]


def resolve_auto(config: TrainConfig) -> TrainConfig:
    """The settings with nothing left at "auto", as :func:`ulsam.training.train.train` would resolve them; logs how.

    For runs that are compared: resolve one, then replace what differs between them.

    Raises:
        UlsamError: the data or the model is not usable, or not one candidate fits into the memory.

    >>> resolve_auto(TrainConfig("birds", layout="contiguous", amp="none", compile="none", threads=1)).layout
    'contiguous'
    """
    with session(config) as (config, world):
        if not undecided(config):
            return config
        images, _, _ = parts.open_images(config)
        spec, model, teacher, updates = dry_run(config, images, world)
        config, lines = probe(config, model, spec.input_size, updates, world, teacher=teacher)
        if world.writes:
            for line in lines:
                say(line)
        return config


def undecided(config: TrainConfig) -> list[str]:
    """The settings that a probe would choose.

    >>> undecided(TrainConfig("birds", amp="none"))
    ['layout', 'compile']
    """
    return [name for name in SETTINGS if getattr(config, name) == "auto"]


def probe(
    config: TrainConfig,
    model: nn.Module,
    input_size: tuple[int, int, int],
    epoch_updates: int,
    world: World,
    measure: TimeSteps | None = None,
    teacher: Teacher | None = None,
) -> tuple[TrainConfig, list[str]]:
    """Decide what is left at "auto"; all processes get the first one's choice.

    Where one setup is all that this machine can do, nothing is timed. A run of so few steps that a probe would cost a
    notable part of it is not probed: channels_last, eager, float32 on a CPU and half precision on a GPU.

    Args:
        config: the run's settings.
        model: its model; stays as it is.
        input_size: channels, height, width.
        epoch_updates: of the weights in an epoch.
        measure: in place of :func:`time_steps`.
        teacher: whose forward pass is part of the step.

    Returns:
        The settings with the choice, and lines for the user.

    Raises:
        UlsamError: not one candidate fits into the memory, or BatchNorm got one value a channel.
    """
    notes = []
    if config.amp == "bf16" and not has_bf16(world.device):
        notes = [f"note    {world.device.type} has no bfloat16 in hardware here: `amp=none` may be faster than bf16"]
    names = undecided(config)
    if not names:
        return config, notes
    given: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS if name not in names}
    tried = setup_candidates(config, world.device)
    steps = config.epochs * epoch_updates * config.accumulate
    lack = why_not_compiled() if "compile" in names else None
    if len(tried) == 1 and ("compile" not in names or lack):
        chosen = dataclasses.replace(tried[0], **given)
        lines = [f"probe   none: this machine leaves no choice but {chosen}" + (f", as {lack}" if lack else "")]
    elif SHARE * steps < max(len(tried), 2) * (1 + MIN_TURNS):  # one alone is timed against its compiled form
        usual = Setup(amp=tried[-1].amp if world.device.type == "cuda" else "none")
        chosen = dataclasses.replace(usual, **given)
        lines = [f"probe   none for a run of {steps} steps: {chosen}"]
    else:
        step = partial(_step_of, config, model, input_size, world.device, teacher)
        with parts.clear_errors(), parts.same_generators(world.device):
            chosen, seconds, line = _fastest(tried, step, steps, measure or time_steps)
            lines = [line]
            if "compile" in names:
                chosen, why = _try_compiled(chosen, seconds, steps, step, lack)
                lines.append(f"probe   {why}")
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    lines[-1] += "; to choose: " + " ".join(f"`{name}`" for name in names)
    chosen = world.gather(dataclasses.replace(chosen, **given))[0]
    return dataclasses.replace(config, **dataclasses.asdict(chosen)), notes + lines


def _step_of(
    config: TrainConfig,
    model: nn.Module,
    input_size: tuple[int, int, int],
    device: torch.device,
    teacher: Teacher | None,
    setup: Setup,
) -> TakeStep:
    """A function that takes a step in this setup; its model is made in the first turn, which may lack memory."""
    resolved = dataclasses.replace(config, **dataclasses.asdict(setup))
    made: list[TakeStep] = []

    def take() -> None:
        if not made:
            made.append(training_step(resolved, model, input_size, device, teacher))
        made[0]()

    return take


def _fastest(
    tried: Sequence[Setup], step: Callable[[Setup], TakeStep], steps: int, measure: TimeSteps
) -> tuple[Setup, float, str]:
    """The setup whose steps are the fastest, their seconds, and a line with the times of all."""
    times = measure({setup: step(setup) for setup in tried}, steps)
    if not times:
        raise UlsamError("the memory is full: use a smaller `batch_size`, and `accumulate` instead")
    chosen = choose(times)
    others = [f"{setup} {1e3 * times[setup]:.0f} ms" for setup in times if setup != chosen]
    others += [f"{setup} does not fit into the memory" for setup in tried if setup not in times]
    line = f"probe   {chosen}: {1e3 * times[chosen]:.0f} ms a step" + "; ".join(["", *others])
    return chosen, times[chosen], line


def setup_candidates(config: TrainConfig, device: torch.device) -> list[Setup]:
    """What the settings leave to choose from, eager, the plainest first.

    >>> [str(setup) for setup in setup_candidates(TrainConfig("birds", amp="none"), torch.device("cpu"))]
    ['contiguous float32 eager', 'channels_last float32 eager']
    """
    layouts: list[Any] = list(LAYOUTS) if config.layout == "auto" else [config.layout]
    half = ["bf16"] if has_bf16(device) else ["fp16"] if device.type == "cuda" else []
    amps: list[Any] = ["none", *half] if config.amp == "auto" else [config.amp]
    return [Setup(layout, amp) for amp in amps for layout in layouts]


def choose(times: Mapping[Setup, float], margin: float = MARGIN) -> Setup:
    """The fastest of candidates that come the plainest first, where it is clearly faster than the plainer ones.

    Args:
        times: seconds a step.
        margin: one that does not take less than 1 - ``margin`` of the time of the best plainer one does not win.

    >>> str(choose({Setup("contiguous"): 1.0, Setup("channels_last"): 0.96}))
    'contiguous float32 eager'
    """
    setups = iter(times)
    best = next(setups)
    for setup in setups:
        if times[setup] < (1 - margin) * times[best]:
            best = setup
    return best


def time_steps(take: Mapping[Setup, TakeStep], steps: int) -> dict[Setup, float]:
    """Median seconds of a step of each candidate; they take turns, after a step each that is not timed.

    It ends after `MAX_TURNS`; or from `MIN_TURNS` on, when it has taken 2 % of the run, or 5 % while these are under
    20 seconds.

    Args:
        take: a function that takes a step, for each candidate; one that runs out of memory is left out.
        steps: of the whole run.
    """
    began = time.monotonic()
    times: dict[Setup, list[float]] = {setup: [] for setup in take}
    medians: dict[Setup, float] = {}
    for turn in range(1 + MAX_TURNS):
        for setup in list(times):
            before = time.perf_counter()
            try:
                take[setup]()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                del times[setup]
                continue
            if turn:
                times[setup].append(time.perf_counter() - before)
        medians = {setup: statistics.median(found) for setup, found in times.items() if found}
        run = steps * min(medians.values(), default=0.0)
        limit = max(SHARE * run, min(SHORT_SECONDS, SHORT_SHARE * run))
        if turn >= MIN_TURNS and time.monotonic() - began > limit:
            break
    return medians


def training_step(
    config: TrainConfig,
    model: nn.Module,
    input_size: tuple[int, int, int],
    device: torch.device,
    teacher: Teacher | None = None,
) -> TakeStep:
    """A function that takes one training step, forward, backward and update, on random images with a copy of the model.

    Args:
        config: settings of which none that :func:`undecided` names is left open.
        model: stays as it is.
        input_size: channels, height, width.
        device: where to train.
        teacher: of a distilled run.

    >>> config = TrainConfig("birds", layout="contiguous", amp="none", compile="none", batch_size=2)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> training_step(config, model, (3, 4, 4), torch.device("cpu"))()
    """
    training = TrainingStep(config, copy.deepcopy(model), 1, World(0, 1, device), teacher)
    training.train()
    images = torch.randn(config.batch_size, *input_size).to(device, memory_format=training.layout)
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=device)

    def take() -> None:
        training.add_gradients(images, labels, smoothing=config.smoothing)
        training.update()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return take


def _try_compiled(
    eager: Setup, seconds: float, steps: int, step: Callable[[Setup], TakeStep], lack: str | None
) -> tuple[Setup, str]:
    """The eager setup or its compiled form, and why; ``lack`` is what compilation lacks here."""
    run = seconds * steps
    if run < COMPILE_SECONDS:
        return (
            eager,
            f"not compiled: it takes a minute or more, which a run of about {duration(run)} does not earn back",
        )
    if lack:
        return eager, f"not compiled: {lack}"
    compiled = dataclasses.replace(eager, compile="inductor")
    take = {eager: step(eager), compiled: step(compiled)}
    began = time.monotonic()
    try:
        take[compiled]()
    except Exception as error:  # whatever a compiler, or the model under it, may raise: the run continues without
        return eager, f"not compiled: torch.compile failed: {type(error).__name__}: {first_line(error)}"
    cost = time.monotonic() - began
    times = time_steps(take, steps)
    if len(times) < 2:
        return eager, "not compiled: there is too little memory to time both"
    measured = f"{1e3 * times[compiled]:.0f} ms a step for {1e3 * times[eager]:.0f}, after {cost:.0f} s of compilation"
    if choose(times) == eager or (times[eager] - times[compiled]) * steps < cost:
        return eager, f"not compiled: {measured}"
    return compiled, f"compiled: {measured}"
