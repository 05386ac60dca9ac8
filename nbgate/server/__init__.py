"""HTTP/1.1 server for any ASGI 3 application, on raw uvloop transports.

Rooms: `settings` (bounds and counters), `wire` (grammar and framing, pure),
`head` (one request head, httptools), `protocol` (one connection), `cycle` (one
request and its answer), `splice` (an upstream answer joined to a client),
`waiter` (wake-ups), `listener` (sockets, ticker, drain).

Law: nothing here imports the rest of nbgate; it could serve any app.
"""
