"""What strangers wrote, as text for an agent: HTML, PDF, spreadsheets, tables, text. In a child with a time and a memory limit.

HTML             main text as Markdown      trafilatura; where it finds none, all of its text
PDF              text, page by page         pypdf
.xlsx            each sheet as CSV          openpyxl, values as last computed
.csv .tsv .json .md .py ... anything that is text

pip install 'l0fast[web]' brings the libraries; a format whose library is missing is refused by name.
"""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePath

from l0fast.child_pool import ChildPool
from l0fast.errors import ToolError, WorldError

TIMEOUT_S = 20.0
"""Of one conversion [s]."""
MEMORY_BYTES = 2 << 30
"""Address space of the child, libraries included [bytes]."""
MAX_ROWS = 2000
"""Of a sheet [rows]."""
MAX_CHARS = 2_000_000
"""Of a converted text [characters]."""
MAX_WHY_CHARS = 200
"""Of what a library says of a file that it can't read [characters]."""

_TYPES = {"html": "text/html", "htm": "text/html", "pdf": "application/pdf", "xlsx": "application/xlsx"}
_XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
_NAMES = {"application/pdf": "PDF", "application/xlsx": "workbook", _XLSX: "workbook"}


class Converter:
    """Made by `open_converter`."""

    def __init__(self, pool: ChildPool):
        self._pool = pool

    async def markdown(self, data: bytes, content_type: str, name: str, charset: str | None = None) -> str:
        """Text of a page or file.

        Args:
            content_type: as HTTP has it; "" goes by the ending of `name`.

        Raises:
            ToolError: what it is can't be read, or not in time, or its reader died of it.
        """
        try:
            return await self._pool.run(convert, data, content_type, name, charset)
        except TimeoutError as e:
            raise ToolError(f"{name} could not be read within {TIMEOUT_S:g} s: take another one") from e
        except (Unreadable, MemoryError) as e:
            raise ToolError(f"{name} could not be read ({e or 'it takes too much memory'})") from e
        except WorldError as e:
            # the next call starts another child
            raise ToolError(f"{name} could not be read ({e}): take another one") from e


@asynccontextmanager
async def open_converter() -> AsyncIterator[Converter]:
    """For as long as the `async with` body runs; its children start with the first call."""
    pool = ChildPool(
        "reading pages and files",
        needs="pip install 'l0fast[web]'",
        initializer=_imports,
        timeout_s=TIMEOUT_S,
        memory_bytes=MEMORY_BYTES,
    )
    try:
        yield Converter(pool)
    finally:
        await pool.close()


class Unreadable(Exception):
    """Why something has no text here."""


def _imports() -> None:
    """What is there; what is missing is named by the first call that needs it."""
    for name in ("trafilatura", "pypdf", "openpyxl"):
        try:
            __import__(name)
        except ImportError:
            continue


def convert(data: bytes, content_type: str, name: str, charset: str | None) -> str:
    """In the child. Raises Unreadable."""
    kind = content_type or _TYPES.get(PurePath(name).suffix.lstrip(".").lower(), "text/plain")
    try:
        if kind in ("text/html", "application/xhtml+xml"):
            text = _html(data, name)
        elif kind == "application/pdf" or data.startswith(b"%PDF-"):
            text = _pdf(data)
        elif kind in (_XLSX, "application/xlsx"):
            text = _xlsx(data)
        else:
            text = _text(data, charset, kind)
    except ImportError as e:
        raise Unreadable(f"{kind} needs {e.name or e}: pip install 'l0fast[web]'") from e
    except (Unreadable, MemoryError):
        raise
    except Exception as e:
        # the libraries meet broken files with whatever their code runs into
        why = f"no {_NAMES.get(kind, kind)} that can be read: {type(e).__name__}: {e}"
        raise Unreadable(whole(why[:MAX_WHY_CHARS])) from e
    return whole(text[:MAX_CHARS])


def whole(text: str) -> str:
    """U+FFFD for halves of surrogate pairs, which PDFs, some charsets and odd JSON have and UTF-8 does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _html(data: bytes, url: str) -> str:
    import trafilatura

    tree = trafilatura.load_html(data)
    if tree is None:
        raise Unreadable("no HTML that can be read")
    title = trafilatura.extract_metadata(tree, default_url=url)
    text = trafilatura.extract(
        tree, url=url, output_format="markdown", include_links=True, include_tables=True, favor_recall=True
    )
    if text is None:
        text = trafilatura.html2txt(data)
    if not text.strip():
        raise Unreadable("it holds no text")
    return f"# {title.title}\n\n{text}" if title is not None and title.title else text


def _pdf(data: bytes) -> str:
    import pypdf

    reader = pypdf.PdfReader(io.BytesIO(data))
    pages = [f"[page {n}]\n{page.extract_text()}" for n, page in enumerate(reader.pages, 1)]
    if not any(page.partition("\n")[2].strip() for page in pages):
        raise Unreadable("its pages are pictures, without text")
    return "\n\n".join(pages)


def _xlsx(data: bytes) -> str:
    import csv

    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    parts = []
    for sheet in book.worksheets:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for n, row in enumerate(sheet.iter_rows(values_only=True)):
            if n == MAX_ROWS:
                out.write(f"[more than {MAX_ROWS} rows]\n")
                break
            writer.writerow(["" if cell is None else cell for cell in row])
        parts.append(f"[sheet {sheet.title}]\n{out.getvalue()}")
    return "\n".join(parts)


def _text(data: bytes, charset: str | None, kind: str) -> str:
    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable(f"it is no text but {kind}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        charset = "utf-16"
    try:
        return data.decode(charset or "utf-8")
    except (LookupError, UnicodeError):
        # UnicodeError itself: the charsets undefined, idna and punycode
        return data.decode("utf-8", errors="replace")
