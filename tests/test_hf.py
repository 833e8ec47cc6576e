"""The export against the model it was made from, in transformers' own hands."""

import copy
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import make_texts
from safetensors import SafetensorError
from test_gpt import SHAPES, random_model, random_tokens

from nanotrain import checkpoint, dataset, errors
from nanotrain.engine import generate_batch
from nanotrain.huggingface import export
from nanotrain.loss import softcap
from nanotrain.store import Store
from scripts import export_hf

transformers = pytest.importorskip(
    "transformers", reason="the extra `export` is missing: tests/run.sh installs it, for Python 3.11 and newer"
)

ODD_TEXTS = [
    "", " ", "<|bos|>", "a <|bos|> b<|bos|><|bos|>", "<|bos", "🙂🏽‍👩‍🚀 日本語 ʼn ﷺ",
    "a\u0000b\u200b\ufffd\ufeff\u2028\x85\x1b", "e\u0301 \u00e9 ſtraße İi \u1e9b\u0323", "\r\n\r \t\n   x  ",
    "'ll 'LL 12345 ٣٤٥ x²", "\U0010ffff\ud7ff\ue000",
]  # fmt: skip
PROMPTS = ([1], [5, 6, 7], list(range(20, 41)))  # after BOS


@pytest.fixture(scope="module", autouse=True)
def _modules_in_a_folder_of_ours(tmp_path_factory):
    """transformers copies the code of a model there before it imports it."""
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


def shaped(name, tokenizer, max_seq_len=96):
    return replace(SHAPES[name], vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len)


def load(folder, plain):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not plain)


def left_padded(prompts, token=0):
    longest = max(map(len, prompts))
    ids = torch.tensor([[token] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


# ---- the same numbers ----


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_greedy_tokens_are_those_of_the_model(name, tokenizer):
    """Of whole sequences and padded prompts, with a cache and without."""
    model = random_model(shaped(name, tokenizer), seed=2)
    converted = export.convert(model, tokenizer)
    tokens = random_tokens(model.config, rows=4)
    torch.testing.assert_close(converted(tokens).logits, model.logits(tokens), rtol=0, atol=1e-4)
    prompts = [[tokenizer.bos, *prompt] for prompt in PROMPTS]
    batch = left_padded(prompts)
    logits = converted(**batch).logits
    for found, prompt in zip(logits, prompts, strict=True):
        expected = model.logits(torch.tensor([prompt]))[0]
        torch.testing.assert_close(found[-len(prompt) :], expected, rtol=0, atol=1e-4)

    expected = [list(text) for text in zip(*generate_batch(model, prompts, 64, temperature=0), strict=True)]
    for options in ({}, {"use_cache": False}):
        found = converted.generate(**batch, max_new_tokens=64, do_sample=False, eos_token_id=None, **options)
        assert found[:, batch["input_ids"].size(1) :].tolist() == expected

    # In bfloat16 it is as far from float32 as the model itself is as it is evaluated.
    with torch.autocast("cpu", torch.bfloat16):
        ours = softcap((model.hidden(tokens) @ model.lm_head.weight.t()).float(), model.config.softcap)
    exact, theirs = model.logits(tokens), copy.deepcopy(converted).to(torch.bfloat16)(tokens).logits.float()
    assert (theirs - exact).square().mean() < 2 * (ours - exact).square().mean()


def test_beams_and_repeated_sequences_keep_what_is_recent(tokenizer):
    model = random_model(shaped("bigram table", tokenizer), seed=2)
    converted = export.convert(model, tokenizer)
    batch = left_padded([[tokenizer.bos, *prompt] for prompt in PROMPTS])
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    with_cache = converted.generate(**batch, **options)
    assert torch.equal(with_cache, converted.generate(**batch, use_cache=False, **options))
    greedy = converted.generate(**batch, **{**options, "num_beams": 1})
    assert not torch.equal(with_cache, greedy)


def test_a_text_in_pieces_is_the_text(tokenizer):
    model = random_model(shaped("bigram table", tokenizer))
    converted, tokens = export.convert(model, tokenizer), random_tokens(model.config)
    cache, found = None, []
    for piece in tokens.split([1, 30, 1, 64], dim=1):
        output = converted(piece, cache=cache, use_cache=True)
        cache = output.cache
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1).detach(), model.logits(tokens), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="DynamicCache"):
        converted(tokens, cache=transformers.StaticCache(converted.config, max_cache_len=96))


# ---- the folder ----


@pytest.fixture(params=["bigram table", "plain"])
def exported(request, tokenizer, tmp_path):
    """(model, folder) of each kind of architecture."""
    model = random_model(shaped(request.param, tokenizer), seed=2)
    export.write(model, tokenizer, tmp_path / "exported")
    return model, tmp_path / "exported"


def test_a_folder_survives_loading_and_saving(exported, tokenizer, tmp_path):
    model, folder = exported
    assert export.check(model, tokenizer, folder) < 1e-4
    first = load(folder, model.config.plain)
    first.save_pretrained(tmp_path / "again")
    second, tokens = load(tmp_path / "again", model.config.plain), random_tokens(model.config)
    assert torch.equal(first(tokens).logits, second(tokens).logits)
    assert type(first).__module__.startswith("transformers.models.nanochat" if model.config.plain else "transformers_m")
    code = {path.name for path in folder.glob("*.py")}
    assert code == (set() if model.config.plain else {"configuration_nanotrain.py", "modeling_nanotrain.py"})


def test_the_tokenizer_gives_the_tokens_of_training(exported, tokenizer):
    model, folder = exported
    other = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    sources = [path.read_text(encoding="utf-8") for path in sorted(export.CARD.parent.parent.glob("*.py"))]
    texts = [*make_texts(100, seed=9), *ODD_TEXTS, *sources]
    expected = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(texts)]
    assert other(texts, verbose=False)["input_ids"] == expected
    assert other(texts, add_special_tokens=False, verbose=False)["input_ids"] == [ids[1:] for ids in expected]
    assert [other.decode(ids, skip_special_tokens=True) for ids in expected] == texts
    assert other.bos_token_id == other.eos_token_id == tokenizer.bos
    assert other.model_max_length == model.config.max_seq_len
    padded = other(["a", "a b c"], padding=True)
    assert (padded["attention_mask"][0][0], padded["input_ids"][0][0]) == (0, tokenizer.pad)
    with_ends = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, split_special_tokens=False)
    assert with_ends("a<|bos|>", add_special_tokens=False)["input_ids"][-1] == tokenizer.bos
    labels = transformers.DataCollatorForLanguageModeling(other, mlm=False)([with_ends("a b<|bos|>"), with_ends("a")])
    assert (labels["labels"] == tokenizer.bos).sum() == 3  # no end is masked


def test_an_export_to_a_full_disk_is_a_sentence(tokenizer, tmp_path, monkeypatch):
    def full(*where, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(errors.RunError, match="No space left"):
        export.write(random_model(shaped("plain", tokenizer)), tokenizer, tmp_path / "a" / "b")


def test_it_does_what_users_of_transformers_ask_for_or_says_that_it_cannot(tokenizer, tmp_path):
    export.write(random_model(shaped("bigram table", tokenizer)), tokenizer, tmp_path)
    model, base = load(tmp_path, False), transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    tokens = torch.arange(9)[None]
    found = model(tokens, output_hidden_states=True)
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(found.hidden_states[-1], base(tokens).last_hidden_state)
    logits, *_ = model(tokens, use_cache=False, return_dict=False)
    assert torch.equal(logits, found.logits)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    assert len(model.generate(tokens, **options).hidden_states) == 3
    with pytest.raises(ValueError, match="attention"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 9, model.config.hidden_size))

    more = tokenizer.vocab_size + 3
    model.resize_token_embeddings(more)
    torch.testing.assert_close(model(tokens).logits[..., :-3], found.logits)
    model(torch.full((1, 2), more - 1))
    model.save_pretrained(tmp_path / "resized")
    assert load(tmp_path / "resized", False).config.vocab_size == more

    tied = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True, tie_word_embeddings=True)
    tied = transformers.AutoModelForCausalLM.from_config(tied, trust_remote_code=True)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


# ---- training ----


def test_loss_and_gradients_are_the_models_with_checkpointing_or_without(tokenizer):
    model = random_model(shaped("bigram table", tokenizer, max_seq_len=24))
    tokens = random_tokens(model.config)
    model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
    expected = {name: parameter.grad.to_dense().clone() for name, parameter in model.named_parameters()}
    loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item()
    converted = copy.deepcopy(export.convert(model, tokenizer)).train()
    for checkpointing in (False, True):
        if checkpointing:
            converted.activation_checkpointing_enable()
        converted.zero_grad()
        found = converted(tokens, labels=tokens).loss
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-4)
        for name, parameter in converted.named_parameters():
            exact = expected[name.removeprefix("model.")]
            torch.testing.assert_close(parameter.grad, exact, rtol=1e-3, atol=1e-4, msg=name)


# ---- the program ----


@pytest.fixture
def run(base_dir, data_dir, tokenizer, monkeypatch, tmp_path):
    """A run named `tiny`, which export_hf is told to export to `out`."""
    run, config = base_dir / "runs" / "tiny", shaped("other constants", tokenizer, max_seq_len=16)
    model, private = random_model(config), ("RUN_NAME", "INIT_FROM", "CORE_BUNDLE", "WANDB_PROJECT", "WANDB_NOTES")
    tokenizer.save(run)
    state = {
        "step": 4,
        "model_config": vars(config),
        "tokenizer_sha256": tokenizer.sha256(),
        "loader": {"next_sequence": 24, "streams": {}},
        "data_dir": str(data_dir),
        "data": dataset.fingerprint(dataset.open_shards(data_dir)),
        "settings": {"DEPTH": 3, "DATA_DIR": "/secret/place", **dict.fromkeys(private, "secret")},
        "val_bpb": 1.25,
        "environment": {"commit": "abc123", "device_name": "an abacus", "packages": {"torch": "9.9"}},
    }
    Store(run).commit(4, checkpoint.pack(model.state_dict(), {}, state))
    monkeypatch.setattr(export_hf, "RUN_NAME", "tiny")
    monkeypatch.setattr(export_hf, "OUT", str(tmp_path / "out"))
    return run


FILES = {
    "LICENSE", "README.md", "config.json", "configuration_nanotrain.py", "generation_config.json", "model.safetensors",
    "modeling_nanotrain.py", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def test_the_program_writes_a_folder_with_its_card(run, tmp_path, capsys):
    core = {"is_core": True, "core_metric": 0.125, "standard_error": 0.01, "max_per_task": 500, "tasks": {}}
    result = {"step": 4, "train_bpb": 1.1, "val_bpb": 1.2, "doc_bpb": 1.3, "core": core}
    (run / "evaluation.json").write_text(json.dumps(result))
    export_hf.main()
    assert "logits equal to" in capsys.readouterr().out
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == FILES
    written = json.loads((out / "config.json").read_text())
    constants = ("final_logit_softcapping", "rope_theta", "attention_gain", "rms_norm_eps", "gate_channels")
    assert [written[name] for name in constants] == [5.0, 50.0, 0.7, 0.05, 5]
    card = (out / "README.md").read_text(encoding="utf-8")
    for part in ("| 1.2000 |", "| 1.3000 |", "| 0.1250 +- 0.0100 |", "abc123", "an abacus", "DEPTH = 3", "9.9"):
        assert part in card, part
    assert "384 tokens in 4 steps" in card
    assert "secret" not in card
    assert "{" not in card
    assert (out / "LICENSE").read_text() == export_hf.LICENCE.read_text()
    with pytest.raises(errors.UserError, match="out holds files"):
        export_hf.main()
    (run / "evaluation.json").write_text(json.dumps({**result, "step": 3}))
    shutil.rmtree(out)
    export_hf.main()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "1.2500" in card  # of the checkpoint itself
    assert "CORE" not in card


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [
        ("config.json", '"attention_gain": 0.7', '"attention_gain": 1.5', "logits differ by"),
        ("tokenizer_config.json", '"split_special_tokens": true', '"split_special_tokens": false', "differently"),
    ],
)
def test_a_folder_that_differs_from_the_model_never_gets_its_name(monkeypatch, tmp_path, name, right, wrong, message):
    write = export.write

    def write_and_spoil(model, tokenizer, folder):
        write(model, tokenizer, folder)
        text = (folder / name).read_text()
        assert right in text
        (folder / name).write_text(text.replace(right, wrong))

    monkeypatch.setattr(export, "write", write_and_spoil)
    with pytest.raises(errors.RunError, match=message) as caught:
        export_hf.main()
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.usefixtures("run")
def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(errors.UserError, match=r"pip install -e '\.\[export\]'"):
        export_hf.main()
    monkeypatch.setattr(export_hf, "OUT", "")
    with pytest.raises(errors.UserError, match="--out=exported"):
        export_hf.main()
