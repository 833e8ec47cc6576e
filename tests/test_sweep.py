"""The sweep's space as wandb and dev/sweep.py read it, and the table of runs that were stopped in between."""

import json
import random

import pytest
import yaml
from conftest import ROOT
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from dev import sweep
from nanotrain import config
from nanotrain.errors import UserError
from scripts import base_train

SPACE = yaml.safe_load((ROOT / "dev" / "sweep.yaml").read_text())


def drawn(number):
    return sweep.draw(SPACE["parameters"], random.Random(number))


def test_every_draw_is_a_valid_run_with_the_flags_that_wandb_makes_of_it():
    defaults = config.settings(vars(base_train))
    for number in range(20):
        settings = drawn(number)
        given = {"args": {name: {"value": value} for name, value in settings.items()}}
        namespace = {**defaults, "__file__": base_train.__file__}
        config.override(namespace, create_sweep_command_args(given)["args"])
        assert {name: namespace[name.upper()] for name in settings} == settings
        base_train.check_settings(config.snapshot(namespace))
        assert settings["total_batch_size"] % 256 == 0


@pytest.fixture
def trained(base_dir, monkeypatch):
    """The runs that were trained, each by writing its metrics; `codes` are the exit codes to give, by number."""
    runs, codes = [], {}

    def train(run_name, settings, flags):
        number = int(run_name[-3:])
        runs.append((number, settings, flags))
        folder = base_dir / "runs" / run_name
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": 0, "val/bpb": 9.0}, {"step": 10, "train/loss": 1.0}]
        if codes.get(number) != "stopped":
            rows.append({"step": 10, "val/bpb": 2.0 - number / 10})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0 if codes.get(number) == "stopped" else codes.get(number, 0)

    monkeypatch.setattr(sweep, "train", train)
    return runs, codes


def names_in_table(base_dir):
    lines = (base_dir / "sweeps" / "s.md").read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:]]


def test_runs_come_one_after_the_other_into_a_table_and_are_not_repeated(trained, base_dir):
    runs, codes = trained
    codes[1] = 7
    sweep.sweep("s", 3, ["--seed=3", "--depth=2"])
    assert [run for run, _, _ in runs] == [0, 1, 2]
    assert len({json.dumps(settings) for _, settings, _ in runs}) == 3
    assert all(flags == ["--seed=3", "--depth=2"] and "depth" not in settings for _, settings, flags in runs)
    expected = [["sweep-s-002", "1.8000"], ["sweep-s-000", "2.0000"], ["sweep-s-001", "not finite"]]
    assert names_in_table(base_dir) == expected
    sweep.sweep("s", 4, ["--seed=3", "--depth=2"])
    assert [run for run, _, _ in runs][3:] == [3]
    with pytest.raises(UserError, match="run 0 had other settings"):
        sweep.sweep("s", 5, ["--seed=4"])


def test_a_sweep_that_was_stopped_goes_on_with_the_run_it_was_in(trained, base_dir):
    runs, codes = trained
    codes[1] = "stopped"
    with pytest.raises(UserError, match="sweep-s-001 was stopped at step 10"):
        sweep.sweep("s", 3, [])
    codes.clear()
    sweep.sweep("s", 3, [])
    assert [run for run, _, _ in runs] == [0, 1, 1, 2]
    assert runs[1] == runs[2]
    assert len(names_in_table(base_dir)) == 3
