"""Build entry point; everything that setuptools needs to know stands in pyproject.toml."""

from setuptools import setup

setup()
