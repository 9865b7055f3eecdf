"""Tools seen from a cell: names, arguments, errors, time."""

import asyncio

import pytest

from l0fast.errors import SandboxError, ToolError
from l0fast.sandbox.base import ToolSpec
from l0fast.sandbox.session import MAX_CALLS


class Desk:
    """Tools that remember how they were called."""

    def __init__(self):
        self.calls = []
        self.cancelled = False

    async def search(self, query, k=2):
        self.calls.append((query, k))
        if query == "nothing":
            raise ToolError("no such entry: nothing")
        return [f"{query} {i}" for i in range(k)]

    async def echo(self, *args, **kw):
        return [list(args), kw]

    async def wait(self):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def broken(self):
        raise ZeroDivisionError("a bug of the host's")

    async def add_todo(self, text):
        self.calls.append(text)

    async def view(self):
        return "\n".join(self.calls)

    def specs(self):
        return {
            name: ToolSpec(name=name, signature=signature, doc=doc, call=call)
            for name, signature, doc, call in (
                ("search", "(query: str, k: int = 2) -> list[str]", "Look the query up.", self.search),
                ("echo", "(*args, **kw)", "Say it back.", self.echo),
                ("wait", "()", "Never answers.", self.wait),
                ("broken", "()", "Fails.", self.broken),
                ("notepad.add_todo", "(text: str) -> None", "Remember to do it.", self.add_todo),
                ("notepad.view", "() -> str", "All of it.", self.view),
            )
        }


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def cells(pool, run, desk):
    def run_cells(*codes, timeout_s=5.0):
        async def main():
            async with pool.session(desk.specs(), seed=1) as session:
                return [await session.execute(code, timeout_s=timeout_s) for code in codes]

        return run(main())

    return run_cells


def test_a_call_reaches_the_host_and_its_value_comes_back(cells, desk):
    (result,) = cells("search('Oslo') + search(query='Rome', k=1)")
    assert result.output == "['Oslo 0', 'Oslo 1', 'Rome 0']\n"
    assert desk.calls == [("Oslo", 2), ("Rome", 1)]


def test_methods_of_one_object_share_it(cells, desk):
    results = cells("notepad.add_todo('buy milk')", "notepad.add_todo('drink it')", "print(notepad.view())", "notepad")
    assert results[2].output == "buy milk\ndrink it\n"
    assert results[3].output == "<notepad: add_todo, view>\n"
    assert desk.calls == ["buy milk", "drink it"]


def test_a_tool_error_is_an_exception_the_cell_can_catch(cells):
    caught, raised = cells(
        "try:\n    search('nothing')\nexcept ToolError as e:\n    print('caught', e)", "search('nothing')"
    )
    assert (caught.output, caught.error) == ("caught no such entry: nothing\n", None)
    assert (raised.error.name, raised.error.value) == ("ToolError", "no such entry: nothing")
    assert raised.output == (
        'Traceback (most recent call last):\n  File "<cell 2>", line 1, in <module>\n'
        "    search('nothing')\nToolError: no such entry: nothing\n"
    )


def test_wrong_arguments_fail_in_the_cell_and_never_reach_the_host(cells, desk):
    missing, unknown = cells("search()", "search('a', size=3)")
    assert missing.error.value == "search() missing 1 required positional argument: 'query'"
    assert unknown.error.value == "search() got an unexpected keyword argument 'size'"
    assert desk.calls == []


def test_a_type_error_of_the_tool_reaches_the_cell(cells):
    (result,) = cells("search('a', k='many')")
    assert result.error.name == "TypeError"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("(1, 2)", "[1, 2]"),
        ("{'a': [None, True, 1.5]}", "{'a': [None, True, 1.5]}"),
        ("{3}", "[3]"),
        ("'\\ud800é'", "'?é'"),
        ("float('nan')", "TypeError"),
        ("object()", "TypeError"),
        ("b'x'", "TypeError"),
        ("'x' * 200_000", "ValueError"),
    ],
)
def test_arguments_arrive_json_like_or_fail_in_the_cell_and_the_session_goes_on(cells, argument, expected):
    first, second = cells(f"echo({argument})[0][0]", "echo(1)")
    assert expected == (first.error.name if first.error else first.output.strip())
    assert second.output == "[[1], {}]\n"


def test_help_and_signature_say_what_the_host_said(cells):
    shown, signature = cells(
        "help(search)", "import inspect\nprint(inspect.signature(search), notepad.add_todo.__doc__)"
    )
    # in quotes before Python 3.14
    assert "search(query: str, k: int = 2) -> list[str]" in shown.output.replace("'", "")
    assert "Look the query up." in shown.output
    assert signature.output == "(query: 'str', k: 'int' = 2) -> 'list[str]' Remember to do it.\n"


def test_a_tool_that_takes_too_long_is_cancelled_and_times_the_cell_out(cells, desk):
    late, after = cells("try:\n    wait()\nexcept Exception:\n    print('no')", "search('Oslo', 1)", timeout_s=0.3)
    assert late.error.name == "Timeout"
    assert "wait()" in late.error.value
    assert desk.cancelled
    assert after.output == "['Oslo 0']\n"


def test_threads_of_a_cell_take_turns(cells):
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    found = list(pool.map(lambda i: search(f'q{i}', 1)[0], range(20)))\n"
        "found == [f'q{i} 0' for i in range(20)]"
    )
    (result,) = cells(code)
    assert result.output == "True\n"


def test_a_thread_that_waits_for_a_tool_when_time_is_up_does_not_break_the_session(cells, desk):
    code = "import threading\nt = threading.Thread(target=wait, daemon=True)\nt.start()\nt.join()"
    late, after = cells(code, "search('on', 1)", timeout_s=0.3)
    # the Timeout is raised in the thread that called; the cell's own comes only if the thread was slow to end
    assert late.error is None or late.error.name == "Timeout"
    assert "Timeout" in late.output
    assert desk.cancelled
    # a thread that was slow to end tells its Timeout in the next cell
    assert (
        after.output.removeprefix(
            "Exception in a thread: Timeout: the cell ran out of time while it waited for wait()\n"
        )
        == "['on 0']\n"
    )


def test_calls_outside_a_cell_or_from_a_child_are_refused_inside(cells, desk):
    code = (
        "import os, threading, time\nsaid = []\n"
        "def later():\n    time.sleep(0.1)\n    try:\n        search('late')\n    except RuntimeError as e:\n"
        "        said.append(str(e))\n"
        "t = threading.Thread(target=later)\nt.start()"
    )
    _, joined, child = cells(
        code,
        "t.join()\nsaid",
        "r, w = os.pipe()\nif os.fork() == 0:\n    try:\n        search('x')\n    except RuntimeError as e:\n        os.write(w, str(e).encode())\n    os._exit(0)\nos.read(r, 999)",
    )
    assert "after its cell had ended" in joined.output or desk.calls == [("late", 2)]
    assert "child process" in child.output


def test_more_calls_than_allowed_are_answered_with_an_error_and_a_flood_ends_the_session(pool, run, desk):
    async def main():
        async with pool.session(desk.specs(), seed=1) as session:
            result = await session.execute(f"for i in range({MAX_CALLS + 1}): search('a', 0)")
            assert (result.error.name, len(desk.calls)) == ("ToolError", MAX_CALLS)
            assert (await session.execute("search('b', 1)")).output == "['b 0']\n"
            with pytest.raises(SandboxError, match="tool calls"):
                await session.execute("while True:\n    try:\n        search('a')\n    except ToolError:\n        pass")

    run(main())


def test_a_bug_of_the_hosts_tool_is_raised_on_the_host_and_ends_the_session(pool, run, desk):
    async def main():
        async with pool.session(desk.specs(), seed=1) as session:
            with pytest.raises(ZeroDivisionError):
                await session.execute("broken()")
            with pytest.raises(SandboxError):
                await session.execute("1")

    run(main())


def test_cancelling_a_cell_cancels_its_tool_and_ends_the_session(pool, run, desk):
    async def main():
        async with pool.session(desk.specs(), seed=1) as session:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await session.execute("wait()")
            assert desk.cancelled
            with pytest.raises(SandboxError, match="middle of a cell"):
                await session.execute("1")

    run(main())


@pytest.mark.parametrize(
    ("name", "signature"),
    [("no name", "()"), ("a.b.c", "()"), ("f", "query"), ("f", "(a b)"), ("f", "()\n    import os\nx")],
)
def test_a_spec_that_is_no_python_is_refused_on_the_host(pool, run, name, signature):
    async def never():
        raise AssertionError

    async def main():
        async with pool.session({"f": ToolSpec(name=name, signature=signature, doc="", call=never)}, seed=1):
            raise AssertionError

    with pytest.raises(ValueError, match="tool"):
        run(main())
