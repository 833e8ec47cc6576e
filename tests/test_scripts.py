"""The scripts as a user runs them, from text to samples, and how every program ends on an error."""

import errno
import io
import json
import math
import re
import shutil
import sys
import tempfile

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ALONE
from tokenizers import Tokenizer, models

from nanotrain import checkpoint, config, core_bundle, core_eval, dataset, engine, errors, hardware
from nanotrain.gpt import GPTConfig
from nanotrain.store import Store
from nanotrain.tokenizer import BPETokenizer
from scripts import base_eval, generate, tok_train

PROMPT = "🙂 the old über"


@pytest.fixture(autouse=True)
def _global_state():
    """Puts back what a script that runs in this process changes in it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_deterministic_debug_mode("error" if deterministic else "default")


def texts_of(path):
    return pq.read_table(path).column("text").to_pylist()


def bits_per_byte(model, tokenizer, texts):
    """By the definition: -log2 of the probability of every target that is text, over the bytes of those targets."""
    stream = [token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text))]
    length = model.config.max_seq_len
    rows = [stream[start : start + length + 1] for start in range(0, len(stream) - length, length)]
    rows, sizes = torch.tensor(rows), tokenizer.token_bytes()
    logarithms = torch.log_softmax(model.logits(rows[:, :-1]).double(), -1)
    of_targets = logarithms.gather(-1, rows[:, 1:, None]).squeeze(-1)
    is_text = rows[:, 1:] != tokenizer.bos
    return -of_targets[is_text].sum().item() / math.log(2) / sizes[rows[:, 1:]].sum().item()


@pytest.mark.slow
def test_from_text_to_samples_as_a_user_would(run_script, base_dir, data_dir):
    shutil.copytree(data_dir, base_dir / "data" / "tiny")
    train_texts = [text for number in (0, 1) for text in texts_of(data_dir / f"shard_0000{number}.parquet")]
    val_texts = texts_of(data_dir / "shard_00002.parquet")

    def succeeds(module, *arguments):
        done = run_script(module, *arguments, OMP_NUM_THREADS="1")  # more would wait for each other
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    succeeds("scripts.tok_train", "--vocab-size=300")
    tokenizer = BPETokenizer.load(base_dir / "tokenizer")
    assert tokenizer.vocab_size == 300

    printed = succeeds("scripts.tok_eval")
    table = dict(line.split(maxsplit=1) for line in printed.replace(",", "").splitlines()[2:])
    num_bytes = sum(len(text.encode()) for text in val_texts)
    num_tokens = sum(len(tokenizer.encode(text)) for text in val_texts)
    assert table["validation"].split() == [str(num_bytes), str(num_tokens), f"{num_bytes / num_tokens:.3f}"]

    shape = ("--depth=1", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=16", "--num-streams=4")
    batch = ("--total-batch-size=128", "--device-batch-size=8", "--num-iterations=20")
    flags = (*shape, *batch, "--dtype=float32", "--compile=off", "--run-name=tiny")
    done = run_script("scripts.base_train", *flags, OMP_NUM_THREADS="1", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert "torch" in done.stderr
    assert not re.search("sympy|torch._dynamo", done.stderr)  # an eager run does without the compiler's code, 1.3 s
    run = base_dir / "runs" / "tiny"
    report = run / "report" / "report.html"
    assert f"report     {report}" in done.stdout.splitlines()
    model, _, meta = checkpoint.load_model(run)
    assert meta["step"] == 20
    assert meta["val_bpb"] == pytest.approx(bits_per_byte(model, tokenizer, val_texts), rel=1e-5)

    tasks = base_dir / "tasks"
    succeeds("nanotrain.core_eval", f"--make-bundle={tasks}", "--items-per-task=12")
    options = ("--dtype=float32", "--sample-tokens=5", f"--core-bundle={tasks}", "--core-max-per-task=9")
    printed = succeeds("scripts.base_eval", *options)
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert (result["step"], result["tokens"]) == (20, 20 * 128)
    for split, texts in (("train", train_texts), ("val", val_texts)):
        assert result[f"{split}_bpb"] == pytest.approx(bits_per_byte(model, tokenizer, texts), rel=1e-5)
        assert re.search(rf"^{split} +bpb {result[f'{split}_bpb']:.4f} on ", printed, re.M)
    bundle = core_bundle.read(tasks, 9)
    scores = core_eval.evaluate(model, tokenizer, bundle, ALONE, 3)
    assert result["core"] == {**scores, "max_per_task": 9}
    assert core_eval.headline(scores) in printed
    assert len(result["samples"]) == len(engine.PROMPTS)
    assert f"{result['doc_bpb']:.4f}" in report.read_text(encoding="utf-8")
    assert re.search(rf"^ +bpb {result['compared_bpb']['byte frequencies']:.4f} with byte frequencies ", printed, re.M)
    assert base_eval.compared_bits_per_byte(b"aabc") == {"byte frequencies": 1.5, "xz -9": pytest.approx(128, 0.2)}

    printed = succeeds("scripts.generate", "--run-name=tiny", PROMPT, "--max-new-tokens=12", "--seed=5")
    ids = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    settings = {"temperature": generate.TEMPERATURE, "top_k": generate.TOP_K, "seed": 5}
    tokens = engine.generate(model, ids, 12, **settings, stop=(tokenizer.bos,))
    assert printed == PROMPT + tokenizer.decode(list(tokens)) + "\n"


# ---- errors ----


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, data_dir, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOTRAIN_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tok_train, "DATA_DIR", str(data_dir))
    monkeypatch.setattr(tok_train, "texts", lambda shards: pytest.fail("work that would be lost"))
    with pytest.raises(SystemExit) as caught:
        errors.run(tok_train.main)
    assert caught.value.code == 1
    assert f"error: Not a directory: {tmp_path / 'file'}" in capsys.readouterr().err


def test_without_a_home_folder_it_says_what_to_set(monkeypatch):
    monkeypatch.setenv("NANOTRAIN_DIR", "~nosuchuser/x")  # as ~ is for a user that the system does not know
    with pytest.raises(errors.UserError, match=r"^~nosuchuser/x: .* set NANOTRAIN_DIR"):
        tok_train.main()


@pytest.mark.parametrize("name", ["", "none"])
@pytest.mark.parametrize("script", [base_eval, generate], ids=["base_eval", "generate"])
def test_without_a_run_there_is_no_usable_checkpoint(script, name, monkeypatch):
    monkeypatch.setattr(script, "RUN_NAME", name)
    with pytest.raises(errors.CheckpointError, match=r"python -m scripts.base_train"):
        script.main()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.UserError("a"), 2, "error: a"),
        (errors.CheckpointError("b"), 3, "error: b"),
        (errors.MemoryLimitError("c"), 5, "error: c"),
        (errors.DataError("d"), 6, "error: d"),
        (errors.NonFiniteError("e"), 7, "error: e"),
        (KeyboardInterrupt(), 130, "stopped"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "error: Permission denied: /x/y"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_a_user_can_cause_has_its_exit_code_and_one_line(error, code, message, capsys, monkeypatch):
    def fail():
        raise error

    for rank, prefix in (("0", ""), ("3", "[rank 3] ")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            errors.run(int, fail)
        assert caught.value.code == code
        assert capsys.readouterr().err == f"{prefix}{message}\n"


# ---- evaluation and generation ----


@pytest.fixture
def trained(base_dir, data_dir, tokenizer, monkeypatch):
    """(run folder, model) of random weights in a run named `tiny`."""
    monkeypatch.setattr(base_eval, "REPORT", False)
    run, config = base_dir / "runs" / "tiny", GPTConfig(tokenizer.vocab_size, 16, 1, 2, 2, 8)
    model = checkpoint.build_model(config, "cpu")
    model.init_weights(0)
    tokenizer.save(run)
    state = {
        "step": 4,
        "model_config": vars(config),
        "tokenizer_sha256": tokenizer.sha256(),
        "total_batch_size": 64,
        "loader": {"next_sequence": 24, "streams": {}},
        "data_dir": str(data_dir),
        "data": dataset.fingerprint(dataset.open_shards(data_dir)),
    }
    Store(run).commit(4, checkpoint.pack(model.state_dict(), {}, state))
    return run, model


def evaluate(monkeypatch, **settings):
    """Run base_eval in this process with these settings."""
    with monkeypatch.context() as patch:
        for name, value in {"DTYPE": "float32", "SAMPLE_TOKENS": 1, **settings}.items():
            patch.setattr(base_eval, name, value)
        base_eval.main()


@pytest.mark.usefixtures("trained")
def test_an_evaluation_of_nothing_is_refused(monkeypatch):
    for settings, message in (
        ({"EVAL_TOKENS": 15}, "--eval-tokens=15"),
        ({"DEVICE_BATCH_SIZE": 0}, "--device-batch-size=0"),
        ({"BEST": True, "STEP": 4}, "--best and --step=4"),
        ({"STEP": 3}, "--step=3"),
        ({"CORE_BUNDLE": "/nowhere"}, "/nowhere"),
    ):
        with pytest.raises(errors.UserError, match=message):
            evaluate(monkeypatch, **settings)


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_does(trained, run_script, data_dir, tmp_path, monkeypatch):
    run, tasks = trained[0], tmp_path / "tasks"
    core_bundle.make(tasks, data_dir / "shard_00002.parquet", 8)
    settings = {"STEP": 4, "DTYPE": "float32", "SAMPLE_TOKENS": 1, "CORE_BUNDLE": str(tasks), "REPORT": False}
    options = [f"{config.flag_of(name)}={value}" for name, value in settings.items()]
    done = run_script("scripts.base_eval", *options, ranks=2, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    two = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    evaluate(monkeypatch, **settings)
    one = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for split in ("train_bpb", "val_bpb", "doc_bpb"):
        assert two.pop(split) == pytest.approx(one.pop(split), rel=1e-6)
    assert two == one


def test_without_the_public_tasks_the_rest_is_evaluated(trained, monkeypatch, capsys):
    def fetch():
        raise errors.DataError("no host can be reached")

    monkeypatch.setattr(core_bundle, "fetch", fetch)
    evaluate(monkeypatch, EVAL_DOCUMENT_BYTES=0)
    assert "CORE skipped" in capsys.readouterr().out
    result = json.loads((trained[0] / "evaluation.json").read_text(encoding="utf-8"))
    assert result.keys() == {"step", "tokens", "train_bpb", "val_bpb", "samples"}


def test_characters_of_several_tokens_are_printed_whole_and_at_once(trained, tokenizer, monkeypatch):
    def noting(text="", end="\n", flush=False):
        assert flush or end == "\n"
        printed.append(text)

    text, token_of, printed = "a日🙂\u0301é\n", {data: token for token, data in enumerate(tokenizer.byte_strings())}, []
    steps = [[token_of[bytes([byte])]] for byte in (text + "日").encode()[:-1]]
    monkeypatch.setattr(generate, "print", noting, raising=False)
    monkeypatch.setattr(generate, "generate_batch", lambda *arguments, **options: iter(steps))
    generate.answer(trained[1], tokenizer, PROMPT)
    assert printed == [PROMPT, *text, "\ufffd"]  # the last character was cut off and is shown as such


@pytest.mark.usefixtures("trained")
def test_every_line_of_standard_input_is_a_prompt(monkeypatch, capsys):
    lines = io.BytesIO("the river\n\n\nüber \xff\nlast".encode("latin-1").replace(b"\xfc", "ü".encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, "utf-8"))
    monkeypatch.setattr(generate, "MAX_NEW_TOKENS", 0)
    errors.run(generate.main)
    captured = capsys.readouterr()
    assert captured.out == "the river\nüber \ufffd\nlast\n"
    assert "tiny, step 4" in captured.err


def test_of_a_long_prompt_only_what_the_model_can_see_is_encoded(trained, tokenizer, monkeypatch, capsys):
    encode, lengths = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda text: lengths.append(len(text)) or encode(text))
    monkeypatch.setattr(generate, "MAX_NEW_TOKENS", 4)
    found = []
    for prompt in ("river " * 10**5, "river " * 100):
        generate.answer(trained[1], tokenizer, prompt)
        found.append(capsys.readouterr().out.removeprefix(prompt))
    assert max(lengths) < 1000
    assert found[0] == found[1]


def test_each_sample_of_a_prompt_has_a_seed_of_its_own(trained, tokenizer, monkeypatch, capsys):
    _, model = trained
    monkeypatch.setattr(generate, "NUM_SAMPLES", 3)
    monkeypatch.setattr(generate, "MAX_NEW_TOKENS", 8)
    generate.answer(model, tokenizer, PROMPT)
    ids = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    tokens = [list(engine.generate(model, ids, 8, seed=generate.SEED + number)) for number in range(3)]
    assert capsys.readouterr().out == "".join(f"{PROMPT}{tokenizer.decode(one)}\n" for one in tokens)
    assert len({*map(tuple, tokens)}) == 3


@pytest.mark.parametrize(("name", "value"), [("TEMPERATURE", -0.1), ("TOP_P", 0.0), ("NUM_SAMPLES", 0)])
def test_settings_of_a_draw_that_cannot_be_are_refused(monkeypatch, name, value):
    monkeypatch.setattr(generate, name, value)
    with pytest.raises(errors.UserError, match=re.escape(f"--{name.lower().replace('_', '-')}={value}: ")):
        generate.main()


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.usefixtures("trained")
def test_ctrl_c_ends_a_line_of_a_terminal_and_sigterm_the_program(monkeypatch):
    come = iter([KeyboardInterrupt, KeyboardInterrupt, errors.Terminated])

    def read(text):
        raise next(come)

    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setattr(generate, "input", read, raising=False)
    with pytest.raises(SystemExit, match="130"):
        errors.run(generate.main)
    assert list(come) == []


@pytest.mark.usefixtures("trained")
def test_base_eval_of_a_run_that_cannot_be_written_ends_before_the_work(monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(base_eval, "text_bits_per_byte", lambda *inputs: pytest.fail("worked in vain"))
    with pytest.raises(errors.RunError, match=r"Read-only file system: .*tiny"):
        base_eval.main()


def test_tok_train_does_not_overwrite_the_tokenizer_of_another_program(tmp_path, data_dir, monkeypatch):
    theirs = Tokenizer(models.BPE()).to_str()
    (tmp_path / "tokenizer.json").write_text(theirs)
    monkeypatch.setattr(tok_train, "DATA_DIR", str(data_dir))
    monkeypatch.setattr(tok_train, "TOKENIZER_DIR", str(tmp_path))
    with pytest.raises(errors.DataError, match=r"<\|bos\|>"):
        tok_train.main()
    assert (tmp_path / "tokenizer.json").read_text() == theirs


@pytest.mark.usefixtures("own_process_state")
def test_the_vocabulary_follows_the_depth_or_the_minutes(monkeypatch):
    monkeypatch.setattr(hardware, "training_flops_per_second", lambda *device: 1e11)
    for depth, minutes, vocab_size in ((12, 0.0, 32768), (2, 9e9, 4096), (0, 3.0, 4096), (0, 9e9, 32768)):
        monkeypatch.setattr(tok_train, "DEPTH", depth)
        monkeypatch.setattr(tok_train, "TARGET_MINUTES", minutes)
        assert tok_train.planned_vocab_size() == vocab_size
    monkeypatch.setattr(tok_train, "TARGET_MINUTES", 0.0)
    with pytest.raises(errors.UserError, match="--target-minutes"):
        tok_train.planned_vocab_size()
