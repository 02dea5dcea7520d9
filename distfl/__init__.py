"""Federated fine-tuning of tiny Transformers under enforced memory caps."""

__version__ = "0.1.0"
