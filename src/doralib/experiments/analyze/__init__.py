"""How far a model's weights moved in fine-tuning: lengths, directions, spectra, and how they go together."""
