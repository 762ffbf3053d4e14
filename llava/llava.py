"""The published `llava.llava.conversation`, as far as its inference scripts use it: docs/migrating.md."""

from collections import defaultdict
from types import SimpleNamespace


class Conversation:
    """Messages as one text, without the system prompt."""

    roles = ("USER", "ASSISTANT")
    ends = {"USER": " ", "ASSISTANT": "<|endoftext|>"}

    def __init__(self, messages=()):
        self.messages = list(messages)

    def copy(self) -> "Conversation":
        return Conversation(self.messages)

    def append_message(self, role: str, message: str | None) -> None:
        """Adds a turn; without a message it is the bare role, where the answer begins."""
        self.messages.append((role, message))

    def get_prompt(self) -> str:
        return "".join(f"{role}: {text}{self.ends[role]}" if text else f"{role}:" for role, text in self.messages)


# Scripts choose a template by the name of their language model; there is one format.
conversation = SimpleNamespace(conv_templates=defaultdict(Conversation), default_conversation=Conversation())
