"""The agent's notepad: a to-do list, facts and a draft. It lives on the host, so a trim or a lost variable can't touch it."""

from dataclasses import dataclass, field

from l0fast.errors import ToolError


@dataclass(slots=True)
class Notepad:
    todos: list[tuple[str, bool]] = field(default_factory=list)
    """(what, done)"""
    facts: list[str] = field(default_factory=list)
    draft: str = ""

    async def add_todo(self, item: str) -> str:
        """Add an item to the to-do list; returns its number."""
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
        self.facts.extend(map(str, facts))

    async def write_draft(self, text: str) -> None:
        """Replace the draft of the answer."""
        self.draft = str(text)

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
