"""Conversations for tests, and the chat templates of today's models."""

from pathlib import Path

from tokenizer_kinds import make_tokenizer

TEMPLATES = Path(__file__).parent / "golden" / "templates"
# the same words twice: an answer is found by its place
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
]
CALL = {"type": "function", "function": {"name": "get", "arguments": '{"city": "Rome"}'}}
SCHEMA = {
    "name": "get",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": SCHEMA}]


def load_template(family):
    """A tokenizer with the chat template of a family of models."""
    return make_tokenizer("byte level", (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"))
