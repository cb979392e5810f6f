"""Predicted times of models on GPUs and links that need not be here."""
