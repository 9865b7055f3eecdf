"""What strangers wrote, as text: in this process, but for what must be killed."""

import asyncio
import io
import os
import random
import signal
import time
import warnings
import zipfile

import openpyxl
import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.child_pool import ChildPool
from l0fast.config import WebConfig
from l0fast.errors import ToolError, WorldError
from l0fast.tools.convert import Converter, Unreadable, convert
from l0fast.tools.files import inspect_file_of, inspect_file_tool
from l0fast.types import Task


def workbook() -> bytes:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = "Sales"
    sheet.append(["city", "sold"])
    sheet.append(["Oslo, N", 3])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def pdf(text: str) -> bytes:
    """A PDF of one page that says `text`."""
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(300, 300)
    font = DictionaryObject(
        {
            NameObject(k): NameObject(v)
            for k, v in (("/Type", "/Font"), ("/Subtype", "/Type1"), ("/BaseFont", "/Helvetica"))
        }
    )
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
    )
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = stream
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def locked() -> bytes:
    """A PDF under AES-256, which pypdf reads with the package cryptography alone."""
    key = b"00" * 48
    strings = b" ".join(b"/%b <%b>" % (name, key) for name in (b"O", b"U", b"OE", b"UE", b"Perms"))
    how = b"/CF << /StdCF << /CFM /AESV3 /Length 32 >> >> /StmF /StdCF /StrF /StdCF"
    lock = b"/Encrypt << /Filter /Standard /V 5 /R 6 /Length 256 /P -4 %b %b >>" % (strings, how)
    whole = pdf("Hello PDF")
    assert whole.count(b"trailer\n<<") == 1
    return whole.replace(b"trailer\n<<", b"trailer\n<<\n" + lock)


def cut_sheet() -> bytes:
    """A workbook whose sheet ends in the middle, in a whole zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(workbook())) as whole, zipfile.ZipFile(out, "w") as cut:
        for name in whole.namelist():
            data = whole.read(name)
            cut.writestr(name, data[: len(data) // 2] if "sheet1" in name else data)
    return out.getvalue()


def test_each_format_becomes_text():
    assert convert(workbook(), "", "x.xlsx", None) == '[sheet Sales]\ncity,sold\n"Oslo, N",3\n'
    assert convert(pdf("Hello PDF"), "", "x.pdf", None) == "[page 1]\nHello PDF"
    assert convert(pdf("Hello PDF"), "application/octet-stream", "http://x/y", None).endswith("Hello PDF")
    assert convert("naïve".encode("latin-1"), "text/plain", "x", "latin-1") == "naïve"
    assert convert("naïve".encode("utf-16"), "text/plain", "x", None) == "naïve"
    assert convert(b"\xffbad", "text/plain", "x", "no-such-charset") == "\ufffdbad"
    assert convert(b"bad", "text/plain", "x", "undefined") == "bad"


@pytest.mark.parametrize(
    ("data", "name", "why"),
    [
        (b"%PDF-1.4 broken", "x.pdf", "no PDF"),
        (pdf(""), "x.pdf", "pictures"),
        (locked(), "x.pdf", "no PDF"),
        (b"no zip", "x.xlsx", "no workbook"),
        (cut_sheet(), "x.xlsx", "no workbook"),
        (b"\x00\x01\x02", "x.bin", "no text"),
        (b"<html></html>", "x.html", "no"),
    ],
)
def test_what_can_not_be_read_says_why(data, name, why):
    with pytest.raises(Unreadable, match=why):
        convert(data, "", name, None)


@given(st.binary(max_size=300), st.sampled_from(["x.txt", "x.pdf", "x.xlsx", "x.html"]))
def test_any_bytes_are_text_or_unreadable(data, name):
    try:
        assert isinstance(convert(data, "", name, None), str)
    except Unreadable:
        pass


@pytest.mark.parametrize("whole", [workbook(), pdf("Hello PDF")], ids=["xlsx", "pdf"])
def test_damaged_files_are_text_or_unreadable(whole: bytes):
    suffix = "pdf" if whole.startswith(b"%PDF-") else "xlsx"
    for seed in range(100):
        rng, damaged = random.Random(seed), bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            with warnings.catch_warnings(action="ignore"):
                assert isinstance(convert(bytes(damaged), "", f"x.{suffix}", None), str)
        except Unreadable:
            pass


def test_a_text_has_no_halves_of_surrogate_pairs():
    assert convert(b"a+2AA-b", "text/plain", "x", "utf-7") == "a\ufffdb"
    assert convert(b"+2D3eAA-", "text/plain", "x", "utf-7") == "\U0001f600"
    assert convert(b"\\ud83d\\ude00", "text/plain", "x", "unicode_escape") == "\U0001f600"


def _endless() -> None:
    while True:
        time.sleep(0.01)


def _end() -> None:
    import os

    os._exit(3)


def _nothing() -> None:
    pass


def test_a_child_that_goes_on_for_ever_or_ends_costs_its_own_call_only():
    async def main():
        pool = ChildPool("testing", needs="", initializer=_nothing, timeout_s=0.3)
        try:
            with pytest.raises(TimeoutError):
                await pool.run(_endless)
            with pytest.raises(WorldError, match="the process for testing ended"):
                await pool.run(_end)
            return await pool.run(len, "abc")
        finally:
            await pool.close()

    assert asyncio.run(main()) == 3


def test_a_child_that_is_killed_while_it_has_nothing_to_do_is_followed_by_another():
    async def main():
        pool = ChildPool("testing", needs="", initializer=_nothing, timeout_s=10)
        try:
            os.kill(await pool.run(os.getpid), signal.SIGKILL)
            # until it is known, which ends it
            await asyncio.to_thread(pool._pool._pool_manager_loop.join)
            return await pool.run(len, "abc")
        finally:
            await pool.close()

    assert asyncio.run(main()) == 3


def test_a_reader_that_dies_of_a_file_is_an_error_for_the_agent():
    class Deadly(ChildPool):
        async def run(self, function, *args, **kwargs):
            return await super().run(_end)

    async def main():
        pool = Deadly("testing", needs="", initializer=_nothing, timeout_s=10)
        try:
            await Converter(pool).markdown(b"", "", "x.pdf")
        finally:
            await pool.close()

    with pytest.raises(ToolError, match=r"x\.pdf could not be read \(the process for testing ended"):
        asyncio.run(main())


class Here:
    """A converter without a child."""

    async def markdown(self, data, content_type, name, charset=None):
        return convert(data, content_type, name, charset)


def test_an_agent_looks_into_its_own_files_and_no_others(tmp_path):
    (tmp_path / "a.csv").write_text("x" * 25)
    (tmp_path / "p.png").write_bytes(b"png")
    files = {name: str(tmp_path / name) for name in ("a.csv", "p.png")}
    inspect = inspect_file_tool(WebConfig(page_chars=10), Here())  # pyright: ignore[reportArgumentType]
    tool = inspect_file_of(inspect)(Task(id="t", question="q", answers=("a",), files=files))

    def call(*args):
        return asyncio.run(tool.call(*args))

    assert call("a.csv") == "x" * 10 + "\n[part 1 of 3]"
    assert call("./a.csv", 3) == "x" * 5 + "\n[part 3 of 3]"
    for args, complaint in (
        (("/etc/passwd",), "has no file '/etc/passwd': it has a.csv, p.png"),
        (("../a.csv",), "has no file"),
        (("a.csv", 4), "has 3 parts"),
        (("p.png",), "ask visual_qa"),
    ):
        with pytest.raises(ToolError, match=complaint):
            call(*args)
