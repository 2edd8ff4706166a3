"""Rank-deficiency analysis of LoRA."""
