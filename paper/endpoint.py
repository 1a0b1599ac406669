"""One request to a chat endpoint, and how much of what comes back is read, waited for and shown.

The standard library's HTTP client alone: it follows no redirect and asks no proxy, either of which
would carry the key elsewhere. A proxy from the environment is used only where that is asked for.
"""

import base64
import contextlib
import functools
import html
import http.client
import io
import re
import ssl
import time
from urllib.parse import parse_qsl, unquote, urlsplit

from support.errors import UserError

LONGEST_ANSWER = 1 << 20  # bytes; a completion of one token takes a few thousand


class Malformed(Exception):
    """An answer that is no chat completion. Worth another try."""


class Deadline(io.RawIOBase):
    """What a socket receives until the time `end` (of time.monotonic), however slowly it drips.

    A socket's own timeout begins anew with each byte, so by itself it bounds nothing.
    """

    def __init__(self, sock, end):
        self.sock, self.end = sock, end
        self.raw = sock.makefile("rb", buffering=0)  # keeps the socket open while it is read

    def readable(self):
        """True: io asks."""
        return True

    def readinto(self, buffer):
        """Fill `buffer` with what there is, return how much; TimeoutError after the end."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        """Let go of the socket."""
        self.raw.close()
        super().close()


class UntilDeadline:
    """A socket as http.client's response sees it: something to read from, by way of a Deadline."""

    def __init__(self, sock, end):
        self.sock, self.end = sock, end

    def makefile(self, mode):
        """What http.client reads its answer from."""
        return io.BufferedReader(Deadline(self.sock, self.end))


def response_until(end, sock, *args, **options):
    """An HTTPResponse that ends at the time `end`; stands in for the class in http.client."""
    return http.client.HTTPResponse(UntilDeadline(sock, end), *args, **options)


def is_http(url):
    """Whether `url` is plain ASCII and names a host over http or https."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        parts.hostname.encode("idna")  # a label that is empty or too long
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, AttributeError):  # a port that is no number; no host
        return False


def is_key(key):
    """Whether `key` can stand in a header, and is of a length that a key may have."""
    return 0 < len(key) <= 10_000 and key.isascii() and key.isprintable() and " " not in key


def proxy_from_environment(scheme, host):
    """The proxy that http_proxy or https_proxy names, None where no_proxy exempts the host."""
    from urllib.request import getproxies_environment, proxy_bypass_environment

    url = getproxies_environment().get(scheme)
    if not url:
        raise UserError(
            f"--judge-proxy, but the environment has no {scheme}_proxy, expected a proxy's URL"
        )
    if proxy_bypass_environment(host):
        return None
    if "://" not in url:
        url = "http://" + url
    if not is_http(url) or urlsplit(url).scheme != "http":  # not shown: it may hold a password
        raise UserError(f"{scheme}_proxy in the environment is no proxy's URL, expected http://...")
    return urlsplit(url)


class Endpoint:
    """Where the requests go. `shown` is its address as messages may repeat it.

    url: the base URL, as in https://api.openai.com/v1; its query is sent, and kept out of
    messages. key: sent as a bearer token, to that URL only. timeout: seconds for the whole of an
    answer, from the connection to its last byte. proxy: whether to go by the environment's proxy.
    UserError where the URL, the key or the proxy is of no use.
    """

    def __init__(self, url, key=None, timeout=30.0, proxy=False):
        if not is_http(url):  # not shown: what is mistyped may hold a key
            raise UserError(
                "the judge's URL is not valid, expected http:// or https://, as in "
                "https://api.openai.com/v1"
            )
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise UserError(
                "the judge's URL carries a user name or password; give the key by an environment "
                "variable instead"
            )
        if key is not None and not is_key(key):
            raise UserError(
                "the judge's key is empty, longer than 10,000 characters, or has a space, a line "
                "break or a non-ASCII character in it"
            )
        path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.netloc, self.host, self.port = parts.netloc, parts.hostname, parts.port
        self.target = f"{path}?{parts.query}" if parts.query else path
        self.timeout = timeout
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.context = ssl.create_default_context() if parts.scheme == "https" else None
        self.proxy = proxy_from_environment(parts.scheme, parts.hostname) if proxy else None
        self._secrets = secrets_of(key, parts.query, self.proxy)
        self.shown = mask(f"{parts.scheme}://{parts.netloc}{path}", [key] if key else [])

    def post(self, body):
        """(status, headers, content) of the answer to the JSON `body`, bytes.

        OSError or http.client.HTTPException where there is none in time; Malformed where it is
        longer than any completion.
        """
        end = time.monotonic() + self.timeout
        connection, target, headers = self._connection()
        connection.response_class = functools.partial(response_until, end)
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.settimeout(max(end - time.monotonic(), 0.001))
            connection.request("POST", target, body, headers)
            with connection.getresponse() as response:
                content = response.read(LONGEST_ANSWER + 1)
                if len(content) > LONGEST_ANSWER:
                    raise Malformed("an answer of more than 1 MiB")
                return response.status, response.headers, content

    def _connection(self):
        """(connection, what to ask it for, with which headers), by the proxy if there is one."""
        if self.context is None:
            connect = http.client.HTTPConnection
        else:
            connect = functools.partial(http.client.HTTPSConnection, context=self.context)
        if self.proxy is None:
            return connect(self.host, self.port, timeout=self.timeout), self.target, self.headers
        connection = connect(self.proxy.hostname, self.proxy.port or 80, timeout=self.timeout)
        login = {}
        if self.proxy.username:
            pair = f"{unquote(self.proxy.username)}:{unquote(self.proxy.password or '')}"
            login["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        if self.context is not None:  # a tunnel: the proxy sees the host's name, nothing else
            connection.set_tunnel(self.host, self.port, login)
            return connection, self.target, self.headers
        return connection, f"http://{self.netloc}{self.target}", self.headers | login

    def plain(self, text):
        """`text` of the other side, fit to show: one line, no control character, no secret."""
        readable = "".join(c if c.isprintable() else " " for c in text)
        return " ".join(mask(readable, self._secrets).split())


def secrets_of(key, query, proxy):
    """What a server may send back and no one is to see: the key, the query's values, a login.

    Values of one to three characters hide nothing, and would be masked inside of ordinary words.
    """
    found = [key, query]
    values = [pair.partition("=")[2] for pair in query.split("&")]
    values.extend(value for _, value in parse_qsl(query))
    found.extend(value for value in values if len(value) > 3)
    if proxy is not None:
        found.extend((proxy.password, unquote(proxy.password or "")))
    return sorted({text for text in found if text}, key=len, reverse=True)


def mask(text, secrets):
    """`text` with "..." in the place of each secret, however it is written there."""
    for secret in secrets:
        for form in (secret, secret.encode().hex(), *base64_cores(secret)):
            text = re.sub(spelled(form), "...", text, flags=re.IGNORECASE)
    return text


def base64_cores(secret):
    """The characters that base64 writes for `secret` and nothing else, wherever it begins.

    Base64 turns three bytes into four characters, so what stands before the secret ("Bearer ",
    "name:") shifts it by 0, 1 or 2 bytes. Of short secrets nothing is left that would be theirs.
    """
    data = secret.encode()
    for shift in range(3):
        first = -(-8 * shift // 6)  # characters i holds the bits 6 i to 6 i + 5
        last = 8 * (shift + len(data)) // 6
        if last - first >= 6:
            code = base64.b64encode(bytes(shift) + data).decode()[first:last]
            yield code
            yield code.replace("+", "-").replace("/", "_")  # the URL's alphabet


def spelled(text):
    """A pattern of `text`, each character as itself or as a URL, JSON or HTML may write it."""
    patterns = []
    for c in text:
        code = ord(c)
        forms = [
            re.escape(c),
            re.escape(html.escape(c)),
            rf"%(?:25)*{code:02x}",
            rf"\\{{1,8}}u{code:04x}",  # bounded: a text of backslashes must not take days
            rf"\\{{1,8}}x{code:02x}",
            f"&#0*{code};",
            f"&#x0*{code:x};",
        ]
        if not c.isalnum():
            forms.append(r"\\{1,8}" + re.escape(c))
        patterns.append(f"(?:{'|'.join(forms)})")
    return r"\s*".join(patterns)
