"""Images in URLs: data URIs, and remote files from permitted public hosts only."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vpt.errors import ImageError
from vpt.images import ImageLimits, load_image

PUBLIC = "93.184.216.34"


def png(side=20):
    file = io.BytesIO()
    Image.effect_noise((side, side), 90).save(file, "PNG")
    return file.getvalue()


PICTURE = png()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; ``/to/...`` redirects to the rest."""

    def do_GET(self):
        self.server.seen.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            return self.answer(302, b"", Location=self.path[4:])
        if self.path == "/loop":
            return self.answer(302, b"", Location="/loop")
        if self.path == "/nowhere":
            return self.answer(302, b"")
        if self.path == "/short":
            return self.answer(200, PICTURE[:-9], **{"Content-Length": str(len(PICTURE))})
        if self.path == "/zipped":
            return self.answer(200, PICTURE, **{"Content-Encoding": "gzip"})
        if self.path == "/slow":
            return self.drip()
        if self.path == "/endless":
            return self.answer(200, PICTURE + bytes(10_000), **{"X-No-Length": "1"})
        if self.path == "/page":
            return self.answer(200, b"<html>not an image</html>")
        return self.answer(404 if self.path == "/missing" else 200, PICTURE)

    def answer(self, status, body, **headers):
        self.send_response(status)
        if "X-No-Length" not in headers:
            headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self):
        try:
            self.send_response(200)
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *args):
        pass


class Net:
    """A name server of our own; whatever address is connected to, the local server answers."""

    def __init__(self, server, monkeypatch):
        self.server = server
        self.names = {}
        self.connected = []
        monkeypatch.setattr(socket, "getaddrinfo", self.resolve)
        monkeypatch.setattr(socket, "create_connection", self.connect)

    def resolve(self, host, port, **_):
        addresses = self.names.get(host, [PUBLIC])
        if not addresses:
            raise socket.gaierror("name not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    def connect(self, address, timeout=None):
        self.connected.append(address)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        sock.connect(self.server.server_address)
        return sock


@contextmanager
def listening(handler):
    """A server on loopback that notes what it is asked in ``seen``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server():
    with listening(Handler) as server:
        yield server


@pytest.fixture
def net(server, monkeypatch):
    server.seen.clear()
    return Net(server, monkeypatch)


def load(url, *domains, **limits):
    limits = ImageLimits(allowed_media_domains=domains or ("example.org",), **limits)
    return load_image(url, limits=limits)


def test_a_permitted_host_is_asked_at_the_address_that_was_checked(net):
    loaded = load("http://Example.org/a b.png?q=1 2".replace(" ", "%20"))
    assert (loaded.digest, loaded.source[:18]) == (load_image(PICTURE).digest, "http://Example.org")
    assert net.connected == [(PUBLIC, 80)]
    assert net.server.seen == [("example.org", "/a%20b.png?q=1%202")]


def test_a_redirect_is_followed_to_a_permitted_host(net):
    url = "http://example.org/to/http://cdn.example.org:8080/a.png"
    assert load(url, "example.org", "CDN.example.org").size_wh == (20, 20)
    assert net.connected == [(PUBLIC, 80), (PUBLIC, 8080)]
    assert load("http://example.org/to//a.png", "*").size_wh == (20, 20)


@pytest.mark.parametrize(
    "url", ["http://a.b/c.png", "https://a.b/c.png", "http://127.0.0.1/c.png", "HTTP://a.b"]
)
def test_nothing_is_fetched_unless_it_is_permitted(net, url):
    words = rf"'{url}' is a URL; remote images are not fetched, .*allowed_media_domains=\['"
    with pytest.raises(ImageError, match=words):
        load_image(url)
    assert not net.connected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://other.org/a.png", r"host 'other\.org' of .* is not in allowed_media_domains"),
        ("http://www.example.org/a.png", r"'www\.example\.org' of .* is not in allowed_media"),
        ("http://example.org@other.org/a.png", "contains a user name or password; remove them"),
        ("http://user:pw@example.org/a.png", "contains a user name or password; remove them"),
        ("ftp://example.org/a.png", "is not an http or https URL; download it"),
        ("s3://example.org/a.png", "is not an http or https URL; download it"),
        ("http://example.org\\@evil.org/", "is not a valid URL: it has a space, backslash"),
        ("http://example.org/a\r\nHost: b", "is not a valid URL: it has a space, backslash"),
        ("http://example.org:0/", "is not a valid URL: it has no host, or an impossible port"),
        ("http://example.org:99999/", "is not a valid URL: Port out of range"),
        ("http:///etc/passwd", "is not a valid URL: it has no host"),
        ("http://[::1/", "is not a valid URL: "),
        (f"http://{'ü' * 80}.org/", "is not a valid URL: "),
        ("http://example.org/to/http://other.org/", r"'other\.org' of .* is not in allowed_media"),
        ("http://example.org/to/file:///etc/passwd", "is not an http or https URL"),
        ("http://example.org/to/http://u:p@example.org/", "contains a user name or password"),
        ("http://example.org/loop", "was redirected more than 5 times; pass the file"),
        ("http://example.org/nowhere", "cannot be fetched: status 302 without a Location"),
        ("http://example.org/missing", "cannot be fetched: status 404 Not Found; check it"),
        ("http://example.org/short", "cannot be fetched: the connection ended early"),
        ("http://example.org/zipped", "cannot be fetched: the server sent it compressed"),
        ("http://example.org/page", "is an HTML page, not an image"),
        ("http://no.example.org/", "cannot be fetched: name not known; check it"),
    ],
)
def test_what_cannot_be_fetched_is_an_image_error(net, url, words):
    net.names["no.example.org"] = []
    with pytest.raises(ImageError, match=words):
        load(url, "example.org", "no.example.org")


NOT_PUBLIC = """
    127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1
    240.0.0.1 255.255.255.255 ::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::127.0.0.1
    64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: 2001:0:1::1 2001:db8::1 ::ffff:0:10.0.0.1 4000::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_a_host_with_an_address_that_is_not_public_is_refused(net, address):
    net.names["example.org"] = [PUBLIC, address]
    for url in ("http://example.org/a.png", "http://other.org/to/http://example.org/a.png"):
        net.connected.clear()
        with pytest.raises(ImageError, match=r"^the host .* has an address that is not public"):
            load(url, "*")
        assert net.connected == [(PUBLIC, 80)] * ("/to/" in url)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_a_public_address_of_any_kind_is_asked(net, address):
    net.names["example.org"] = [address]
    load("http://example.org/a.png")
    assert net.connected == [(address, 80)]


@pytest.mark.parametrize(
    "host", ["2130706433", "0177.0.0.1", "0x7f.0.0.1", "127.1", "0x7f000001", "8.8.8.010", "1.0x"]
)
def test_an_address_in_an_unusual_notation_is_refused(net, host):
    with pytest.raises(ImageError, match=rf"host '{host}' is an address in an unusual notation"):
        load(f"http://{host}/a.png", "*")
    assert not net.connected


def test_a_slow_server_is_left_at_the_limit(net):
    begin = time.monotonic()
    with pytest.raises(ImageError, match=r"/slow' took longer than 0\.2 s; download the image"):
        load("http://example.org/slow", max_fetch_s=0.2)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("path", ["a.png", "endless"])
def test_no_more_is_read_than_the_limit(net, path):
    size = len(PICTURE)
    with pytest.raises(ImageError, match=f"larger than the limit of {size - 1} bytes; shrink it"):
        load(f"http://example.org/{path}", max_bytes=size - 1)
    with pytest.raises(ImageError, match="has too many pixels: 20x20, the limit is 399"):
        load("http://example.org/a.png", max_pixels=399)


def test_tls_is_checked_against_the_name(net):
    with pytest.raises(ImageError, match=r"'https://example\.org/a\.png' cannot be fetched: .*SSL"):
        load("https://example.org/a.png")
    assert net.connected == [(PUBLIC, 443)]


@pytest.mark.parametrize("domains", ["example.org", ("https://example.org",), (3,), ("",)])
def test_hosts_that_are_no_names_are_refused(domains):
    with pytest.raises(ImageError, match="allowed_media_domains must be a list of host names"):
        ImageLimits(allowed_media_domains=domains)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:;BASE64,", "data:;base64,%20\n"])
def test_a_data_uri_is_read(head):
    loaded = load_image(head + base64.b64encode(PICTURE).decode())
    assert (loaded.digest, loaded.source) == (load_image(PICTURE).digest, "<data URI>")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("data:image/png,abc", "is not base64; expected data:image/png;base64"),
        ("data:image/png;base64", "is not base64; expected data:image/png;base64"),
        (
            "data:image/png;base64," + "*" * 9999,
            r"\.\.\.' is not valid base64: .*; encode it again",
        ),
        ("data:image/png;base64,", "'<data URI>' is empty; expected an image"),
        ("data:image/png;base64," + "A" * 9999 + "=", "'<data URI>' is not a supported image"),
        ("data:image/png;base64," + "A" * 20_000, r"larger than the limit of 10000 bytes; shrink"),
        ("data:;base64," + base64.b64encode(png(21)).decode(), "too many pixels: 21x21"),
    ],
)
def test_other_data_uris_are_refused_in_short_words(uri, words):
    with pytest.raises(ImageError, match=words) as caught:
        load_image(uri, limits=ImageLimits(max_bytes=10_000, max_pixels=400))
    assert len(str(caught.value)) < 250
