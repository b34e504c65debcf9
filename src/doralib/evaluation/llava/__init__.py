"""The seven evaluations of LLaVA-1.5: its questions, its answer files, its scores, and what servers take."""
