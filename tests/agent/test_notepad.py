"""The notepad: what it shows, and that it can't grow without end."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.notepad import MAX_CHARS, Notepad
from l0fast.errors import ToolError


def test_it_shows_what_was_noted():
    async def main():
        notepad = Notepad()
        assert notepad.render() == ""
        assert [await notepad.add_todo("look"), await notepad.add_todo("answer")] == ["1", "2"]
        await notepad.check_todo(1)
        await notepad.add_facts("Oslo is a capital", "so is Rome")
        await notepad.write_draft("Oslo")
        return notepad.render()

    assert asyncio.run(main()) == (
        "<notepad>\nTo do:\n1. [x] look\n2. [ ] answer\nFacts:\n- Oslo is a capital\n- so is Rome\nDraft:\nOslo\n</notepad>"
    )


def test_a_full_one_says_so_and_a_draft_makes_room_for_the_next():
    async def main():
        notepad = Notepad()
        await notepad.write_draft("x" * (MAX_CHARS - 100))
        await notepad.add_facts("short")
        for note in (notepad.add_facts, notepad.add_todo):
            with pytest.raises(ToolError, match="the notepad is full: it holds 8,000 characters"):
                await note("y" * 200)
        await notepad.write_draft("z" * (MAX_CHARS - 200))
        await notepad.add_facts("y" * 90)
        with pytest.raises(ToolError, match="is full"):
            await notepad.add_facts(*[""] * 1000)

    asyncio.run(main())


NOTES = st.tuples(st.sampled_from(["add_todo", "add_facts", "write_draft"]), st.text(max_size=30), st.integers(1, 200))


@given(st.lists(NOTES, max_size=60))
def test_whatever_is_noted_it_stays_short(notes):
    async def main():
        notepad = Notepad()
        for what, text, times in notes:
            shown = notepad.render()
            try:
                await getattr(notepad, what)(text * times)
            except ToolError:
                assert notepad.render() == shown
            # numbers, marks and headings besides
            assert len(notepad.render()) < 2 * MAX_CHARS

    asyncio.run(main())
