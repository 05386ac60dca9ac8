"""Hostile requests and what must come of them: a table.

Each row: name, bytes, statuses of the final answers in order, and whether the
server ends the connection. No status and no end means that the server waits.
"""

from __future__ import annotations

H = b"Host: a\r\nAuthorization: Bearer k\r\n"
P = b"POST /v1/x HTTP/1.1\r\n" + H
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
OK = P + b"Content-Length: 2\r\n\r\n{}"


def body(length: bytes, sent: bytes = b"{}") -> bytes:
    return P + b"Content-Length: " + length + b"\r\n\r\n" + sent


def te(value: bytes, sent: bytes = b"2\r\n{}\r\n0\r\n\r\n") -> bytes:
    return P + b"Transfer-Encoding: " + value + b"\r\n\r\n" + sent


def chunks(sent: bytes) -> bytes:
    return te(b"chunked", sent)


def field(line: bytes) -> bytes:
    return P + line + b"\r\nContent-Length: 2\r\n\r\n{}"


def line(first: bytes) -> bytes:
    return first + b"\r\n" + H + b"Content-Length: 2\r\n\r\n{}"


def host(value: bytes) -> bytes:
    return b"POST /v1/x HTTP/1.1\r\nHost: " + value + b"\r\nAuthorization: Bearer k\r\nContent-Length: 2\r\n\r\n{}"


Case = tuple[str, bytes, list[int], bool]

CASES: list[Case] = [
    # lengths
    ("length plus sign", body(b"+2"), [400], True),
    ("length minus sign", body(b"-2"), [400], True),
    ("length underscore", body(b"1_0"), [400], True),
    ("length hex", body(b"0x2"), [400], True),
    ("length exponent", body(b"2e0"), [400], True),
    ("length fraction", body(b"2.0"), [400], True),
    ("length list of equals", body(b"2, 2"), [400], True),
    ("length list of different", body(b"2,3"), [400], True),
    ("length twice the same", field(b"Content-Length: 2"), [400], True),
    ("length twice different", field(b"Content-Length: 0"), [400], True),
    ("length empty", body(b""), [400], True),
    ("length only blanks", body(b"  "), [400], True),
    ("length fullwidth digit", body("\uff12".encode()), [400], True),
    ("length beyond 64 bits", body(b"18446744073709551618"), [400], True),
    ("length of nineteen digits", body(b"1000000000000000000"), [400], True),
    ("length past the bound", body(b"33554433"), [413], True),
    ("length past the bound by far", body(b"99999999999999"), [413], True),
    ("length vertical tab", body(b"2\x0b"), [400], True),
    ("length then a request as body", body(b"%d" % len(SMUGGLED), SMUGGLED), [200], False),
    ("length short by one request", body(b"2", b"{}" + SMUGGLED), [200, 404], False),
    ("length incomplete", body(b"3"), [], False),
    # transfer codings
    ("both framings", te(b"chunked\r\nContent-Length: 2"), [400], True),
    ("both framings, length first", field(b"Transfer-Encoding: chunked"), [400], True),
    ("coding gzip then chunked", te(b"gzip, chunked"), [400], True),
    ("coding chunked twice", te(b"chunked\r\nTransfer-Encoding: chunked"), [400], True),
    ("coding xchunked", te(b"xchunked"), [400], True),
    ("coding quoted", te(b'"chunked"'), [400], True),
    ("coding with comma", te(b"chunked,"), [400], True),
    ("coding with leading comma", te(b",chunked"), [400], True),
    ("coding empty", te(b""), [400], True),
    ("coding folded", te(b"\r\n chunked"), [400], True),
    ("coding with a tab before", te(b"\tchunked"), [200], False),
    ("coding with blanks behind", te(b"chunked  "), [200], False),
    ("coding mixed case", te(b"cHuNkEd"), [200], False),
    ("coding under 1.0", te(b"chunked").replace(b"1.1", b"1.0", 1), [400], True),
    # chunks
    ("chunk size minus", chunks(b"-2\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk size blank before", chunks(b" 2\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk size blank behind", chunks(b"2 \r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk size underscore", chunks(b"0_2\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk size of 16 digits", chunks(b"0000000000000002\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk size wraps 64 bits", chunks(b"10000000000000002\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk size past the bound", chunks(b"2000001\r\n{}"), [413], True),
    ("chunk ended by LF", chunks(b"2\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk ended by CR", chunks(b"2\r{}\r\n0\r\n\r\n"), [400], True),
    ("chunk data too long", chunks(b"2\r\n{} \r\n0\r\n\r\n"), [400], True),
    ("chunk data too short", chunks(b"3\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk data without CRLF", chunks(b"2\r\n{}0\r\n\r\n"), [400], True),
    ("chunk data ended by LF", chunks(b"2\r\n{}\n0\r\n\r\n"), [400], True),
    ("chunk extension", chunks(b"2;a;b=c;d=\"e;\\\"\"\r\n{}\r\n0\r\n\r\n"), [200], False),
    ("chunk extension with LF", chunks(b"2;a\nb\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk extension with CR", chunks(b"2;a\rb\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk extension unclosed", chunks(b'2;a="\r\n{}\r\n0\r\n\r\n'), [400], True),
    ("chunk extension too long", chunks(b"2;" + b"a" * 5000 + b"\r\n{}\r\n0\r\n\r\n"), [400], True),
    ("chunk last with garbage", chunks(b"2\r\n{}\r\n0x\r\n\r\n"), [400], True),
    ("chunk last cut", chunks(b"2\r\n{}\r\n0\r\n"), [], False),
    ("trailer that authenticates", chunks(b"2\r\n{}\r\n0\r\nHost: b\r\nAuthorization: Bearer x\r\n\r\n"), [200], False),
    ("trailer folded", chunks(b"2\r\n{}\r\n0\r\nA: b\r\n c\r\n\r\n"), [400], True),
    ("trailer without name", chunks(b"2\r\n{}\r\n0\r\n: b\r\n\r\n"), [400], True),
    ("trailer with LF", chunks(b"2\r\n{}\r\n0\r\nA: b\n\r\n\r\n"), [400], True),
    ("trailers too many", chunks(b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 33 + b"\r\n"), [431], True),
    ("trailers too long", chunks(b"2\r\n{}\r\n0\r\n" + (b"A: " + b"b" * 3000 + b"\r\n") * 3 + b"\r\n"), [431], True),
    ("chunked, then a request", chunks(b"2\r\n{}\r\n0\r\n\r\n") + OK, [200, 200], False),
    # fields
    ("field blank before colon", field(b"X-A : b"), [400], True),
    ("field NUL in value", field(b"X-A: b\x00"), [400], True),
    ("field NUL in name", field(b"X\x00: b"), [400], True),
    ("field DEL in value", field(b"X-A: b\x7f"), [400], True),
    ("field bare CR", field(b"X-A: b\rX-B: c"), [400], True),
    ("field bare LF", field(b"X-A: b\nX-B: c"), [400], True),
    ("field fold", field(b"X-A: b\r\n\tc"), [400], True),
    ("field first line folded", P.replace(b"Host", b" Host", 1) + b"\r\n", [400], True),
    ("field without colon", field(b"X-A"), [400], True),
    ("field name quoted", field(b'"X": b'), [400], True),
    ("field name utf-8", field("X-\u00e4: b".encode()), [400], True),
    ("field value utf-8", field("X-A: \u00e4".encode()), [200], False),
    ("fields too many", field(b"\r\n".join([b"A: b"] * 101)), [431], True),
    ("fields just few enough", field(b"\r\n".join([b"A: b"] * 97)), [200], False),
    ("field value too long", field(b"X-A: " + b"b" * 9000), [431], True),
    ("field name too long", field(b"X" * 9000 + b": b"), [431], True),
    ("fields too long together", field(b"\r\n".join([b"A: " + b"b" * 4000] * 9)), [431], True),
    ("field endless", P + b"X: " + b"b" * 9000, [431], True),
    # request lines
    ("line too long", line(b"POST /" + b"a" * 9000 + b" HTTP/1.1"), [414], True),
    ("line endless", b"GET /" + b"a" * 9000, [414], True),
    ("version 0.9", line(b"POST /v1/x HTTP/0.9"), [400], True),
    ("version 0.9 simple", b"GET /\r\n\r\n", [400], True),
    ("version 2.0", line(b"POST /v1/x HTTP/2.0"), [505], True),
    ("version 1.10", line(b"POST /v1/x HTTP/1.10"), [400], True),
    ("version lower case", line(b"POST /v1/x http/1.1"), [400], True),
    ("two blanks", line(b"POST  /v1/x HTTP/1.1"), [400], True),
    ("two blanks behind the target", line(b"POST /v1/x  HTTP/1.1"), [400], True),
    ("protocol RTSP", line(b"POST /v1/x RTSP/1.0"), [400], True),
    ("protocol ICE", line(b"SOURCE /v1/x ICE/1.0"), [400], True),
    ("blank in target", line(b"POST /v1/x y HTTP/1.1"), [400], True),
    ("blank behind version", line(b"POST /v1/x HTTP/1.1 "), [400], True),
    ("method unknown", line(b"BREW /v1/x HTTP/1.1"), [400], True),
    ("method mixed case", line(b"Post /v1/x HTTP/1.1"), [400], True),
    ("method CONNECT", line(b"CONNECT a:443 HTTP/1.1"), [405], True),
    ("target utf-8", line("POST /v1/\u00e4 HTTP/1.1".encode()), [400], True),
    ("target backslash is a path of its own", line(b"POST /v1\\x HTTP/1.1"), [404], False),
    ("target bad escape", line(b"POST /v1/%zz HTTP/1.1"), [400], True),
    ("target cut escape", line(b"POST /v1/% HTTP/1.1"), [400], True),
    ("target fragment", line(b"POST /v1/x#a HTTP/1.1"), [400], True),
    ("target control", line(b"POST /v1/\x01 HTTP/1.1"), [400], True),
    ("target javascript", line(b"POST javascript:1 HTTP/1.1"), [400], True),
    ("target of another host", line(b"POST http://evil/v1/x HTTP/1.1"), [200], False),
    ("target with userinfo", line(b"POST http://u:p@evil/v1/x HTTP/1.1"), [400], True),
    ("target without path", line(b"POST http://evil HTTP/1.1"), [404], False),
    ("target double slash", line(b"POST //v1/x HTTP/1.1"), [404], False),
    ("target escaped slash", line(b"POST /v1%2fx HTTP/1.1"), [404], False),
    ("asterisk with POST", line(b"POST * HTTP/1.1"), [400], True),
    # hosts
    ("host missing", b"POST /v1/x HTTP/1.1\r\nContent-Length: 0\r\n\r\n", [400], True),
    ("host twice", host(b"a\r\nHost: a"), [400], True),
    ("host with userinfo", host(b"u@a"), [400], True),
    ("host with path", host(b"a/v1/x"), [400], True),
    ("host with query", host(b"a?b"), [400], True),
    ("host with comma", host(b"a,b"), [400], True),
    ("host with two ports", host(b"a:1:2"), [400], True),
    ("host with a signed port", host(b"a:+1"), [400], True),
    ("host with a long port", host(b"a:123456"), [400], True),
    ("host utf-8", host("\u00e4".encode()), [400], True),
    ("host unclosed bracket", host(b"[::1"), [400], True),
    ("host ip6", host(b"[::1]:80"), [200], False),
    ("host missing under 1.0", b"GET /x HTTP/1.0\r\n\r\n", [404], True),
    # empty lines, sequences
    ("empty lines before", b"\r\n\r\n" + OK, [200], False),
    ("empty lines by LF", b"\n\n" + OK, [400], True),
    ("empty line by CR", b"\r" + OK, [400], True),
    ("many empty lines", b"\r\n" * 50 + OK, [200], False),
    ("empty line between", OK + b"\r\n" + OK, [200, 200], False),
    ("garbage after a request", OK + b"\x00\x01\x02\x03", [200, 400], True),
    ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400], True),
    ("SSH banner", b"SSH-2.0-OpenSSH_9.0\r\n", [400], True),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], True),
    ("PROXY line", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + OK, [400], True),
    ("a response", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", [400], True),
    ("bad, then good", line(b"POST /v1/x HTTP/1.1x") + OK, [400], True),
    ("good, bad, good", OK + host(b"a b") + OK, [200, 400], True),
    ("close, then good", field(b"Connection: close") + OK, [200], True),
    ("close in a list, then good", field(b"Connection: x, Close") + OK, [200], True),
    ("early 401 over a request as body", b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
     + SMUGGLED, [401], False),
    ("early 401 over half a body", b"POST /v1/x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 900\r\n"
     b"\r\n" + SMUGGLED, [401], True),
    ("early 401 over a big body", b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 90000\r\n\r\n" + SMUGGLED,
     [401], True),
    ("GET with a body", b"GET /v1/x HTTP/1.1\r\n" + H + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED + OK,
     [405, 200], False),
    ("GET with chunks", b"GET /v1/x HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + OK,
     [405, 200], False),
    ("upgrade with a body", field(b"Connection: Upgrade\r\nUpgrade: websocket") + OK, [200, 200], False),
    ("upgrade to h2c", field(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA") + OK,
     [200, 200], False),
]  # fmt: skip
