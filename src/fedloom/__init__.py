"""Federated fine-tuning of large language models: one round, many methods."""
