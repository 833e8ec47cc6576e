"""The benchmarks at tiny sizes: that they measure what they say and print what they found. Nothing here is timed."""

import json
import re
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from nanotrain import config, errors, gpt, hardware, loss
from nanotrain.dist import init_distributed
from scripts import bench

FIRST_COLUMNS = {
    "precision": ["dtype", "float32_precision", "products see"],
    "attention": ["kernel"],
    "loss": ["chunk", "compile"],
    "accumulation": ["batch_size", "grad_accum_steps"],
    "batch": ["batch_size"],
    "length": ["batch_size", "max_seq_len"],
    "checkpointing": ["checkpointing"],
    "depth": ["depth"],
    "generation": ["depth", "cache", "texts"],
    "optimizer": ["part"],
    "loader": ["threads", "batch_size", "seq_len"],
    "step": ["part"],
}
NUMBERS = ["ms", "spread", "ratio", "tok/s", "of matmul", "first s", "MiB"]
SETTINGS = {
    "DEPTH": 1, "ASPECT_RATIO": 8, "HEAD_DIM": 8, "VOCAB_SIZE": 300, "DEVICE_BATCH_SIZE": 8, "MAX_SEQ_LEN": 16,
    "LOADER_TOKENS": 500, "REPETITIONS": 2, "COMPILE": "off", "DEVICE": "cpu", "DTYPE": "float32", "SECONDS": 1e-6,
}  # fmt: skip


class InThisProcess:
    """Stands in for a pool of one process."""

    def __init__(self, *arguments):
        self.worker = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        bench.WORKER, future = self.worker, Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, base_dir, data_dir, tokenizer):
    """Tiny sizes and data, one process, one thread, and all that a case changes put back."""
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    threads, chunk_rows = torch.get_num_threads(), dict(loss.CHUNK_ROWS)
    torch.set_num_threads(1)
    tokenizer.save(base_dir / "tokenizer")
    for name, value in {**SETTINGS, "DATA_DIR": str(data_dir), "WORKER": []}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(hardware, "matmul_flops", lambda *arguments: 1e9)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    loss.CHUNK_ROWS.update(chunk_rows)


@pytest.mark.slow
def test_every_table_has_its_columns_and_the_json_is_what_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "OUT", str(tmp_path / "out.json"))
    bench.main(list(FIRST_COLUMNS))
    tables = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert list(tables) == list(FIRST_COLUMNS)
    for name, rows in tables.items():
        assert f"## {name}\n\n| {' | '.join([*FIRST_COLUMNS[name], *NUMBERS])} |\n| --- |" in printed
        works = [row for row in rows if row["ms"] != "failed"]
        assert len(works) >= len(rows) - 2 * (name == "attention")  # kernels of GPUs
        for row in works:
            assert f"\n| {' | '.join(map(str, row.values()))} |\n" in printed
            low, high = map(float, row["spread"].split("-", 1))
            assert low <= row["ms"] <= high
            assert row["MiB"] > 10
    assert {row["grad_accum_steps"] * row["batch_size"] for row in tables["accumulation"]} == {8}
    assert all(row["max_seq_len"] * row["batch_size"] >= 128 for row in tables["length"])
    assert [row["products see"] for row in tables["precision"]] == ["float32", "float32", "bfloat16"]
    assert [row["part"] for row in tables["optimizer"]] == ["all", "Muon", "AdamW", "RowwiseAdam"]
    step = {row["part"]: row["ms"] for row in tables["step"]}
    assert list(step) == ["step", "profiled step", *bench.PARTS]
    assert min(step[part] for part in bench.PARTS if part != "loader") > 0


def test_a_row_is_the_median_the_spread_the_ratio_and_the_share_of_the_rate(monkeypatch):
    def answers(tokens, *seconds):
        return [(9.0, bench.Work(None, tokens, int(1e8))), *(({"": each}, 2e9, 3 * 2**20) for each in seconds)]

    found = [answers(10, 0.1, 0.2, 0.4), answers(20, 0.03, 0.08, 0.05), [RuntimeError("no")]]
    monkeypatch.setattr(bench, "measure", lambda prepare, cases: found)
    first, second, failed = bench.table(None, [{"n": n} for n in range(3)])
    expected = {"n": 0, "ms": 200, "spread": "100-400", "ratio": 1, "tok/s": 50, "of matmul": 0.25, "first s": 9}
    assert first == {**expected, "MiB": 3}
    assert (second["ms"], second["spread"], second["tok/s"]) == (50, "30-80", 400)
    assert second["ratio"] == 0.15, "the median of 0.15, 0.2 and 0.0625 per token"
    assert failed == {"n": 2, "ms": "failed"}


def test_cases_take_turns_and_one_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    asked = []

    def measurement(settings, cache_dir, prepare, case):
        asked.append(case["name"])
        if asked.count("b") == 2 and asked[-1] == "b":
            raise RuntimeError("no")
        return cache_dir

    monkeypatch.setattr(bench, "measurement", measurement)
    a, b, _ = bench.measure(None, [{"name": name} for name in "abc"])
    assert "".join(asked) == "abcabcac"
    assert str(b[1]) == "no"
    assert a[0] != b[0], "a cache of compiled code for each"
    assert "RuntimeError: no" in capsys.readouterr().err


@pytest.mark.slow
def test_cases_run_in_processes_of_their_own_with_the_settings_of_this_one(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in SETTINGS.keys() & config.settings("scripts.bench").keys():
        monkeypatch.setattr(bench, name, SETTINGS[name])
    block = np.ones(100_000_000)  # 800 MB of this process, which must not count as theirs
    found = bench.measure(bench.head, [{"chunk": 4, "compile": "off"}, {"chunk": "none", "compile": "off"}])
    ((first, work), (parts, rate, memory), _), (error,) = found
    assert min(first, parts[""], rate) > 0
    assert work.tokens == 8 * 16
    assert 2**25 < memory < block.nbytes
    assert isinstance(error, TypeError)


def test_generation_without_a_cache_gives_the_same_texts(monkeypatch):
    init = gpt.GPT.init_weights

    def init_varied(model, seed):  # a fresh head gives the same next token everywhere
        init(model, seed)
        model.lm_head.weight.normal_()

    monkeypatch.setattr(gpt.GPT, "init_weights", torch.no_grad()(init_varied))
    cached, plain = (bench.generation(init_distributed("cpu"), 3, cache, 3).function() for cache in ("on", "off"))
    assert cached == plain
    assert (len(cached), len({tuple(text) for text in zip(*cached, strict=True)})) == (16, 3)


def test_the_part_of_an_operation():
    expected = {
        "aten::mm < aten::linear < step": "matmul",
        "aten::mm < _MeanLoss < step": "loss",
        "aten::baddbmm < Optimizer.step#Muon.step < optimizer < step": "optimizer",
        "loader < step": "loader",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward < step": "attention",
        "graph_0_cpp_fused_exp_mul_where_2 < CompiledFunction < step": "attention",
        "graph_0_cpp_fused_add_expand_mul_1 < CompiledFunction < step": "norms and residuals",
        "aten::_fused_rms_norm < aten::rms_norm < step": "norms and residuals",
        "autograd::engine::evaluate_function: MmBackward0 < step": "rest",
    }
    for names, part in expected.items():
        assert part == next(name for name, pattern in bench.PARTS.items() if re.search(pattern, names)), names


@pytest.mark.parametrize(
    ("setting", "value", "names", "message"),
    [
        ("REPETITIONS", 0, ["loss"], "--repetitions=0"),
        ("COMPILE", "maybe", ["loss"], "--compile=maybe"),
        ("DEPTH", 4, ["loss", "los"], "'los'; tables: precision, "),
        ("TOKENIZER_DIR", "/nowhere", [], "tok_train"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(monkeypatch, setting, value, names, message):
    monkeypatch.setattr(bench, setting, value)
    monkeypatch.delattr(bench, "measure")
    with pytest.raises(errors.UserError, match=message):
        bench.main(names)
