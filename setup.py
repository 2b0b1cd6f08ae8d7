from csrc.rules.commands import arguments
from setuptools import setup

setup(**arguments())
