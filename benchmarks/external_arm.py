"""A model that no spec builds as one more arm of a comparison: `ulsam compare --report-only` has it in its tables.

Its weight file and every setting are those of the comparison's first arm, its tries and seeds the comparison's. Runs
are chosen and lie as `ulsam compare` does it, in OUT/arms/NAME/choose-LR-EPOCHS and .../seed-N-LR-EPOCHS; done ones are
skipped. The classifier is new, as that of the other arms.
"""

import copy
import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from ulsam.base.errors import Interrupted, UlsamError
from ulsam.base.files import make_folder
from ulsam.base.locks import take_lock
from ulsam.base.provenance import processor, versions
from ulsam.data import loading
from ulsam.model.build import build
from ulsam.model.spec import ModelSpec
from ulsam.study.arms import Arm
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Failed, Grid, at_the_edge
from ulsam.study.identity import data_digest, file_digests
from ulsam.study.latency import measure as measure_latency
from ulsam.study.launch import lock_of
from ulsam.surgery.cost import Cost, cost
from ulsam.training import parts
from ulsam.training import summary as report
from ulsam.training.config import TrainConfig
from ulsam.training.train import resume, train

HAS_WEIGHTS = {"weights": None, "pretrained": False, "drop_rate": 0.0, "drop_path": 0.0}  # a prepared model has its own


@dataclasses.dataclass(frozen=True)
class Host:
    """A comparison, and the plain model of its first arm with the weights that it starts from."""

    comparison: ComparisonFolder
    grid: Grid
    spec: ModelSpec
    model: nn.Module


def host(out: str) -> Host:
    """Open the comparison in the folder ``out``.

    Raises:
        UlsamError: there is none, or its first arm is an edited model.
    """
    comparison = ComparisonFolder(out)
    grid = comparison.grid()
    config = grid.arms[0].config(grid.shared)
    comparison.check_identity(config.data, data_digest(config, grid.choose_split), file_digests([config]))
    spec = parts.spec_of_run(config, parts.open_images(config)[0].classes)
    if spec.edits:
        raise UlsamError(f"the first arm of {out} is an edited model: compare with the plain one first")
    loading.seed_all(0)
    model, _ = build(spec, weights=config.weights, pretrained=config.pretrained)
    return Host(comparison, grid, spec, model)


def join(host: Host, name: str, model: nn.Module, **entry: Any) -> bool:
    """Train ``model`` as the arm ``name``, and print what came of it; whether every run with a seed succeeded.

    Args:
        host: the comparison.
        name: of the arm.
        model: is trained in copies, each with a new classifier.
        entry: what ``external_arm.json`` says of it besides cost and latency.

    Raises:
        UlsamError: there is an arm of that name with another model, or another process trains it at the moment.
        Interrupted: Ctrl-C or SIGTERM in training, after the run has saved.
    """
    comparison, size = host.comparison, host.spec.input_size
    arm = Arm(name, (), {**host.grid.arms[0].settings, **HAS_WEIGHTS})
    before, after = cost(host.model, size), cost(model, size)
    make_folder(comparison.root / "arms" / arm.slug)
    about = f"arms/{arm.slug}/external_arm.json"
    found = {"name": name, "settings": arm.settings, **_shares(before, after), **entry}
    kept = comparison.read(about)
    if kept and kept["cost"] != found["cost"]:
        raise UlsamError(
            f"{comparison.root / about} is of a model of another cost: move that arm away, or name this one else"
        )
    comparison.write(about, {**found, **(kept or {})})
    print(f"{name}: {after.macs / before.macs:.4f} of the MACs, {after.params / before.params:.4f} of the parameters")

    grid = dataclasses.replace(host.grid, arms=(arm,))
    for run in grid.known(comparison.outcome):
        comparison.allow_retry(run)
    while due := grid.due(comparison.outcome):
        comparison.check(due[0])
        lock = take_lock(lock_of(comparison.folder(due[0])))
        if lock is None:
            raise UlsamError(f"{due[0]} is being trained by another process: wait for it")
        try:
            if comparison.outcome(due[0]) is None:  # else another process has ended it since
                _train(model, due[0].config, comparison.folder(due[0]))
        except UlsamError as error:
            comparison.fail(due[0], str(error))
        except (RuntimeError, OSError) as error:  # of torch, or of the disk
            comparison.fail(due[0], f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        except Interrupted:
            raise Interrupted(f"stopped, {due[0]} is saved", "resume with the same command") from None
        finally:
            lock.release()
    tries = grid.tried(arm, comparison.outcome)
    for tried in tries:
        reading = tried.failed or f"{grid.choose_split or 'held-out'} top-1 {100 * (tried.top1 or 0.0):.2f}"
        print(f"{name}: lr {tried.rate:g}, epochs {tried.epochs}: {reading}")
    if edge := at_the_edge(tries):
        print(f"note: the best rate is the {edge} of those tried: give more --rates")
    finals = [(run, comparison.outcome(run)) for run in grid.known(comparison.outcome) if not run.is_try]
    tested = [100 * found["scores"]["top1"] for _, found in finals if isinstance(found, Mapping)]
    if tested:
        print(f"{name}: top-1 {', '.join(f'{value:.2f}' for value in tested)}; mean {statistics.mean(tested):.2f}")
    for run, found in finals:
        if isinstance(found, Failed):
            print(f"{run} failed: {found.reason}")
    done = bool(finals) and len(tested) == len(finals)
    if done and "latency" not in comparison.read(about):
        times = measure_latency({"base": (host.model, size), name: (model, size)})
        timed = {"latency": times[name].to_json(), "processor": processor()}
        comparison.write(about, {**comparison.read(about), **timed})
    return done


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``: a mistake is one line and exit status 2, Ctrl-C one line and 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except UlsamError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"{script}: {str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def _train(prepared: nn.Module, config: TrainConfig, folder: Path) -> None:
    """Train a copy of the model, with a new classifier, in this folder, or resume it."""
    model = copy.deepcopy(prepared)
    head = cast(nn.Linear, cast(Any, model).get_classifier())
    loading.seed_all(config.seed)
    nn.init.normal_(head.weight, std=0.01)  # as the new classifiers of the other arms start
    nn.init.zeros_(head.bias)
    if (folder / "config.yaml").exists():
        resume(folder, model=model)
    else:
        train(config, folder, model=model)


def _shares(before: Cost, after: Cost) -> dict[str, Any]:
    return {
        "macs_share": after.macs / before.macs,
        "params_share": after.params / before.params,
        "cost": report.cost_entry(after),
        "versions": versions(),
    }
