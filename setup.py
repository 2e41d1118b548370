"""Build rules: a pure-Python package. The CUDA extension in csrc/ is built only on request."""

from setuptools import setup

setup()
