"""What `export` writes and `import-hf` reads, without PyTorch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import exported

from pangu_locmoe.checkpoint.format import read_config, read_shards, read_state, save_checkpoint
from pangu_locmoe.cli import main
from pangu_locmoe.convert.hf import settings
from pangu_locmoe.convert.hf.exporting import export
from pangu_locmoe.convert.hf.importing import import_hf
from pangu_locmoe.convert.hf.names import name_here, name_there
from pangu_locmoe.errors import CheckpointError, ConfigError, LocMoEError
from pangu_locmoe.model.sigma import PanguSigma
from pangu_locmoe.moe.routers import ROUTERS
from pangu_locmoe.train.evaluate import evaluate_checkpoint

ALL = [*exported.CASES, *exported.PARTS]
FILES = {
    "config.json",
    "configuration_pangu_locmoe.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_pangu_locmoe.py",
    "routing_pangu_locmoe.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


def same_weights(first, second):
    wanted = read_shards(first, "model")
    got = read_shards(second, "model")
    return wanted.keys() == got.keys() and all(
        wanted[name].dtype == got[name].dtype and np.array_equal(wanted[name], got[name])
        for name in wanted
    )


@pytest.mark.parametrize("case", ALL)
def test_there_and_back_is_the_same_checkpoint(tmp_path, case):
    folder = exported.checkpoint(case)
    export(folder, tmp_path / "there")
    assert {file.name for file in (tmp_path / "there").iterdir()} == FILES
    import_hf(tmp_path / "there", tmp_path / "back")
    assert same_weights(folder, tmp_path / "back")
    assert read_config(tmp_path / "back") == read_config(folder)
    assert read_state(tmp_path / "back") == read_state(folder)
    files = [other / "tokenizer.json" for other in (folder, tmp_path / "back")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("case", ["switch, top 2", "local_hash"])
def test_names_are_of_one_weight_each(case):
    names = list(read_shards(exported.checkpoint(case), "model"))
    others = [name_there(name) for name in names]
    assert len(set(others)) == len(names) and [name_here(name) for name in others] == names
    # A base model saves its weights without the prefix.
    assert [name_here(name.removeprefix("model.")) for name in others] == names
    for unknown in ("lm_head.weight", "model.blocks.0.norm1.gamma", "model.word_table.bias"):
        with pytest.raises(CheckpointError, match="no weight of a pangu_locmoe model"):
            name_here(unknown)


def test_verbs_evaluate_to_the_same_loss(tmp_path, capsys):
    folder = exported.checkpoint("switch")
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert main(["export", str(folder), "--format", "hf", "--output", there]) == 0
    assert printed(capsys)[-1].startswith(f"{there}: ")
    assert main(["import-hf", there, "--output", back]) == 0
    assert printed(capsys) == [f"{back}: from {there}"]
    rows = [evaluate_checkpoint(path, 2) for path in (folder, tmp_path / "back")]
    for key in ("step", "validation_loss", "bits_per_byte_by_domain", "other_data"):
        assert rows[0][key] == rows[1][key]
    assert rows[0]["other_data"] == []


def printed(capsys):
    return capsys.readouterr().out.splitlines()


def test_tokens_that_the_tokenizer_has_not_are_not_generated(tmp_path):
    """The vocabulary of a small corpus may be smaller than the model's table."""
    config = exported.config_of("hash")
    own = exported.prepared().tokenizer.vocab_size
    model = config.model.model_copy(update={"vocab_size": own + 3})
    config = config.model_copy(update={"model": model})
    tokenizer = exported.prepared().path / "tokenizer.json"
    save_checkpoint(tmp_path / "larger", config, tokenizer, PanguSigma(config))
    export(tmp_path / "larger", tmp_path / "there")
    values = json.loads((tmp_path / "there" / "generation_config.json").read_text())
    assert values["suppress_tokens"] == [own, own + 1, own + 2]


def test_a_jobs_checkpoint_is_the_whole_model(tmp_path):
    """Two ranks have two experts each of four, and half of a matrix's columns."""
    folder = exported.checkpoint("hash")
    arrays = load_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "job")
    cut = "blocks.0.ffn.w_in"
    halves = np.split(arrays.pop(cut), 2, axis=1)
    for rank, name in enumerate(("model.safetensors", "model-rank1.safetensors")):
        own = {
            key: array
            for key, array in arrays.items()
            if rank == (".experts.2." in key or ".experts.3." in key)
        }
        own[cut] = np.ascontiguousarray(halves[rank])
        slices = json.dumps({cut: [[1, 1, rank]]})
        save_file(own, tmp_path / "job" / name, {"slices": slices})
    change(tmp_path / "job" / "state.json", shards={"model": 2})
    for source, output in ((folder, "one"), (tmp_path / "job", "two")):
        export(source, tmp_path / output)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_large_models_are_in_several_files(tmp_path):
    folder = exported.checkpoint("hash")
    export(folder, tmp_path / "there", shard_bytes=60_000)
    index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "there").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held = {file.name: load_file(file) for file in files}
    assert {name: file for file, arrays in held.items() for name in arrays} == index["weight_map"]
    sizes = [sum(array.nbytes for array in arrays.values()) for arrays in held.values()]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 60_000
    import_hf(tmp_path / "there", tmp_path / "back")
    assert same_weights(folder, tmp_path / "back")


def save_bf16(arrays, file):
    """The format by hand: NumPy has no bf16, which is the upper half of an fp32."""
    header = {}
    data = b""
    for name, array in arrays.items():
        upper = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype("<u2")
        offsets = [len(data), len(data) + upper.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += upper.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_half_precision_comes_back_as_fp32(tmp_path):
    folder = exported.checkpoint("switch")
    export(folder, tmp_path / "there")
    file = tmp_path / "there" / "model.safetensors"
    arrays = load_file(file)
    save_bf16(arrays, file)
    import_hf(tmp_path / "there", tmp_path / "from-bf16")
    save_file({name: array.astype(np.float16) for name, array in arrays.items()}, file)
    import_hf(tmp_path / "there", tmp_path / "from-fp16")
    wanted = read_shards(folder, "model")
    bf16, fp16 = (read_shards(tmp_path / f"from-{kind}", "model") for kind in ("bf16", "fp16"))
    for name, array in wanted.items():
        assert bf16[name].dtype == fp16[name].dtype == np.float32
        upper = (np.ascontiguousarray(array).view(np.uint32) & 0xFFFF0000).view(np.float32)
        np.testing.assert_array_equal(bf16[name], upper)
        np.testing.assert_array_equal(fp16[name], array.astype(np.float16).astype(np.float32))


def test_every_router_of_the_package_is_exported():
    own = {name for name in ROUTERS if ":" not in name}
    assert set(settings.ROUTERS) == own
    assert own == {exported.config_of(case).moe.router for case in exported.CASES}


def test_a_router_of_ones_own_is_refused(tmp_path):
    config = exported.config_of("hash")
    moe = config.moe.model_copy(update={"router": "support.own_routers:Bare"})
    config = config.model_copy(update={"moe": moe})
    tokenizer = exported.prepared().path / "tokenizer.json"
    save_checkpoint(tmp_path / "own", config, tokenizer, PanguSigma(config))
    with pytest.raises(ConfigError, match=r"^moe\.router = 'support.own_routers:Bare': cannot be"):
        export(tmp_path / "own", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_exporting_refuses(tmp_path):
    folder = exported.checkpoint("hash")
    with pytest.raises(CheckpointError, match=r"^--output .*: exists already$"):
        export(folder, tmp_path)
    with pytest.raises(CheckpointError, match="is neither a checkpoint nor a run directory"):
        export(tmp_path, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^--output .*: cannot be written: "):
        export(folder, tmp_path / "file" / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "there"
    export(exported.checkpoint("hash"), folder)
    return folder


@pytest.fixture
def damaged(there, tmp_path):
    shutil.copytree(there, tmp_path / "there")
    return tmp_path / "there"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}))


def drop_a_weight(folder):
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.blocks.0.norm1.bias"]
    save_file(arrays, folder / "model.safetensors")


def add_a_weight(folder):
    arrays = load_file(folder / "model.safetensors")
    save_file({**arrays, "lm_head.weight": np.zeros(2, np.float32)}, folder / "model.safetensors")


def resize(folder):
    arrays = load_file(folder / "model.safetensors")
    name = "model.word_table.weight"
    save_file({**arrays, name: arrays[name][:-1].copy()}, folder / "model.safetensors")


def change_a_merge(folder):
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["merges"] = values["model"]["merges"][:-1]
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read: "),
        (
            lambda folder: change(folder / "config.json", training_config=1),
            "has no training_config",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing or damaged: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read: No such file"),
        (drop_a_weight, r"it has no blocks\.0\.norm1\.beta$"),
        (add_a_weight, "no weight of a pangu_locmoe model"),
        (resize, "is of another model: word_table gives"),
        (change_a_merge, "is not the tokenizer the model was trained with"),
    ],
)
def test_importing_refuses(damaged, tmp_path, damage, said):
    damage(damaged)
    with pytest.raises(LocMoEError, match=said) as caught:
        import_hf(damaged, tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_importing_refuses_an_output_that_is_there(there, tmp_path):
    with pytest.raises(CheckpointError, match=r"^--output .*: exists already$"):
        import_hf(there, tmp_path)
