"""Context: concatenation while it fits, a trim when it doesn't."""

from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.chat import Chat
from l0fast.agent.context import TRIM_NOTE, Context

EXCHANGES = st.lists(st.tuples(st.text(max_size=30), st.text(max_size=60), st.booleans()), max_size=8)


def _context(chat: Chat, **kwargs) -> Context:
    return Context(
        chat, "Be brief.", "Capital of Norway?", **{"budget": 400, "response_tokens": 40, "trim": "soft"} | kwargs
    )


def _play(context: Context, chat: Chat, exchanges):
    """Yields (prompt before, response, prompt after, fits)."""
    for said, output, closed in exchanges:
        before = context.prompt_ids
        response = chat.response(said)[: None if closed else -1]
        context.add(response, output)
        fits = context.fit("")
        yield before, tuple(response), context.prompt_ids, fits
        if not fits:
            return


@given(EXCHANGES)
def test_prompts_only_grow_until_a_trim(chat: Chat, exchanges):
    for before, response, after, fits in _play(_context(chat, budget=10**6), chat, exchanges):
        assert fits
        assert after[: len(before) + len(response)] == before + response


@given(EXCHANGES, st.sampled_from(["hard", "soft", "none"]), st.integers(60, 400))
def test_what_fits_leaves_room_for_a_response(chat: Chat, exchanges, trim, budget):
    for *_, after, fits in _play(_context(chat, budget=budget, trim=trim), chat, exchanges):
        assert not fits or len(after) + 40 <= budget


def test_soft_drops_the_oldest_exchanges_and_keeps_the_latest(chat: Chat):
    context = _context(chat, budget=230)
    for n in range(6):
        context.add(chat.response(f"say {n}"), f"output {n}")
    assert context.fit("<notepad>\nkept\n</notepad>")
    text = chat.decode(context.prompt_ids)
    assert "say 0" not in text
    assert "say 5" in text
    assert TRIM_NOTE in text
    assert "kept" in text
    assert text.count("Capital of Norway?") == 1


def test_hard_keeps_task_and_notepad_only(chat: Chat):
    context = _context(chat, budget=230, trim="hard")
    for n in range(6):
        context.add(chat.response(f"say {n}"), f"output {n}")
    assert context.fit("<notepad>\nkept\n</notepad>")
    text = chat.decode(context.prompt_ids)
    assert "say" not in text
    assert "kept" in text
    assert "Capital of Norway?" in text


def test_none_ends_the_conversation(chat: Chat):
    context = _context(chat, budget=120, trim="none")
    context.add(chat.response("say " * 30), "output")
    assert not context.fit("")


def test_a_task_too_long_for_the_budget_never_fits(chat: Chat):
    assert not _context(chat, budget=50, trim="hard").fit("")
