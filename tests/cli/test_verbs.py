"""The command line: exit codes, what each verb prints, and errors of one line without a
traceback.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import yaml
from support import tiny

from pangu_locmoe import __version__
from pangu_locmoe.checkpoint.format import read_config, save_checkpoint
from pangu_locmoe.cli import main
from pangu_locmoe.data.prepared import prepare
from pangu_locmoe.model.sigma import PanguSigma

VERBS = (
    "prepare",
    "train",
    "evaluate",
    "generate",
    "capacity",
    "report",
    "inherit",
    "extract",
    "export",
    "import-hf",
    "check",
    "simulate",
)


@pytest.fixture(scope="module")
def checkpoint():
    """A checkpoint of random weights."""
    config = tiny.tiny_config(moe={"router": "hash"})
    folder = tiny.corpus() / "cli"
    save_checkpoint(
        folder, config, prepare(config, False).path / "tokenizer.json", PanguSigma(config)
    )
    return folder


@pytest.fixture
def config_file(tmp_path):
    return tiny.write(tiny.tiny_config(moe={"router": "hash"}), tmp_path)


def exit_code(*arguments: object) -> int:
    """Of `main`, or of the argument parser that leaves by itself."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        return leave.code


def refused(capsys, *arguments: object) -> str:
    """The one line on standard error of a call that ends with exit code 2 and prints nothing
    else.
    """
    assert exit_code(*arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    lines = error.splitlines()
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_help_lists_every_verb(capsys):
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {verb}(?: |$)", text, re.MULTILINE) for verb in VERBS)
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(capsys, verb):
    assert exit_code(verb, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pangu-locmoe {verb}")
    folder = Path(__file__).parents[2] / "pangu_locmoe" / "cli"
    sources = [
        (folder / f"{name}.py").read_text("utf-8") for name in ("runs", "models", "clusters")
    ]
    _, after = re.split(rf'add_verb\(\s*verbs,\s*"{verb}"', "\n".join(sources))
    flags = re.findall(r'add_argument\(\s*"(--[a-z-]+)"', after.split("\n\n\n")[0])
    assert flags or verb in ("prepare", "report")
    for flag in flags:
        assert flag in text


def test_the_module_and_the_console_script_are_the_same():
    module = subprocess.run(
        [sys.executable, "-m", "pangu_locmoe", "--help"],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    script = "import sys; from importlib.metadata import EntryPoint; sys.argv[0] = 'pangu-locmoe'; "
    script += (
        f"sys.exit(EntryPoint('pangu-locmoe', {_entry_point()!r}, 'console_scripts').load()())"
    )
    console = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert (
        (module.returncode, module.stdout)
        == (console.returncode, console.stdout)
        == (0, module.stdout)
    )
    assert module.stdout.startswith("usage: pangu-locmoe")


def _entry_point() -> str:
    text = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    (name,) = re.findall(r"pangu-locmoe = ([\w.:]+)", text)
    return name


def test_errors_of_the_process_are_one_line():
    done = tiny.cli("train", "absent.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pangu-locmoe: absent.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: VERB"),
        (["dance"], "invalid choice: 'dance'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "c.yaml", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train", "c.yaml", "--resume", "maybe"], "invalid choice: 'maybe'"),
        (["generate", "run", "--tokens", "many"], "invalid int value: 'many'"),
        (["evaluate", "run", "--seq", "3"], "unrecognized arguments: --seq"),
    ],
)
def test_bad_usage_is_one_line(capsys, arguments, message):
    line = refused(capsys, *arguments)
    assert (
        line.startswith("pangu-locmoe")
        and message in line
        and line.endswith("--help lists what there is")
    )


def test_a_configuration_that_is_not_there(capsys):
    for verb in ("train", "prepare"):
        assert (
            refused(capsys, verb, "/absent/c.yaml")
            == "pangu-locmoe: /absent/c.yaml: cannot be read: No such file or directory"
        )


def test_an_unknown_key_names_the_nearest(capsys, config_file):
    line = refused(capsys, "train", config_file, "--set", "moe.rooter=hash")
    assert line == "pangu-locmoe: moe.rooter = 'hash': unknown key; did you mean moe.router?"
    assert "moe.router = 'hach'" in refused(
        capsys, "train", config_file, "--set", "moe.router=hach"
    )
    assert "must be KEY=VALUE" in refused(capsys, "prepare", config_file, "--set", "moe.router")


def test_a_corpus_that_is_not_there(capsys, tmp_path, config_file):
    values = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    values["data"]["sources"][1]["path"] = "/absent/corpus"
    config_file.write_text(yaml.safe_dump(values), encoding="utf-8")
    for verb in (["prepare", config_file], ["train", config_file, "--run-dir", tmp_path / "run"]):
        line = refused(capsys, *verb)
        assert line.startswith("pangu-locmoe: data.sources") and "/absent/corpus" in line
    # What could not begin is not in the way of the next try.
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_taken(capsys, config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}", encoding="utf-8")
    line = refused(capsys, "train", config_file, "--run-dir", tmp_path / "run")
    assert line == (
        f"pangu-locmoe: --run-dir {tmp_path / 'run'}: holds a run already; give another "
        "directory, or --resume auto to continue it"
    )


def test_a_run_directory_that_cannot_be_made(capsys, config_file, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert (
        exit_code("train", config_file, "--run-dir", tmp_path / "file" / "run", "--no-progress")
        == 2
    )
    assert re.fullmatch(
        r"pangu-locmoe: .*/file/run.* cannot be written: Not a directory",
        capsys.readouterr().err.splitlines()[-1],
    )


def test_what_is_not_a_checkpoint(capsys, tmp_path, config_file):
    wanted = f"pangu-locmoe: {tmp_path} is neither a checkpoint nor a run directory with one"
    new = tmp_path / "new"
    calls = (
        ["evaluate", tmp_path],
        ["generate", tmp_path],
        ["extract", tmp_path, "--domain", "en", "--output", new],
        ["inherit", tmp_path, "--config", config_file, "--output", new],
    )
    for call in calls:
        assert refused(capsys, *call) == wanted
    assert (
        exit_code("train", config_file, "--run-dir", tmp_path / "run", "--init-from", tmp_path) == 2
    )
    assert capsys.readouterr().err == wanted + "\n"


@pytest.mark.parametrize(
    "flag, value, rule",
    [
        ("--tokens", "-1", "greater than or equal to 0"),
        ("--temperature", "-0.5", "greater than or equal to 0"),
        ("--temperature", "nan", "a finite number"),
        ("--top-k", "-3", "greater than or equal to 0"),
        ("--top-p", "5", "less than or equal to 1"),
        ("--top-p", "0", "greater than 0"),
        ("--seed", "-1", "from 0 to 9223372036854775807"),
    ],
)
def test_values_that_generate_cannot_use(capsys, checkpoint, flag, value, rule):
    line = refused(capsys, "generate", checkpoint, flag, value)
    assert re.fullmatch(rf"pangu-locmoe: {flag} {value}(\.0)?: must be {rule}", line)


def test_a_domain_that_generate_does_not_know(capsys, checkpoint):
    assert (
        refused(capsys, "generate", checkpoint, "--domain", "klingon")
        == "pangu-locmoe: --domain klingon: the model knows en, zh, code"
    )


def test_generate_prints_the_prompt_and_a_continuation(capsys, checkpoint):
    assert (
        exit_code(
            "generate",
            checkpoint,
            "--prompt",
            "专家",
            "--domain",
            "zh",
            "--tokens",
            5,
            "--temperature",
            0,
        )
        == 0
    )
    first = capsys.readouterr().out
    assert first.startswith("专家") and first.endswith("\n")
    assert (
        exit_code(
            "generate",
            checkpoint,
            "--prompt",
            "专家",
            "--domain",
            "zh",
            "--tokens",
            5,
            "--temperature",
            0,
            "--seed",
            9,
        )
        == 0
    )
    assert capsys.readouterr().out == first


def test_generate_continues_several_prompts_as_each_alone(capsys, checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the router\n专家\n", encoding="utf-8")
    rest = ("--tokens", 6, "--temperature", 1.5, "--json")
    several = ("--prompt", "for", "--prompts", file)
    assert exit_code("generate", checkpoint, *several, *rest) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["for", "the router", "专家"]
    assert exit_code("generate", checkpoint, "--prompt", "专家", *rest) == 0
    assert capsys.readouterr().out == lines[2] + "\n"
    assert exit_code("generate", checkpoint, *several, *rest[:-1]) == 0
    texts = [
        f"--- {number} ---\n{row['prompt']}{row['text']}\n" for number, row in enumerate(rows, 1)
    ]
    assert capsys.readouterr().out == "".join(texts)


def test_evaluate_prints_json_or_a_table(capsys, checkpoint):
    assert exit_code("evaluate", checkpoint, "--sequences", 2, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    bigram = prepare(read_config(checkpoint), False).bigram_bits_per_byte
    assert row["bigram_bits_per_byte"] == bigram
    assert row["perplexity"] == pytest.approx(math.exp(row["validation_loss"]))
    assert row["perplexity_by_domain"]["zh"] == pytest.approx(
        math.exp(row["validation_loss_by_domain"]["zh"])
    )
    assert exit_code("evaluate", checkpoint, "--sequences", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["en", "zh", "code", "all"]
    assert (
        lines[4].split()[1] == f"{row['validation_loss']:.3f}"
        and lines[4].split()[4] == f"{bigram['all']:.3f}"
    )
    assert lines[-1] == f"checkpoint {checkpoint}, step 0"
    assert "must be at least 1" in refused(capsys, "evaluate", checkpoint, "--sequences", 0)


def test_prepare_says_where_it_is(capsys, config_file):
    assert exit_code("prepare", config_file, "--set", "model.seq_length=16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (Path(lines[-1]) / "prepared.json").is_file()
    assert any(line.strip().startswith("zh: ") and "bigram" in line for line in lines)


def test_train_with_set_to_the_report(capsys, config_file, tmp_path):
    """The whole of a run: what --set changes, the files, the samples, the figures, and a report
    that says so.
    """
    run_dir = tmp_path / "run"
    changes = [
        "train.steps=4",
        "moe.router=switch",
        "sample.tokens=3",
        "evaluation.every=4",
        "evaluation.sequences=1",
    ]
    flags = [part for change in changes for part in ("--set", change)]
    assert exit_code("train", config_file, "--run-dir", run_dir, "--no-progress", *flags) == 0
    text = capsys.readouterr().out
    config = read_config(run_dir)
    assert (config.train.steps, config.moe.router, config.sample.tokens) == (4, "switch", 3)
    assert "switch router" in text and "bigram" in text
    assert all(f"--- {domain} ---" in text for domain in tiny.DOMAINS)
    assert [row["step"] for row in tiny.rows(run_dir) if "loss" in row] == [1, 2, 3, 4]
    assert text.splitlines()[-1] == f"report: {run_dir / 'report.html'}"
    assert exit_code("report", run_dir, "--output", tmp_path / "page.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_a_report_of_what_is_no_run(capsys, tmp_path):
    assert (
        refused(capsys, "report", tmp_path)
        == f"pangu-locmoe: {tmp_path}: not a run directory: it has no config.yaml"
    )
    assert refused(capsys, "report", tmp_path / "absent").endswith(
        "not a run directory: it does not exist"
    )


def capacity(
    capsys, cosine: float, hidden_size: int = 5120, num_experts: int = 16
) -> dict[str, float]:
    assert (
        exit_code(
            "capacity",
            "--hidden-size",
            hidden_size,
            "--num-experts",
            num_experts,
            "--cosine",
            cosine,
        )
        == 0
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "cosine, printed",
    [
        (0.03, {"probability": 0.0318, "exact": 1.96, "erfc": 1.97, "exponential": 0.63}),
        (0.04, {"exact": 14.9, "exponential": 3.8}),
        (0.05, {"exact": 181, "exponential": 37.9}),
        (5120**-0.5, {"probability": 0.317, "exact": 0.197}),
    ],
)
def test_capacity_gives_the_values_of_the_paper(capsys, cosine, printed):
    """To 1e-6 of the theorem's formulas in 40 digits, and rounded to the reference values'
    digits.
    """
    got = capacity(capsys, cosine)
    mpmath.mp.dps = 40
    squared = mpmath.mpf(cosine) ** 2
    probability = mpmath.betainc(0.5, mpmath.mpf(5119) / 2, squared, 1, regularized=True)
    exponent = squared * 5120 / (2 - squared)
    wanted = {
        "cosine": cosine,
        "probability": probability,
        "exact": 1 / (16 * probability),
        "erfc": 1 / (16 * mpmath.erfc(mpmath.sqrt(exponent))),
        "exponential": mpmath.exp(exponent) / 16,
    }
    assert got == {name: pytest.approx(float(value), rel=1e-6) for name, value in wanted.items()}
    for name, value in printed.items():
        digits = len(str(value).lstrip("0.").replace(".", ""))
        assert float(f"{got[name]:.{digits}g}") == value


def test_capacity_beyond_a_double_is_null_for_json_has_no_infinity(capsys):
    got = capacity(capsys, 0.9)
    assert got["probability"] == 0.0
    assert got["exact"] is got["erfc"] is got["exponential"] is None


def test_capacity_refuses_what_is_no_cosine(capsys):
    sizes = ("--hidden-size", 64, "--num-experts", 4)
    assert (
        refused(capsys, "capacity", *sizes, "--cosine", 1.5)
        == "pangu-locmoe: cosine (1.5) must be between -1 and 1"
    )
    assert "must be at least 1" in refused(
        capsys, "capacity", "--hidden-size", 0, "--num-experts", 4, "--cosine", 0.1
    )
    assert refused(capsys, "capacity", *sizes, "--cosine", "nan").startswith(
        "pangu-locmoe: cosine (nan)"
    )
