"""An exported model in Transformers says what it says here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import exported, tiny

from pangu_locmoe.checkpoint.format import read_config, read_shards
from pangu_locmoe.checkpoint.restore import restore_generator
from pangu_locmoe.config import SampleConfig
from pangu_locmoe.convert.hf.exporting import export
from pangu_locmoe.convert.hf.importing import import_hf
from pangu_locmoe.data.packing import positions_and_segments

# Where Transformers puts the model's code; nothing is fetched.
os.environ["HF_HOME"] = str(tiny.corpus() / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
NEEDS = "needs pip install '.[export]'"
torch = pytest.importorskip("torch", reason=NEEDS)
transformers = pytest.importorskip("transformers", reason=NEEDS)
torch.set_num_threads(1)

ALL = [*exported.CASES, *exported.PARTS]
PROMPTS = ["the router sends", "for token in tokens:\n", "专家"]


@functools.cache
def folder(case):
    output = tiny.corpus() / "huggingface-models" / case.replace(" ", "-")
    export(exported.checkpoint(case), output)
    return output


@functools.cache
def model_of(case, **arguments):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder(case), trust_remote_code=True, **arguments
    )
    return loaded.eval()


@functools.cache
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(folder("hash"), trust_remote_code=True)


@torch.no_grad()
def logits(model, tokens_BS, **arguments):
    return model(torch.from_numpy(tokens_BS.astype(np.int64)), **arguments).logits.numpy()


@torch.no_grad()
def continued(model, prompts, **arguments):
    """Ids after the prompts, which are padded on the left, without what follows `<eod>`."""
    batch = tokenizer()(prompts, return_tensors="pt", padding=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = model.generate(**inputs, do_sample=False, **arguments)[:, inputs["input_ids"].shape[1] :]
    return [before_end(row) for row in rows.tolist()]


def before_end(row):
    return row[: row.index(0)] if 0 in row else row


@pytest.mark.parametrize("case", ALL)
def test_logits_are_those_of_evaluate(case):
    """Documents that end inside of a sequence, and every domain."""
    config = read_config(exported.checkpoint(case))
    tokens_BS = exported.texts(config)
    domains_B = np.arange(len(tokens_BS)) % len(config.domains)
    wanted = exported.logits(case, tokens_BS, domains_B)
    got = logits(model_of(case), tokens_BS, domain_ids=torch.from_numpy(domains_B))
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("case", ["hash by domain", "locmoe_plus"])
def test_greedy_tokens_are_those_of_generate(case):
    """With a cache and padding on the left, each of its domain."""
    generator = restore_generator(exported.checkpoint(case))
    domains = [0, 2, 1]
    wanted = generator(PROMPTS, domains, SampleConfig(tokens=10, temperature=0.0), 1)
    rows = continued(model_of(case), PROMPTS, max_new_tokens=10, domain_ids=torch.tensor(domains))
    texts = [generator.tokenizer.decode(row) for row in rows]
    # Half a character at the end is for the next token to complete.
    assert [text.rstrip("\ufffd") for text in texts] == [text.rstrip("\ufffd") for text in wanted]


@pytest.mark.parametrize("case", ["locmoe", "switch, top 2"])
def test_a_cache_changes_nothing(case):
    """Step by step as at once, where documents end on the way and rows begin later."""
    model = model_of(case)
    tokens_BS = torch.from_numpy(exported.texts(model_config(case)).astype(np.int64))
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[2, :5] = 0
    real_BS = mask_BS.bool()
    with torch.no_grad():
        wanted = model(tokens_BS, mask_BS).logits
        cache = None
        parts = []
        for start, stop in ((0, 7), (7, 8), (8, 21), (21, 22), (22, 32)):
            output = model(tokens_BS[:, start:stop], mask_BS[:, :stop], past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
    np.testing.assert_allclose(torch.cat(parts, 1)[real_BS], wanted[real_BS], atol=1e-5)


def model_config(case):
    return read_config(exported.checkpoint(case))


def test_padding_on_the_left_changes_nothing():
    model = model_of("switch, top 2")
    tokens_BS = exported.texts(model_config("switch, top 2"))[:, :20]
    wanted = logits(model, tokens_BS)
    padded = np.concatenate([np.zeros((len(tokens_BS), 6), np.int32), tokens_BS], 1)
    mask_BS = torch.ones(padded.shape, dtype=torch.int64)
    mask_BS[:, :6] = 0
    got = logits(model, padded, attention_mask=mask_BS)[:, 6:]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("reset", [True, False])
def test_positions_are_those_of_the_packing(reset):
    tokens_BS = exported.texts(model_config("hash"))
    wanted, _ = positions_and_segments(tokens_BS, 0, reset)
    model = model_of("hash")
    model.config.reset_at_document_end = reset
    try:
        got = model.model.positions(torch.from_numpy(tokens_BS.astype(np.int64)))
    finally:
        model.config.reset_at_document_end = True
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_ways_to_generate_agree(arguments):
    model = model_of("switch")
    prompts = PROMPTS[:1] if "prompt_lookup_num_tokens" in arguments else PROMPTS
    beams = {"num_beams": arguments.get("num_beams", 1)}
    wanted = continued(model, prompts, max_new_tokens=10, **beams)
    assert continued(model, prompts, max_new_tokens=10, **arguments) == wanted


def test_the_domain_is_that_of_the_configuration_or_of_the_call():
    case = "hash by domain"
    tokens_BS = exported.texts(model_config(case))
    ours = [exported.logits(case, tokens_BS, np.full(4, domain)) for domain in (0, 2)]
    np.testing.assert_allclose(logits(model_of(case), tokens_BS), ours[0], atol=1e-5)
    np.testing.assert_allclose(logits(model_of(case), tokens_BS, domain_ids=2), ours[1], atol=1e-5)
    other = model_of(case, default_domain_id=2)
    assert other.config.domains == ["en", "zh", "code"]
    np.testing.assert_allclose(logits(other, tokens_BS), ours[1], atol=1e-5)
    with pytest.raises(ValueError, match=r"^domain_ids = 3: must be from 0 to 2$"):
        logits(other, tokens_BS, domain_ids=3)


def test_text_is_tokenized_as_here():
    own = exported.prepared().tokenizer
    for text in ("the router sends <eod> back", "专家 café\n\n", ""):
        ids = tokenizer()(text)["input_ids"]
        assert ids == [own.end_of_document, *own.encode(text)]
        assert tokenizer().decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("case", ["locmoe, prior", "local_hash by domain"])
def test_save_pretrained_comes_back(tmp_path, case):
    model = model_of(case)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    tokenizer().save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True
    )
    tokens_BS = exported.texts(model_config(case))
    np.testing.assert_array_equal(logits(again.eval(), tokens_BS), logits(model, tokens_BS))
    import_hf(tmp_path / "saved", tmp_path / "back")
    wanted = read_shards(exported.checkpoint(case), "model")
    got = read_shards(tmp_path / "back", "model")
    assert wanted.keys() == got.keys()
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)


def test_it_can_be_fine_tuned():
    """The loss is the mean next-token loss, and everything that is trained here has a gradient."""
    model = model_of("locmoe, prior")
    tokens_BS = torch.from_numpy(exported.texts(model_config("locmoe, prior")).astype(np.int64))
    output = model(tokens_BS, labels=tokens_BS)
    losses = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()
    )
    assert output.loss.item() == pytest.approx(losses.item(), rel=1e-6)
    output.loss.backward()
    without = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None and ".experts." not in name
    ]
    model.zero_grad()
    assert without == []


def test_half_precision_is_near():
    tokens_BS = exported.texts(model_config("hash"))
    wanted = logits(model_of("hash"), tokens_BS)
    got = logits(model_of("hash", dtype=torch.bfloat16), tokens_BS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=0.1 * np.abs(wanted).max())


def test_a_document_beyond_the_positions_is_refused():
    model = model_of("hash")
    tokens_BS = np.ones((1, 33), np.int32)
    with pytest.raises(ValueError, match=r"^position 32 of a document: the model has positions up"):
        logits(model, tokens_BS)
    tokens_BS[0, 20] = 0
    assert logits(model, tokens_BS).shape == (1, 33, 400)


TASK = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.mark.slow
def test_the_evaluation_harness_measures_what_evaluate_does(tmp_path):
    """Bits per byte of two texts by lm-evaluation-harness, as docs/export.md runs it."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    texts = ["the router sends every token", "路由把每个词元送到 its expert"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = TASK.replace("FILE", str(tmp_path / "texts.jsonl"))
    (tmp_path / "own_text.yaml").write_text(task, encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={folder('locmoe_plus')},trust_remote_code=True,add_bos_token=False"]
    command += ["--include_path", str(tmp_path), "--tasks", "own_text", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    measured = json.loads(file.read_text(encoding="utf-8"))["results"]["own_text"]
    nats = 0.0
    for text in texts:
        ids = exported.prepared().tokenizer.encode(text)
        tokens_BS = np.array([[0, *ids[:-1]]], np.int32)
        logits_SV = exported.logits("locmoe_plus", tokens_BS, np.zeros(1))[0].astype(float)
        nats += (np.log(np.exp(logits_SV).sum(1)) - logits_SV[np.arange(len(ids)), ids]).sum()
    bits = nats / np.log(2) / sum(len(text.encode()) for text in texts)
    assert measured["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
