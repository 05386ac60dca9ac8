"""The built-in demo upstream, for channels of `type = "demo"`.

What lives here: a small ASGI app that answers as OpenAI and Claude would, with
true shapes, real pacing and honest words, so that a fresh nbgate can be tried
without any account elsewhere. It is served by nbgate's own server in a process
of its own (`python -m nbgate.demo`). What must not: any part of the gateway,
since the demo stands on the other side of it. Heat: none, it is no benchmark.
"""
