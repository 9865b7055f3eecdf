"""The agent's notepad: a to-do list, facts and a draft. It lives on the host, so a trim or a lost variable can't touch it."""

from dataclasses import dataclass, field

from l0fast.errors import ToolError

MAX_CHARS = 8000
"""What may be noted in all; every trim of the context shows it again [characters]."""


@dataclass(slots=True)
class Notepad:
    todos: list[tuple[str, bool]] = field(default_factory=list)
    """(what, done)"""
    facts: list[str] = field(default_factory=list)
    draft: str = ""

    async def add_todo(self, item: str) -> str:
        """Add an item to the to-do list; returns its number."""
        self._check_room(str(item))
        self.todos.append((str(item), False))
        return str(len(self.todos))

    async def check_todo(self, number: int) -> None:
        """Mark item `number` (from 1) as done."""
        try:
            index = int(number) - 1
        except ValueError as e:
            raise ToolError(f"a to-do is checked by its number, not by {number!r}") from e
        if not 0 <= index < len(self.todos):
            raise ToolError(f"there is no to-do {number}, the list has {len(self.todos)}")
        self.todos[index] = (self.todos[index][0], True)

    async def add_facts(self, *facts: str) -> None:
        """Keep facts that matter for the answer."""
        self._check_room(*map(str, facts))
        self.facts.extend(map(str, facts))

    async def write_draft(self, text: str) -> None:
        """Replace the draft of the answer."""
        self._check_room(str(text), instead_of=self.draft)
        self.draft = str(text)

    def _check_room(self, *texts: str, instead_of: str = "") -> None:
        used = sum(len(what) for what, _ in self.todos) + sum(map(len, self.facts)) + len(self.draft) - len(instead_of)
        # numbers and marks count, too: a thousand empty facts are not nothing
        entries = len(self.todos) + len(self.facts) + len(texts)
        if used + sum(map(len, texts)) + 4 * entries > MAX_CHARS:
            raise ToolError(
                f"the notepad is full: it holds {MAX_CHARS:,} characters in all, so note what matters alone"
            )

    def render(self) -> str:
        """What is shown in the context; empty for an empty notepad."""
        parts = []
        if self.todos:
            parts += [
                "To do:",
                *(f"{n}. [{'x' if done else ' '}] {what}" for n, (what, done) in enumerate(self.todos, 1)),
            ]
        if self.facts:
            parts += ["Facts:", *(f"- {fact}" for fact in self.facts)]
        if self.draft:
            parts += ["Draft:", self.draft]
        return "\n".join(["<notepad>", *parts, "</notepad>"]) if parts else ""
