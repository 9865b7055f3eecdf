"""The parser and the state machine that stand between a session's bytes and this process."""

import asyncio
import itertools
import json
import re
import socket
import struct
import threading
from types import SimpleNamespace
from unittest import mock

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.errors import SandboxError
from l0fast.sandbox.channel import (
    MAX_DEPTH,
    MAX_FRAME,
    Call,
    Channel,
    Done,
    Files,
    FrameParser,
    ProtocolError,
    Ready,
    SessionState,
    State,
    encode,
    usual_end,
)
from l0fast.sandbox.guest.frames import MAX_FRAME as GUEST_MAX_FRAME
from l0fast.sandbox.guest.frames import Frames, FrameTooLong

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
messages = st.dictionaries(st.text(max_size=8), json_values, max_size=4)


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(sent, cuts):
    parser = FrameParser()
    stream = b"".join(encode(message) for message in sent)
    got = [message for piece in pieces(stream, cuts) for message in parser.feed(piece)]
    assert got == sent
    assert parser.held_bytes == 0


def test_every_single_boundary_gives_the_same_frames():
    stream = encode({"op": "ready"}) + encode({"op": "call", "text": "é" * 10})
    for cut in range(len(stream) + 1):
        parser = FrameParser()
        assert len(parser.feed(stream[:cut]) + parser.feed(stream[cut:])) == 2


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6))
def test_garbage_gives_frames_or_the_protocols_own_error_and_holds_little(data, cuts):
    parser = FrameParser(max_frame=64)
    try:
        for piece in pieces(data, cuts):
            before = parser.held_bytes
            for message in parser.feed(piece):
                assert isinstance(message, dict)
            assert parser.held_bytes <= min(before + len(piece), 4 + 64)
    except ProtocolError:
        pass


def test_a_megabyte_of_garbage_ends_in_the_protocols_own_error():
    parser = FrameParser()
    data = bytes(range(256)) * 4096
    chunks = [data[start : start + 4093] for start in range(0, len(data), 4093)]
    with pytest.raises(ProtocolError):
        any(parser.feed(chunk) is None for chunk in chunks)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"null", b'"x"', b"{", b'{"a":NaN}', b"\xff\xff", b'{"a":"\\ud800"}', b"[" * 100_000]
)
@pytest.mark.parametrize("number", [b"", b"12345678901234567890123,"], ids=["", "beside a long number"])
def test_a_frame_that_is_no_json_object_is_refused(body, number):
    with pytest.raises(ProtocolError):
        FrameParser().feed(frame(body.replace(b":", b":[" + number).replace(b"}", b"]}")))


@given(st.integers() | st.integers(-(2**70), 2**70) | st.integers(min_value=10**200))
def test_no_digit_of_an_integer_is_lost(number):
    assert FrameParser().feed(frame(b'{"a":[%d,1.5]}' % number)) == [{"a": [number, 1.5]}]


@pytest.mark.parametrize("inner", [b"[%b]", b'{"a":%b}'])
def test_a_frame_is_refused_for_its_levels_and_not_for_its_brackets(inner):
    deep = b'{"a":1}'
    for _ in range(MAX_DEPTH - 1):
        deep = inner % deep
    wide = b"[" + b",".join([inner % b"1"] * MAX_DEPTH) + b',"' + b"[" * 2 * MAX_DEPTH + b'"]'
    for body in (b'{"a":[12345678901234567890123,%b]}', b'{"a":%b}'):
        assert FrameParser().feed(frame(body % wide))
        with pytest.raises(ProtocolError, match=str(MAX_DEPTH)):
            FrameParser().feed(frame(body % deep))


def test_a_frame_is_refused_by_its_length_alone_before_its_bytes_arrive():
    body = b'{"a":"' + b"x" * (MAX_FRAME - 8) + b'"}'
    assert FrameParser().feed(frame(body))
    with pytest.raises(ProtocolError, match=str(MAX_FRAME + 1)):
        FrameParser().feed(struct.pack("<I", MAX_FRAME + 1))


READY = {"op": "ready"}
CALL = {"op": "call", "id": 1, "name": "f", "args": [1], "kw": {"k": 2}}
DONE = {"op": "done", "n": 1, "err": None, "dropped": 0}
FAILED = {**DONE, "err": {"name": "E", "value": "v", "traceback": "t"}}
FILES = {"op": "files", "files": [["a/b", 3]]}


def in_state(state: State) -> SessionState:
    machine = SessionState()
    if state is not State.STARTING:
        machine.received(READY)
    if state in (State.RUNNING, State.CALLING):
        machine.start_cell()
    if state is State.CALLING:
        machine.received(CALL)
    if state is State.COLLECTING:
        machine.start_collecting()
    assert machine.state is state
    return machine


@pytest.mark.parametrize("state", [State.STARTING, State.IDLE, State.RUNNING, State.CALLING, State.COLLECTING])
@pytest.mark.parametrize("message", [READY, CALL, DONE, FAILED, FILES])
def test_a_frame_may_come_in_its_own_state_only(state, message):
    allowed = {
        (State.STARTING, "ready"): (State.IDLE, Ready()),
        (State.RUNNING, "call"): (State.CALLING, Call(1, "f", [1], {"k": 2})),
        (State.RUNNING, "done"): (State.IDLE, Done(("E", "v", "t") if message is FAILED else None, 0)),
        (State.COLLECTING, "files"): (State.IDLE, Files([("a/b", 3)])),
    }
    machine = in_state(state)
    if (state, message["op"]) in allowed:
        after, event = allowed[state, message["op"]]
        assert machine.received(message) == event
        assert machine.state is after
    else:
        with pytest.raises(ProtocolError, match=state.value):
            machine.received(message)


def test_a_whole_cell_with_two_calls():
    machine = in_state(State.CALLING)
    machine.answer_call()
    machine.received({**CALL, "id": 2})
    machine.answer_call()
    assert machine.received(FAILED) == Done(("E", "v", "t"), 0)
    assert machine.start_cell() == 2


@pytest.mark.parametrize(
    "message",
    [
        {**CALL, "id": 2},
        {**CALL, "id": "1"},
        {**CALL, "id": 1.0},
        {**CALL, "id": True},
        {**CALL, "name": None},
        {**CALL, "args": {}},
        {**CALL, "kw": []},
        {k: v for k, v in CALL.items() if k != "kw"},
        {**DONE, "n": 2},
        {**DONE, "n": True},
        {**DONE, "dropped": -1},
        {**DONE, "dropped": "1"},
        {**DONE, "dropped": True},
        {**DONE, "err": {}},
        {**DONE, "err": {"name": 1, "value": "", "traceback": ""}},
        {k: v for k, v in DONE.items() if k != "err"},
        {"op": "exec"},
        {"op": ["done"]},
        {},
    ],
)
def test_a_malformed_frame_is_refused_where_its_like_may_come(message):
    with pytest.raises(ProtocolError):
        in_state(State.RUNNING).received(message)


@pytest.mark.parametrize(
    "files",
    [
        None,
        {},
        [[]],
        [["a"]],
        [["a", -1]],
        [["a", True]],
        [["a", 1.0]],
        [["a", 1, 2]],
        [[1, 1]],
        [["../a", 1]],
        [["/a", 1]],
    ]
    + [[["a//b", 1]], [["a/./b", 1]], [["", 1]], [["a\0", 1]], [["a", 1], ["b"]]],
)
def test_files_told_wrongly_or_under_a_name_that_leads_elsewhere_are_refused(files):
    with pytest.raises(ProtocolError):
        in_state(State.COLLECTING).received({"op": "files", "files": files})


junk = st.sampled_from([None, True, -1, 0, 1, 2, 2**63, 1.5, "", "f", "done", [], [1], {}, {"k": 1}])
near_misses = st.fixed_dictionaries(
    {"op": st.sampled_from(["ready", "call", "call", "done", "done", "files", "exec"]) | junk},
    optional={
        "id": st.integers(0, 3) | junk,
        "n": st.integers(0, 3) | junk,
        "name": st.just("f") | junk,
        "args": st.just([1]) | junk,
        "kw": st.just({"k": 2}) | junk,
        "err": st.just({"name": "E", "value": "v", "traceback": "t"}) | junk,
        "dropped": junk,
        "files": st.just([["a", 1]]) | junk,
    },
)


@given(st.lists(st.tuples(near_misses, st.booleans()), max_size=12))
def test_any_frames_whatever_keep_the_machine_in_its_states(frames):
    machine = SessionState()
    for message, collect in frames:
        try:
            event = machine.received(message)
        except ProtocolError:
            continue
        if isinstance(event, Call):
            assert machine.state is State.CALLING
            machine.answer_call()
        else:
            assert machine.state is State.IDLE
            if collect:
                machine.start_collecting()
            else:
                machine.start_cell()


def connected(action):
    """Runs `action(channel, peer socket)` with a Channel on a real socket."""

    async def main():
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        peer.setblocking(False)
        channel = Channel(ours)
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
        try:
            async with asyncio.timeout(10):
                return await action(channel, peer)
        finally:
            channel.lose(SandboxError("over"))
            peer.close()
            # one turn of the loop for the transport to close
            await asyncio.sleep(0)

    return asyncio.run(main())


async def started(channel, peer):
    waiter = channel.open([], 1)
    peer.send(encode(READY))
    await waiter
    peer.recv(4096)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=200) | messages.map(encode))
def test_whatever_comes_while_a_cell_runs_its_waiter_is_released(data):
    async def action(channel, peer):
        await started(channel, peer)
        waiter = channel.execute("1", 1.0)
        peer.send(data)
        peer.close()
        try:
            event = await waiter
        except SandboxError:
            assert channel.state is State.LOST
        else:
            assert isinstance(event, Call | Done)

    connected(action)


def test_end_of_file_releases_the_waiter_and_refuses_the_next():
    async def action(channel, peer):
        await started(channel, peer)
        waiter = channel.execute("1", 1.0)
        peer.close()
        with pytest.raises(SandboxError, match="ended by itself"):
            await waiter
        with pytest.raises(SandboxError, match="ended by itself"):
            channel.execute("2", 1.0)

    connected(action)


def test_a_session_lost_before_it_is_connected_lets_go_of_its_socket():
    async def main():
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        peer.setblocking(False)
        channel = Channel(ours)
        channel.lose(SandboxError("the zygote has gone"))
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
        with peer:
            async with asyncio.timeout(10):
                assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
        assert ours.fileno() == -1

    asyncio.run(main())


def test_a_cell_sent_to_an_end_that_has_just_closed_is_released():
    async def action(channel, peer):
        await started(channel, peer)
        peer.close()
        with pytest.raises(SandboxError, match="ended by itself"):
            await channel.execute("1", 1.0)

    connected(action)


def test_a_cell_that_is_more_than_the_socket_takes_arrives_whole():
    async def action(channel, peer):
        await started(channel, peer)
        code = "".join(f"# {i}\n" for i in range(300_000))
        waiter = channel.execute(code, 1.0)
        parser, frames = FrameParser(max_frame=8 << 20), []
        while not frames:
            frames = parser.feed(await asyncio.get_running_loop().sock_recv(peer, 1 << 16))
        assert [frame["code"] for frame in frames] == [code]
        peer.send(encode(DONE))
        assert await waiter == Done(None, 0)

    connected(action)


def test_an_unsolicited_frame_ends_an_idle_session():
    async def action(channel, peer):
        await started(channel, peer)
        peer.send(encode(DONE))
        # sent before, so there before: one turn to read it, one for the callback
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert channel.state is State.LOST
        with pytest.raises(ProtocolError, match="idle"):
            channel.execute("1", 1.0)

    connected(action)


def test_a_second_frame_in_the_same_packet_is_refused():
    async def action(channel, peer):
        await started(channel, peer)
        waiter = channel.execute("1", 1.0)
        peer.send(encode(CALL) + encode({**CALL, "id": 2}))
        assert isinstance(await waiter, Call)
        with pytest.raises(ProtocolError, match="calling"):
            channel.answer(1, value=1)

    connected(action)


class Clock:
    """In place of a channel's loop: time passes when told to."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def time(self):
        return self.now

    def create_future(self):
        return asyncio.get_running_loop().create_future()

    def call_at(self, when, callback):
        timer = SimpleNamespace(when=when, callback=callback, cancel=lambda: self.timers.remove(timer))
        self.timers.append(timer)
        return timer

    def pass_by(self, seconds):
        until = self.now + seconds
        while due := [timer for timer in self.timers if timer.when <= until]:
            timer = min(due, key=lambda timer: timer.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.callback()
        self.now = until


def on_a_clock():
    """An idle channel that sends to nowhere."""
    channel, clock = Channel(SimpleNamespace(send=len)), Clock()
    channel._loop = clock
    channel.connection_made(SimpleNamespace(get_write_buffer_size=lambda: 0, abort=lambda: None))
    channel.open([], 1)
    channel.data_received(encode(READY))
    return channel, clock


PACKETS = [usual_end(1), usual_end(2), usual_end(1)[:9], usual_end(1)[9:], usual_end(1) * 2]
PACKETS += [encode(CALL), encode(FAILED), encode({**DONE, "n": 2, "dropped": 5}), b"\0"]


def test_the_end_of_a_cell_that_is_known_by_its_bytes_means_what_it_says_and_only_where_it_may_come():
    async def main(packets, goes_on):
        channel, _ = on_a_clock()
        parser, machine = FrameParser(), in_state(State.IDLE)
        waiter = channel.execute("1", 1.0)
        machine.start_cell()
        for packet in packets:
            try:
                events = [machine.received(message) for message in parser.feed(packet)]
            except ProtocolError as e:
                channel.data_received(packet)
                assert channel.state is State.LOST
                with pytest.raises(ProtocolError, match=re.escape(str(e))):
                    channel.check()
                return
            told = waiter.done()
            channel.data_received(packet)
            assert (channel.state, waiter.done()) == (machine.state, told or bool(events))
            for event in events:
                assert waiter.result() == event
                if not goes_on:
                    continue
                if isinstance(event, Call):
                    machine.answer_call()
                    waiter = channel.answer(event.id, value=1)
                else:
                    machine.start_cell()
                    waiter = channel.execute("1", 1.0)
        channel.lose(SandboxError("over"))

    async def all_of_them():
        for packets in itertools.product(PACKETS, repeat=3):
            for goes_on in (True, False):
                await main(packets, goes_on)

    asyncio.run(all_of_them())


def test_the_guest_ends_a_cell_with_the_bytes_that_the_host_knows():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Frames(theirs.fileno()).send_done(7, None, 0)
        assert ours.recv(4096) == usual_end(7)
        Frames(theirs.fileno()).send_done(7, FAILED["err"], 3)
        assert FrameParser().feed(ours.recv(4096)) == [{**FAILED, "n": 7, "dropped": 3}]


seconds = st.integers(1, 50).map(float)


@given(st.lists(st.tuples(st.just(0.0) | seconds, seconds, seconds), max_size=8))
def test_the_one_timer_there_is_ends_the_cell_that_is_late_when_it_is_and_no_other(cells):
    async def main():
        channel, clock = on_a_clock()
        for n, (pause, takes, limit) in enumerate(cells, 1):
            clock.pass_by(pause)
            waiter = channel.execute("1", limit)
            channel.lose_at(clock.now + limit, lambda limit=limit: f"later than {limit}")
            clock.pass_by(takes)
            assert len(clock.timers) <= 1
            if takes >= limit:
                with pytest.raises(SandboxError, match=f"the session was ended: later than {limit}"):
                    await waiter
                assert channel.state is State.LOST
                break
            channel.data_received(encode({**DONE, "n": n}))
            assert (await waiter, channel.state) == (Done(None, 0), State.IDLE)
        channel.lose(SandboxError("over"))
        assert not clock.timers

    asyncio.run(main())


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=4), seconds)
def test_time_in_a_tool_is_not_the_sessions_and_a_cell_is_still_watched_after_it(calls, limit):
    async def main():
        channel, clock = on_a_clock()
        # what its timer was set for goes off in the middle of the next
        channel.execute("1", 1.0)
        channel.lose_at(1.0, lambda: "another")
        channel.data_received(encode(DONE))
        waiter = channel.execute("1", limit)
        channel.lose_at(limit, lambda: "late")
        for id_, (runs, waits) in enumerate(calls, 1):
            clock.pass_by(runs)
            if clock.now >= limit:
                with pytest.raises(SandboxError, match="late"):
                    await waiter
                return
            channel.data_received(encode({**CALL, "id": id_}))
            await waiter
            clock.pass_by(waits)
            assert channel.state is State.CALLING
            if clock.now >= limit:
                # whose tool is late ends it: see PoolSession
                return
            waiter = channel.answer(id_, value=1)

    asyncio.run(main())


@given(messages)
def test_guest_and_host_read_each_others_frames(message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guest = Frames(theirs.fileno())
        guest.send(message)
        assert FrameParser().feed(ours.recv(1 << 20)) == [message]
        ours.send(encode(message))
        assert guest.recv() == message


def test_the_guest_reads_a_frame_that_arrives_byte_by_byte_and_none_at_the_end():
    ours, theirs = socket.socketpair()
    with theirs:
        for byte in encode({"text": "é"}):
            ours.send(bytes([byte]))
        ours.send(encode({"n": 1})[:-1])
        ours.close()
        guest = Frames(theirs.fileno())
        assert guest.recv() == {"text": "é"}
        assert guest.recv() is None


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 10_000), max_size=8), st.booleans())
def test_the_guest_reads_frames_however_the_stream_is_cut_and_wherever_it_ends(sent, cuts, ends_early):
    stream = b"".join(encode(message) for message in sent)
    arrives = iter([piece for piece in pieces(stream[: -1 if ends_early else None], cuts) if piece])

    def recv(size):
        piece = next(arrives, b"")
        # a real socket keeps what was not asked for; all of these are short
        assert len(piece) <= size
        return piece

    guest = Frames(-1)
    with mock.patch("l0fast.sandbox.guest.frames.os.read", lambda fd, size: recv(size)):
        for message in sent[: -1 if ends_early else None]:
            assert guest.recv() == message
        assert guest.recv() is None


def test_the_guest_reads_a_frame_much_longer_than_it_asks_for_and_the_one_behind_it():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        long = {"text": "é" * 100_000}
        # more than the socket holds at once: the rest is sent as room comes free
        sender = threading.Thread(target=ours.sendall, args=(encode(long) + encode({"n": 1}),))
        sender.start()
        guest = Frames(theirs.fileno())
        assert guest.recv() == long
        assert guest.recv() == {"n": 1}
        sender.join()


def test_both_sides_agree_on_the_longest_frame_and_the_guest_refuses_to_send_more():
    assert MAX_FRAME == GUEST_MAX_FRAME
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guest = Frames(theirs.fileno())
        with pytest.raises(FrameTooLong):
            guest.send({"text": "x" * MAX_FRAME})
        guest.send({"a": "\ud800"})
        (size,) = struct.unpack("<I", ours.recv(4))
        assert json.loads(ours.recv(size)) == {"a": "?"}
        assert orjson.loads(b"{}") == {}
