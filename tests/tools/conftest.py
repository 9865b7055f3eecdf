import pytest

from tests import web_server


@pytest.fixture
def serving():
    """`async with serving(answer) as url`: an HTTP server."""
    return web_server.serving
