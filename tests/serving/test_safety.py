"""What strangers may send: URLs that lead inside, vast and slow bodies, bombs, injections."""

import io
import logging
import re
import socket
import struct
import time
import zlib
from contextlib import ExitStack, suppress

import httpx
import pytest
from PIL import Image
from served import BLUE, EXAMPLES, HEAD, data_uri, messages_of, raw, serving
from test_media import Handler, listening

from vpt.images import ImageLimits

PUBLIC = "93.184.216.34"


class Inside:
    """In place of ``socket`` in the intake: own names; each address is the server on loopback."""

    def __init__(self, address):
        self.address = address
        self.names = {}
        self.resolved = []
        self.connected = []

    def __getattr__(self, name):
        return getattr(socket, name)

    def getaddrinfo(self, host, port, **_):
        self.resolved.append(host)
        found = self.names.get(host, [PUBLIC])
        address = found.pop(0) if len(found) > 1 else found[0]
        with suppress(OSError):  # as a resolver that takes every notation of an address
            address = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)[0][4][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def create_connection(self, address, timeout=None):
        self.connected.append(address)
        return socket.create_connection(self.address, timeout)


@pytest.fixture(scope="module")
def pictures():
    """A server of a picture, for whichever host it is asked."""

    class Pictures(Handler):
        def answer(self, status, body, **headers):
            picture = (EXAMPLES / "tags.jpg").read_bytes()
            super().answer(status, picture if status == 200 else body, **headers)

    with listening(Pictures) as server:
        yield server


@pytest.fixture
def inside(pictures, embedded, monkeypatch):
    """The network of a server that may fetch from every public host."""
    pictures.seen.clear()
    net = Inside(pictures.server_address)
    monkeypatch.setattr("vpt.media.socket", net)
    monkeypatch.setattr(embedded, "limits", ImageLimits(allowed_media_domains=("*",)))
    return net


def post(url, link=None, **body):
    parts = [
        {"type": "image_url", "image_url": {"url": link or data_uri()}},
        {"type": "text", "text": BLUE[0]},
    ]
    body = {"messages": [{"role": "user", "content": parts}], **body}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_a_picture_of_a_permitted_host_is_seen(url, inside):
    response = post(url, "http://example.org/tags.jpg")
    assert response.json()["choices"][0]["message"]["content"] == "3"
    assert inside.connected == [(PUBLIC, 80)]


HOSTS = """
    127.0.0.1 localhost 10.0.0.5 172.16.3.4 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 [::1]
    [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [fe80::1] [fc00::1] [64:ff9b::7f00:1] [2002:7f00:1::]
    2130706433 0x7f000001 0177.0.0.1 127.1 0x7f.1 017700000001 127.0.0.1. LOCALHOST
    inside.example.org
"""


@pytest.mark.parametrize("host", HOSTS.split())
@pytest.mark.parametrize("way", ["http://{}/a.png", "http://example.org/to/http://{}:8000/a.png"])
def test_no_url_leads_inside(url, inside, host, way):
    inside.names |= {one: ["127.0.0.1"] for one in ("localhost", "inside.example.org")}
    response = post(url, way.format(host))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_image")
    assert inside.connected == [(PUBLIC, 80)] * ("/to/" in way)


@pytest.mark.parametrize(
    "link",
    [
        "http://user:pw@example.org/a.png",
        "http://example.org@127.0.0.1/a.png",
        "http://127.0.0.1\\@example.org/a.png",
        "http://example.org/a\r\nX-Evil: 1",
        "http://example.org/to/file:///etc/passwd",
        "http://example.org/to/http://user:pw@example.org/",
        "http://example.org/to/gopher://127.0.0.1/",
        "http://127。0。0。1/a.png",  # full stops that IDNA reads as ours
        *("file:///etc/passwd", "/etc/passwd", "gopher://127.0.0.1/", "ftp://example.org/a.png"),
        *("FILE:///etc/passwd", "file:/etc/passwd", "jar:http://example.org!/a", "\\\\host\\a.png"),
    ],
)
def test_credentials_and_other_schemes_are_refused(url, inside, link):
    response = post(url, link)
    assert response.status_code == 400 and "root:" not in response.text
    assert len(inside.connected) <= ("/to/" in link)


def test_a_name_that_changes_its_address_after_the_check_gains_nothing(url, inside):
    inside.names["example.org"] = [PUBLIC, "127.0.0.1"]
    assert post(url, "http://example.org/tags.jpg").status_code == 200
    assert (inside.connected, inside.resolved) == ([(PUBLIC, 80)], ["example.org"])
    assert post(url, "http://example.org/tags.jpg").status_code == 400  # now it is inside
    assert len(inside.connected) == 1


def test_an_error_names_no_address_inside(url, inside):
    inside.names["inside.example.org"] = ["10.11.12.13"]
    assert "10.11.12" not in post(url, "http://inside.example.org/a.png").text


def test_without_permitted_hosts_nothing_is_resolved(url, inside, embedded, monkeypatch):
    monkeypatch.setattr(embedded, "limits", ImageLimits())
    assert post(url, "http://example.org/a.png").status_code == 400
    assert not inside.resolved


# --- bodies ---------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused(embedded):
    with serving(embedded, max_body_bytes=10_000) as (url, _):
        response = post(url, padding="a" * 20_000)
        assert (response.status_code, response.json()["error"]["param"]) == (413, None)
        chunks = b"".join(b"1000\r\n" + b"a" * 4096 + b"\r\n" for _ in range(8)) + b"0\r\n\r\n"
        answer = raw(url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert answer.startswith(b"HTTP/1.1 413")


def test_slow_bodies_are_left_and_hold_up_nobody(embedded):
    with serving(embedded, max_body_s=0.5) as (url, _), ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        slow = [stack.enter_context(socket.create_connection((host, port))) for _ in range(40)]
        begin = time.monotonic()
        for sock in slow:
            sock.settimeout(20)
            sock.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"model')
        assert post(url).status_code == 200
        assert all(sock.recv(20).startswith(b"HTTP/1.1 408") for sock in slow)
        assert time.monotonic() - begin < 15


def bomb_png(side):
    """A PNG of ``side`` x ``side`` zeros, some kB long."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    squeezed = zlib.compressobj(9)
    rows = b"".join(squeezed.compress(bytes(side + 1)) for _ in range(side)) + squeezed.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb_gif():
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF")
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_decompression_bomb_is_refused_at_once(url, kind):
    data = bomb_png(12_000) if kind == "png" else bomb_gif()
    begin = time.monotonic()
    response = post(url, data_uri(data, f"image/{kind}"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_image")
    assert "too many pixels" in response.text and time.monotonic() - begin < 5


# --- injections -----------------------------------------------------------------------------

EVIL = ("a\nFAKE 200 line", "\x1b[31mred", "\u202egnp", "<script>", "a" * 5000, "\u2028x")


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_what_a_client_sends_forges_no_line_of_the_log(url, evil, caplog):
    with caplog.at_level(logging.DEBUG, "vpt"):
        post(url, model=evil)
        post(url, perception=evil)
        post(url, f"http://{evil}/")
        post(url, **{evil: 1})
        quoted = httpx.QueryParams({"x": evil})
        httpx.get(f"{url}/v1/models/{quoted}")
        httpx.get(
            f"{url}/{quoted}",
            headers={"user-agent": evil.encode("ascii", "ignore")[:9]}
            if evil.isprintable()
            else {},
        )
    for record in caplog.records:
        line = record.getMessage()
        assert len(line) < 1000 and not re.search(r"[\x00-\x1f\x7f\u2028\u202e]", line), repr(line)


def test_a_header_cannot_be_split(url):
    answer = raw(url, b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\rX-Evil: 1\r\n\r\n", 1)
    assert b"x-evil" not in answer.lower()
    response = httpx.get(f"{url}/v1/models/%0d%0aX-Evil:%201")
    assert response.status_code == 404 and "x-evil" not in response.headers


def test_errors_show_no_paths(url, embedded, monkeypatch):
    monkeypatch.setattr(embedded, "request", lambda **_: (EXAMPLES / "nothing").read_bytes())
    response = post(url)
    assert response.status_code == 500
    assert str(EXAMPLES) not in response.text and "Traceback" not in response.text
    assert httpx.post(f"{url}/v1/chat/completions", json={"messages": messages_of("?")}).json()
