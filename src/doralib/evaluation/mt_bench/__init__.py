"""MT-Bench: questions of two turns, answered by a model and judged by another behind an OpenAI-compatible server."""
