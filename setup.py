"""Packaging of lopd. Everything it says is in pyproject.toml."""

from setuptools import setup

setup(
    package_data={
        "lopd.data": ["tiny_tokenizer/*"],
        "lopd.report": ["page.*"],
        "lopd.study": ["page.*"],
    },
)
