"""DoRA fine-tuning: LoRA's cost, exact numbers, every adapter file."""

__version__ = "0.1.0"
