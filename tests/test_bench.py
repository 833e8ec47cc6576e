"""The benchmarks at tiny sizes: that they measure what they say and print what they found. Nothing here is timed."""

import contextlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanotrain import errors, hardware, loss
from nanotrain.dist import init_distributed
from scripts import bench

TRAINING_TABLES = {
    "accumulation": ["grad_accum_steps", "rows"],
    "batch": ["rows"],
    "length": ["seq_len", "rows"],
    "checkpointing": ["checkpointing"],
    "depth": ["depth", "width"],
}
LABELS = {
    "precision": ["precision", "dtypes"],
    "attention": ["kernel", "compile"],
    "loss": ["chunk", "compile"],
    "optimizer": ["part"],
    "generation": ["depth", "method", "texts", "speed"],
    **TRAINING_TABLES,
}
NUMBERS = ["ms", "spread", "tok/s", "of matmul", "MiB"]
SIZES = {"DEPTH": 1, "ASPECT_RATIO": 8, "HEAD_DIM": 8, "VOCAB_SIZE": 300, "DEVICE_BATCH_SIZE": 8, "MAX_SEQ_LEN": 16}
SETTINGS = {"REPETITIONS": 2, "COMPILE": "off", "DEVICE": "cpu", "DTYPE": "float32", "SECONDS": 1e-6, **SIZES}


@contextlib.contextmanager
def in_this_process(variant):
    answers = bench.session(variant)
    yield lambda: next(answers)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Tiny sizes, no processes, and everything put back that a session changes in this one. One thread: on a busy
    machine two wait for each other ten times as long as they work.
    """
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in SETTINGS.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "worker", in_this_process)
    monkeypatch.setattr(hardware, "matmul_flops", lambda *arguments: 1e9)
    yield
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


def rows_of(printed):
    """{table: rows as lists of text, the header first} of what was printed."""
    tables = {}
    for line in printed.splitlines():
        if line.startswith("## "):
            tables[line[3:]] = rows = []
        elif line.startswith("| ") and "---" not in line:
            rows.append(line[2:-2].split(" | "))
    return tables


def test_every_table_has_its_columns_and_the_json_is_what_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "OUT", str(tmp_path / "out.json"))
    bench.main(list(LABELS))
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["environment"]["device"] == "cpu"
    assert found["settings"]["VOCAB_SIZE"] == 300
    printed = rows_of(capsys.readouterr().out)
    assert list(printed) == list(found["tables"]) == list(LABELS)
    for name, rows in found["tables"].items():
        assert list(rows[0]) == printed[name][0] == [*LABELS[name], *NUMBERS]
        values = [[value if isinstance(value, str) else f"{value:,}" for value in row.values()] for row in rows]
        assert values == printed[name][1:]
        for row in rows:
            low, high = map(float, row["spread"].split("-", 1))
            assert 0 < low <= row["ms"] <= high
            assert row["MiB"] > 10
    assert [row["depth"] for row in found["tables"]["depth"]] == [2, 4, 6, 8, 10, 12]
    assert {row["grad_accum_steps"] * row["rows"] for row in found["tables"]["accumulation"]} == {8}
    assert {row["seq_len"] * row["rows"] >= 128 for row in found["tables"]["length"]} == {True}
    speeds = [(row["depth"], row["method"], row["texts"]) for row in found["tables"]["generation"]]
    of_all_depths = [("cache", 1), ("products alone", 1)]
    others = [("no cache", 1), ("cache", 4), ("cache", 16)]
    assert sorted(speeds) == sorted(
        [(1, *choice) for choice in of_all_depths + others] + [(8, *c) for c in of_all_depths]
    )
    for row in found["tables"]["generation"]:
        (first,) = (
            other["tok/s"]
            for other in found["tables"]["generation"]
            if (other["depth"], other["method"], other["texts"]) == (row["depth"], "cache", 1)
        )
        assert row["speed"] == pytest.approx(row["tok/s"] / first, rel=0.01)
    seen = {row["precision"]: row["dtypes"] for row in found["tables"]["precision"]}
    assert seen == {"float32": "float32", "float32, oneDNN": "float32", "bfloat16": "bfloat16"}


@pytest.mark.parametrize(("seconds", "shown"), [(0.00012345, 0.123), (0.0456789, 45.7), (1.23456, 1235)])
def test_a_row_is_the_median_the_spread_and_the_share_of_the_rate(seconds, shown):
    measurements = [{"rate": 2e9, "memory": 3 * 2**20}] * 3
    row = bench.numbers({"a": 1}, [seconds / 2, 9 * seconds, seconds], measurements, 1000, 1e9 * seconds)
    assert (row["ms"], row["tok/s"], row["MiB"]) == (shown, round(1000 / seconds), 3)
    assert row["of matmul"] == 0.5
    assert row["spread"].split("-") == [f"{bench.figure(1000 * seconds * factor):g}" for factor in (0.5, 9)]
    nothing = bench.numbers({}, [seconds], measurements[:1], 0, 0)
    assert (nothing["tok/s"], nothing["of matmul"]) == ("-", "-")


def fake_workers(monkeypatch, failing=()):
    """Workers that only note who was asked; returns the list of notes."""
    asked = []

    @contextlib.contextmanager
    def fake(variant):
        def ask():
            asked.append(variant.labels["name"])
            if asked.count(variant.labels["name"]) == dict(failing).get(variant.labels["name"]):
                return {"failed": "RuntimeError: no"}
            return {"first_seconds": 0.5, "seconds": 0.5, "rate": 1.0, "memory": 2**20}

        yield ask
        asked.append("end of " + variant.labels["name"])

    monkeypatch.setattr(bench, "worker", fake)
    return asked


def test_every_variant_is_measured_once_before_any_is_measured_again(monkeypatch):
    asked = fake_workers(monkeypatch)
    bench.table([bench.variant({"name": name}, (None, 1, 1)) for name in "abc"])
    assert asked == [*"abc", *"abc", *"abc", "end of c", "end of b", "end of a"]  # ready, then two repetitions


@pytest.mark.parametrize("place", [1, 2])
def test_a_variant_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys, place):
    asked = fake_workers(monkeypatch, failing=[("a", place)])
    rows = bench.table([bench.variant({"name": name}, (None, 1, 1)) for name in "ab"])
    assert rows[0] == {"name": "a", "ms": "failed", "spread": "-", "tok/s": "-", "of matmul": "-", "MiB": "-"}
    assert (rows[1]["name"], rows[1]["ms"]) == ("b", 500)
    assert (asked.count("a"), asked.count("b")) == (place, 3)
    assert "RuntimeError: no" in capsys.readouterr().err


def test_compile_seconds_are_those_of_a_new_process_cold_and_warm(monkeypatch):
    folders = []

    @contextlib.contextmanager
    def fake(variant):
        folders.append(variant.cache_dir)
        yield lambda: {"first_seconds": len(folders), "seconds": 1.0, "rate": 1.0, "memory": 2**20}

    monkeypatch.setattr(bench, "worker", fake)
    rows = bench.compile_table(("off", "block"))
    assert [(row["compile"], row["cold s"], row["warm s"]) for row in rows] == [("off", 1, 4), ("block", 2, 4)]
    assert folders[:2] == folders[2:]
    assert folders[0] != folders[1]
    assert list(rows[0]) == ["compile", "cold s", "warm s", *NUMBERS]


def test_variants_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    block = np.ones(100_000_000)  # 800 MB of this process, which must not count as theirs
    arguments = {"tokens": 8, "width": 8, "vocab_size": 300, "compiled": False}
    works = [(partial(bench.prepare_loss, chunk=chunk, **arguments), 8, 1) for chunk in (4, "none")]
    monkeypatch.setattr(bench, "REPETITIONS", 1)
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    (ready, measurement), (failed,) = bench.measure([bench.variant({}, work, "float32") for work in works])
    assert ready["first_seconds"] > 0
    assert measurement["seconds"] > 0
    assert 2**25 < measurement["memory"] < block.nbytes
    assert failed["failed"].startswith("TypeError")


# ---- the alternatives ----


def test_generation_without_a_cache_gives_the_same_texts_and_needs_the_same_products():
    work = bench.training(depth=3, width=16)
    runs = {name: bench.prepare_generation(init_distributed("cpu"), work, name, texts=3) for name in bench.METHODS}
    with torch.no_grad():
        runs["cache"].args[0].lm_head.weight.mul_(1000)  # a fresh head says nothing
        runs["no cache"].args[0].lm_head.weight.mul_(1000)
    steps = runs["cache"]()
    assert runs["no cache"]() == steps
    assert (len(steps), len(steps[0])) == (16, 3)
    assert len({tuple(text) for text in zip(*steps, strict=True)}) == 3
    with FlopCounterMode(display=False) as counter:
        runs["products alone"]()
    assert counter.get_total_flops() == 2 * work.weights() * 3 * 16


@pytest.mark.parametrize("kernel", [name for name in bench.KERNELS if name != "SDPA"])
def test_explicit_attention_is_attention(kernel):
    shape, generator = (2, 3, 7, 4), torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    expected, found = (bench.KERNELS[name](*inputs, 0.5) for name in ("SDPA", kernel))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(shape, generator=generator)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)))


def test_the_loss_on_all_logits_is_the_loss():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(30, 8, generator=generator)
    targets = torch.arange(9)
    expected = loss.mean_loss(hidden, weight, targets, 15.0, loss.softmax_gradient)
    torch.testing.assert_close(bench.full_loss(hidden, weight, targets, 15.0), expected)


def test_activation_checkpointing_changes_no_gradient():
    dist = init_distributed("cpu", "float32")
    gradients = []
    for choice in ("off", "on"):
        model, _ = bench.training(checkpointing=choice, depth=2, width=16).build(dist)
        for block in model.blocks:
            torch.nn.init.eye_(block.down_proj.weight)
        tokens = torch.arange(32).view(2, 16)
        model(tokens, tokens).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_optimizers_parts_are_all_there():
    rows = bench.optimizer_table()
    muon, rest = rows[:3], rows[3:-1]
    assert [row["part"] for row in muon] == ["Muon momentum", "Muon orthogonalisation", "Muon update"]
    roles = set(bench.training().build(init_distributed("cpu", "float32"))[0].parameters_by_role()) - {"matrix"}
    expected = {f"AdamW {role}" for role in roles - {"bigram_embedding"}} | {"RowwiseAdam bigram_embedding"}
    assert {row["part"] for row in rest} == expected
    assert rows[-1]["part"] == "all"
    assert [row["part"] for row in rows if row["of matmul"] != "-"] == ["Muon orthogonalisation"]


# ---- data ----


@pytest.fixture
def data(monkeypatch, base_dir, data_dir, tokenizer):
    """The settings that `loader` and `step` need."""
    tokenizer.save(base_dir / "tokenizer")
    for name, value in {"DATA_DIR": str(data_dir), "LOADER_TOKENS": 500, "SHAPES": ((2, 16),)}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.usefixtures("data")
def test_the_parts_of_a_step_add_up_to_the_sum_that_is_reported(monkeypatch):
    monkeypatch.setattr(bench, "REPETITIONS", 1)
    rows = bench.step_table()
    times = {row["part"]: row["ms"] for row in rows}
    assert list(times) == [*bench.PARTS, "sum", "measured step", "at the matmul rate"]
    assert sum(times[part] for part in bench.PARTS) == pytest.approx(times["sum"], abs=0.05)
    assert min(times[part] for part in bench.PARTS if part != "loader") > 0
    for row in rows:
        assert row["of the step"] == pytest.approx(row["ms"] / times["measured step"], abs=0.01)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm", "aten::linear", "step"], "matmul"),
        (["aten::mm", "_MeanLoss", "step"], "loss"),
        (["aten::mul", "_MeanLossBackward", "autograd::engine::evaluate_function: _MeanLossBackward", "step"], "loss"),
        (["aten::baddbmm", "Optimizer.step#Muon.step", "optimizer", "step"], "optimizer"),
        (["loader", "step"], "loader"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu_backward", "step"], "attention"),
        (["aten::bmm", "step"], "attention"),
        (["graph_0_cpp_fused_exp_mul_where_2", "CompiledFunction", "step"], "attention"),
        (["graph_0_cpp_fused_add_expand_mul_1", "CompiledFunction", "step"], "norms and residuals"),
        (["aten::_fused_rms_norm", "aten::rms_norm", "step"], "norms and residuals"),
        (["aten::embedding", "step"], "norms and residuals"),
        (["autograd::engine::evaluate_function: MmBackward0", "step"], "rest"),
        (["step"], "rest"),
    ],
)
def test_the_part_of_an_operation(names, part):
    assert bench.part_of(names) == part


@pytest.mark.usefixtures("data")
def test_the_loader_is_measured_against_the_tokenizer():
    rows = bench.loader_table()
    assert [row["threads"] for row in rows] == [1, "all"]
    assert list(rows[0]) == ["threads", "shape", "loader tok/s", "tokenizer tok/s", "ratio", "spread"]
    assert all(row["loader tok/s"] > 0 and row["tokenizer tok/s"] > 0 for row in rows)


# ---- settings ----


def test_an_unknown_table_is_refused_with_those_there_are():
    with pytest.raises(errors.UserError, match=r"no table 'presicion': there are precision, .*step$"):
        bench.main(["precision", "presicion"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REPETITIONS", 0, "--repetitions=0"),
        ("DEPTH", 0, "--depth=0"),
        ("COMPILE", "maybe", "--compile=maybe"),
        ("VOCAB_SIZE", -1, "--vocab-size=-1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(monkeypatch, name, value, message):
    monkeypatch.setattr(bench, name, value)
    with pytest.raises(errors.UserError, match=message):
        bench.main(["loss"])


@pytest.mark.parametrize("names", [[], ["loss", "step"], ["loader"]])
def test_missing_data_are_noticed_before_anything_is_measured(monkeypatch, names):
    asked = fake_workers(monkeypatch)
    with pytest.raises(errors.UserError, match="tok_train"):
        bench.main(names)
    assert asked == []
