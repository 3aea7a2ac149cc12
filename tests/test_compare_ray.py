"""Runs as Ray tasks: on a cluster of two nodes of which one is lost, and on a node that does not share our storage."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tiny import SETTINGS, draw_splits
from ulsam.study.arms import Arm, parse_arms
from ulsam.study.compare import compare
from ulsam.study.comparison_folder import ComparisonFolder
from ulsam.study.grid import Grid, Run
from ulsam.study.ray_launcher import receive, train_there
from ulsam.training.config import TrainConfig

RESOLVED = {**SETTINGS, "layout": "contiguous", "amp": "none", "compile": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("data"), train=16, val=4)


@pytest.mark.slow
def test_the_files_of_a_run_come_back_from_a_node_of_its_own(data: Path, tmp_path: Path) -> None:
    arms = parse_arms(["base", "size=24"])
    shared = TrainConfig.from_mapping({**RESOLVED, "data": str(data), "epochs": 1})
    comparison, grid = ComparisonFolder(tmp_path), Grid(arms, shared, seeds=1)
    run = grid.known(comparison.outcome)[0]
    folder = comparison.folder(run)
    here, token = str(Path.cwd()), str(tmp_path / "no-such-token")
    reason, files = train_there(str(folder), run.config.to_yaml(), token, here)
    assert reason is None
    assert not folder.exists()
    assert "checkpoint.pt" not in files
    receive(folder, files)
    assert comparison.outcome(run)["scores"]["images"] == 12  # type: ignore[index,call-overload]
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.yaml", "metrics.csv"}
    assert "result " in folder.with_name("seed-0.log").read_text()

    broken = Run(Arm.parse("base"), "seed-1", TrainConfig("no such folder", threads=1))
    reason, files = train_there(str(comparison.folder(broken)), broken.config.to_yaml(), token, here)
    assert reason is not None and "no such folder" in reason
    receive(comparison.folder(broken), files)
    assert comparison.outcome(broken) is None


@pytest.mark.slow
def test_relative_paths_are_seen_from_where_the_command_was_given(data: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_mapping({**RESOLVED, "data": data.name, "epochs": 1})
    run = Run(Arm.parse("base"), "seed-0", config)
    comparison, token = ComparisonFolder(tmp_path), str(tmp_path / "no-such-token")
    reason, files = train_there(str(comparison.folder(run)), config.to_yaml(), token, str(data.parent))
    assert reason is None
    receive(comparison.folder(run), files)
    assert comparison.outcome(run) is not None  # with the settings as they were given
    reason, files = train_there(str(comparison.folder(run)), config.to_yaml(), token, str(tmp_path / "gone"))
    assert reason is not None and reason.endswith("gone, from where the command was given") and not files


@pytest.mark.slow
def test_a_node_lost_on_the_way_costs_only_its_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(Path.cwd() / "src"), os.environ.get("PYTHONPATH")]))
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    out = tmp_path / "out"
    stamps: dict[str, float] = {}

    def lose() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            done, begun = (len(list(out.glob(f"arms/*/*/{name}"))) for name in ("summary.json", "checkpoint.pt"))
            if done and begun >= done + 2:  # both nodes have something to lose
                break
            time.sleep(0.05)
        for path in out.glob("arms/*/*/summary.json"):
            stamps[str(path)] = path.stat().st_mtime
        cluster.remove_node(lost, allow_graceful=False)

    watcher = threading.Thread(target=lose)
    watcher.start()
    settings: dict[str, Any] = {**RESOLVED, "epochs": 60, "save_seconds": 0}
    try:
        result = compare(
            data,
            ["base", "size=24"],
            out,
            seeds=3,
            settings=settings,
            launcher="ray",
            ray_address=cluster.address,
        )
    finally:
        watcher.join()
        cluster.shutdown()
    assert [len(arm["seeds"]) for arm in result["arms"]] == [3, 3]
    assert not any(arm["failed"] for arm in result["arms"])
    assert stamps and all(Path(path).stat().st_mtime == before for path, before in stamps.items())
    logs = [path.read_text() for path in out.glob("arms/*/*.log")]
    assert any("\nresume " in log for log in logs)  # the lost one resumed from its checkpoint
    assert json.loads((out / "compare.json").read_text())["finished"]
