"""kontext_min: FLUX.1-Kontext for photo restoration, from scratch in PyTorch. The reading order is in README.md."""

__version__ = "0.1.0"
