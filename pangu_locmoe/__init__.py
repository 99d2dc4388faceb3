"""LocMoE on a PanGu-Sigma-style transformer for MindSpore."""

__version__ = "0.1.0"
