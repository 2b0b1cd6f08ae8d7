"""Adapters on whole models: where they sit, putting them on and taking them off."""
