"""How csrc becomes libraries: setup.py and `python -m csrc.rules` share these rules. Standard library only."""
