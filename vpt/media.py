"""Bytes of images in URLs: data URIs, and files on public hosts that the user has permitted.

A remote image is fetched only if its host is listed. The name is resolved once; all its addresses
must be public, and the connection goes to one of the checked addresses, so that a second answer of
the name server changes nothing. Each redirect is checked like the first URL. Proxies are not used.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from vpt.errors import ImageError

MAX_REDIRECTS = 5

_REDIRECTS = (301, 302, 303, 307, 308)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.ASCII)  # a last label that makes a host an address
_UNICAST = ipaddress.IPv6Network("2000::/3")
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as networks of IPv6 see them


def is_url(path: str) -> bool:
    """Whether a path is a URL, remote or of any other kind."""
    return re.match(r"[a-z][a-z0-9+.-]*://|(data|file):", path, re.IGNORECASE) is not None


def short(name: str) -> str:
    """Quote a name for a message; base64 that was taken for a path must not flood the log."""
    return repr(name if len(name) <= 100 else f"{name[:80]}...")


def read_data_uri(uri: str, max_bytes: int) -> bytes:
    """Return the bytes of ``data:image/png;base64,...``; raise ``ImageError`` if there are none."""
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{short(uri)} is not base64; expected data:image/png;base64,...")
    if len(body) * 3 // 4 > max_bytes + 2:  # before a copy is made
        raise ImageError(f"{short(uri)} is larger than the limit of {max_bytes} bytes; shrink it")
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except ValueError as exc:
        raise ImageError(f"{short(uri)} is not valid base64: {exc}; encode it again") from exc


def fetch(url: str, domains: Collection[str], max_bytes: int, max_s: float) -> bytes:
    """Return the bytes of a remote file, one more than ``max_bytes`` at most.

    Args:
        url: ``http`` or ``https``, without user name or password.
        domains: host names that may be asked, redirects included; ``"*"`` permits every public one.
        max_bytes: of the file.
        max_s: seconds for everything but the resolution of names.

    Raises:
        ImageError: if the URL is not permitted, leads to an address that is not public, or does
            not return a file within the limits.
    """
    end = time.monotonic() + max_s
    for _ in range(MAX_REDIRECTS + 1):
        parts, host = _check_url(url, domains)
        try:
            found = _get(parts, host, max_bytes, end)
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as exc:
            _check_time(url, end, max_s)
            raise ImageError(
                f"{short(url)} cannot be fetched: {exc or type(exc).__name__}; check it, or "
                "download the image and pass the file"
            ) from exc
        _check_time(url, end, max_s)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise ImageError(f"{short(url)} was redirected more than {MAX_REDIRECTS} times; pass the file")


def _check_time(url: str, end: float, max_s: float) -> None:
    if time.monotonic() >= end:
        raise ImageError(
            f"{short(url)} took longer than {max_s:g} s; download the image and pass the file"
        )


def _check_url(url: str, domains: Collection[str]) -> tuple[SplitResult, str]:
    """Split a URL; return its host in lower case, in ASCII."""
    try:
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise ValueError("it has a space, backslash or control character")
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        host = host if host.isascii() else host.encode("idna").decode()
        if parts.scheme in ("http", "https") and (not host or parts.port == 0):
            raise ValueError("it has no host, or an impossible port")
    except ValueError as exc:  # UnicodeError among them
        raise ImageError(f"{short(url)} is not a valid URL: {exc}; correct it") from exc
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{short(url)} is not an http or https URL; download it, pass the file")
    if "@" in parts.netloc:
        raise ImageError("the URL of an image contains a user name or password; remove them")
    if not domains:
        raise ImageError(
            f"{short(url)} is a URL; remote images are not fetched, pass a file, or load the model "
            f"with allowed_media_domains=[{host!r}] (`vpt ask --allowed-media-domains {host}`)"
        )
    if not {"*", host} & {domain.lower() for domain in domains}:
        raise ImageError(
            f"the host {host!r} of {short(url)} is not in allowed_media_domains "
            f"({', '.join(domains)}); add it there, or pass a file"
        )
    if _NUMBER.fullmatch(host.rpartition(".")[2]) and ":" not in host:
        try:
            ipaddress.IPv4Address(host)
        except ValueError as exc:
            raise ImageError(
                f"the host {host!r} is an address in an unusual notation; write it as 1.2.3.4"
            ) from exc
    return parts, host


def _public_addresses(host: str, port: int) -> list[str]:
    """Resolve a host; refuse it if any of its addresses is not public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    for address in addresses:
        if not _is_public(ipaddress.ip_address(address)):
            raise ImageError(
                f"the host {host!r} has an address that is not public; only images on public hosts "
                "are fetched"
            )
    return addresses


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address, and the IPv4 address inside it if there is one, is on the internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return _is_public(inner)
        if address not in _UNICAST or address.teredo or address.scope_id:
            return False
    return address.is_global and not address.is_private and not address.is_multicast


@contextmanager
def _connected(parts: SplitResult, host: str, end: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to a checked address of the host; it is cut at ``end``."""
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
    for address in (addresses := _public_addresses(host, port)):
        try:
            sock = socket.create_connection((address, port), max(end - time.monotonic(), 0.01))
            break
        except OSError:
            if address == addresses[-1]:
                raise
    with closing(kind(host, port)) as connection:
        if is_tls:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        connection.sock = sock

        def cut() -> None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(max(end - time.monotonic(), 0), cut)
        timer.daemon = True
        timer.start()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            yield connection
        finally:
            timer.cancel()


def _get(parts: SplitResult, host: str, max_bytes: int, end: float) -> bytes | str:
    """Return the body of one answer, or the URL to which it redirects."""
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
    with _connected(parts, host, end) as connection:
        headers = {"User-Agent": "vpt-runtime", "Accept": "image/*"}
        connection.request("GET", path + query, headers=headers)
        with connection.getresponse() as response:
            if response.status in _REDIRECTS:
                if not (location := response.headers["Location"]):
                    raise ValueError(f"status {response.status} without a Location")
                return location
            if response.status != 200:
                raise ValueError(f"status {response.status} {response.reason}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ValueError("the server sent it compressed")
            if response.length is not None and response.length > max_bytes:
                raise ImageError(
                    f"{short(parts.geturl())} is larger than the limit of {max_bytes} bytes; "
                    "shrink it"
                )
            data = response.read(max_bytes + 1)
            if response.length and len(data) <= max_bytes:
                raise ValueError("the connection ended early")
            return data
