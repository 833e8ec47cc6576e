"""The benchmarks at tiny sizes: that they measure what they say and print what they found. Nothing here is timed."""

import json
from concurrent.futures import Future
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanotrain import checkpoint, errors, hardware, loss
from nanotrain.dist import init_distributed
from scripts import bench

LABELS = {
    "precision": ["precision", "dtypes"],
    "attention": ["kernel", "compile"],
    "loss": ["chunk", "compile"],
    "accumulation": ["grad_accum_steps", "batch_size"],
    "batch": ["batch_size"],
    "length": ["seq_len", "batch_size"],
    "checkpointing": ["checkpointing"],
    "depth": ["depth"],
    "generation": ["depth", "method", "texts"],
    "optimizer": ["part"],
    "loader": ["threads", "what"],
    "step": ["part"],
}
NUMBERS = ["ms", "spread", "ratio", "tok/s", "of matmul", "MiB"]
SETTINGS = {
    "DEPTH": 1, "ASPECT_RATIO": 8, "HEAD_DIM": 8, "VOCAB_SIZE": 300, "DEVICE_BATCH_SIZE": 8, "MAX_SEQ_LEN": 16,
    "LOADER_TOKENS": 500, "REPETITIONS": 2, "COMPILE": "off", "DEVICE": "cpu", "DTYPE": "float32", "SECONDS": 1e-6,
}  # fmt: skip


class InThisProcess:
    """Stands in for a pool of one process."""

    def __init__(self, *arguments):
        self.worker = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, case):
        bench.WORKER, future = self.worker, Future()
        try:
            future.set_result(function(case))
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
    for name, value in {**SETTINGS, "DATA_DIR": str(data_dir)}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "WORKER", {})
    monkeypatch.setattr(bench, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(hardware, "matmul_flops", lambda *arguments: 1e9)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    loss.CHUNK_ROWS.update(chunk_rows)


@pytest.mark.slow
def test_every_table_has_its_columns_and_the_json_is_what_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "OUT", str(tmp_path / "out.json"))
    bench.main(list(LABELS))
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (found["environment"]["device"], found["settings"]["VOCAB_SIZE"]) == ("cpu", 300)
    printed = capsys.readouterr().out
    tables = found["tables"]
    assert list(tables) == list(LABELS)
    for name, rows in tables.items():
        assert f"## {name}\n\n| {' | '.join([*LABELS[name], *NUMBERS])} |\n| --- |" in printed
        for row in rows:
            values = [value if isinstance(value, str) else f"{value:,}" for value in row.values()]
            assert f"\n| {' | '.join(values)} |\n" in printed
            low, high = map(float, row["spread"].split("-", 1))
            assert low <= row["ms"] <= high
            assert row["MiB"] > 10
    assert {row["grad_accum_steps"] * row["batch_size"] for row in tables["accumulation"]} == {8}
    assert all(row["seq_len"] * row["batch_size"] >= 128 for row in tables["length"])
    seen = {row["precision"]: row["dtypes"] for row in tables["precision"]}
    assert seen == {"float32": "float32", "float32, oneDNN": "float32", "bfloat16": "bfloat16"}
    parts = ["all", "Muon", "AdamW", "RowwiseAdam", "orthogonalization"]
    assert [row["part"] for row in tables["optimizer"]] == parts
    assert [row["part"] for row in tables["optimizer"] if row["of matmul"] != "-"] == ["orthogonalization"]
    step = {row["part"]: row["ms"] for row in tables["step"]}
    assert list(step) == ["step", "profiled step", *bench.PARTS]
    assert min(step[part] for part in bench.PARTS if part != "loader") > 0


def test_a_row_is_the_median_the_spread_the_ratio_and_the_share_of_the_rate(monkeypatch):
    def measurements(*seconds):
        return [9.0, *({"seconds": {"": each}, "rate": 2e9, "memory": 3 * 2**20} for each in seconds)]

    found = [measurements(0.1, 0.2, 0.4), measurements(0.03, 0.08, 0.05), [9.0, RuntimeError("no")]]
    monkeypatch.setattr(bench, "measure", lambda cases, repetitions: found)
    first, second, failed = bench.table(
        [bench.Case({"n": n}, None, tokens, int(1e8)) for n, tokens in enumerate((10, 20, 30))]
    )
    assert first == {"n": 0, "ms": 200, "spread": "100-400", "ratio": 1, "tok/s": 50, "of matmul": 0.25, "MiB": 3}
    assert (second["ms"], second["spread"], second["tok/s"]) == (50, "30-80", 400)
    assert second["ratio"] == 0.15, "the median of 0.15, 0.2 and 0.0625 per token"
    assert (failed["ms"], failed["ratio"], list(failed)) == ("failed", "-", list(first))


def test_cases_take_turns_and_one_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    asked = []

    def answer(case):
        asked.append(case.labels["name"])
        if asked.count("b") == 2 and asked[-1] == "b":
            raise RuntimeError("no")
        return 0.5

    monkeypatch.setattr(bench, "answer", answer)
    *_, b, _ = bench.measure([bench.Case({"name": name}, None) for name in "abc"], 2)
    assert "".join(asked) == "abcabcac"
    assert (b[0], str(b[1])) == (0.5, "no")
    assert "RuntimeError: no" in capsys.readouterr().err


def test_compile_seconds_are_those_of_new_processes_with_an_empty_cache_and_a_full_one(monkeypatch):
    folders = []
    monkeypatch.setattr(bench, "answer", lambda case: folders.append(case.cache_dir) or len(folders))
    cases = list(bench.compile_cases())
    assert [tuple(case.labels.values()) for case in cases] == [("off", 1, 4), ("block", 2, 5), ("whole", 3, 6)]
    assert folders[:3] == folders[3:]
    assert len(set(folders)) == 3


@pytest.mark.slow
def test_cases_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    block = np.ones(100_000_000)  # 800 MB of this process, which must not count as theirs
    works = [partial(bench.prepare_loss, chunk, False, (8, 8, 300)) for chunk in (4, "none")]
    cases = [bench.Case({}, prepare, dtype="float32", device="cpu") for prepare in works]
    (first, measurement), (error,) = bench.measure(cases, 1)
    assert min(first, measurement["seconds"][""], measurement["rate"]) > 0
    assert 2**25 < measurement["memory"] < block.nbytes
    assert isinstance(error, TypeError)


# ---- the alternatives ----


def test_generation_without_a_cache_gives_the_same_texts_and_needs_the_same_products(monkeypatch):
    models, build, config = [], checkpoint.build_model, bench.training(depth=3).model
    monkeypatch.setattr(checkpoint, "build_model", lambda *arguments: models.append(build(*arguments)) or models[-1])
    methods = ("cache", "no cache", "products alone")
    runs = [bench.prepare_generation(config, method, 3, init_distributed("cpu")) for method in methods]
    for model in models:
        model.lm_head.weight.mul_(1000)  # a fresh head says nothing
    steps = runs[0]()
    assert runs[1]() == steps
    assert (len(steps), len({tuple(text) for text in zip(*steps, strict=True)})) == (16, 3)
    with FlopCounterMode(display=False) as counter:
        runs[2]()
    assert counter.get_total_flops() == 2 * 3 * 16 * sum(matrix.numel() for matrix in bench.matrices(models[2]))


@pytest.mark.parametrize("kernel", ["softmax", "exp"])
def test_explicit_attention_is_attention(kernel):
    shape, generator = (2, 3, 7, 4), torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    expected, found = (bench.KERNELS[name](*inputs, 0.5) for name in ("SDPA", kernel))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(shape, generator=generator)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)))


def test_the_loss_on_all_logits_is_the_loss():
    generator = torch.Generator().manual_seed(0)
    arguments = torch.randn(9, 8, generator=generator), torch.randn(30, 8, generator=generator), torch.arange(9), 15.0
    torch.testing.assert_close(bench.full_loss(*arguments), loss.mean_loss(*arguments, loss.softmax_gradient))


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
        (["autograd::engine::evaluate_function: MmBackward0", "step"], "rest"),
        (["step"], "rest"),
    ],
)
def test_the_part_of_an_operation(names, part):
    assert bench.part_of(names) == part


# ---- settings ----


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("REPETITIONS", 0, "--repetitions=0"), ("DEPTH", 0, "--depth=0"), ("COMPILE", "maybe", "--compile=maybe")],
)
def test_settings_and_tables_that_measure_nothing_are_refused(monkeypatch, setting, value, message):
    monkeypatch.setattr(bench, setting, value)
    with pytest.raises(errors.UserError, match=message):
        bench.main(["loss"])
    with pytest.raises(errors.UserError, match="'presicion': there are precision, "):
        bench.main(["precision", "presicion"])


@pytest.mark.parametrize("names", [[], ["loss", "step"], ["loader"]])
def test_missing_data_are_noticed_before_anything_is_measured(monkeypatch, names, tmp_path):
    monkeypatch.setattr(bench, "TOKENIZER_DIR", str(tmp_path))
    monkeypatch.delattr(bench, "measure")
    with pytest.raises(errors.DataError, match="tok_train"):
        bench.main(names)
