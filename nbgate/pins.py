"""Which channel and account a stored object belongs to.

Responses and stored chat completions live at the upstream account that made
them: a later call that names the id must go there, and only for the account
that owns it.

Rule 1: looked up, never guessed: an unknown id is 404.
Rule 2: a pin is written down before the bytes that show the id go out.
Rule 3: bounded: the oldest pins go first.

What lives here: the table, and one append-only file per worker slot by which
the workers of a node tell each other. What must not: choosing among channels.
Heat: R for calls that store, else cold.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbgate.channels import Candidates
from nbgate.dialects import DIALECTS
from nbgate.errors import GateError
from nbgate.json_scan import JsonScan
from nbgate.sse import fields, first_event

if TYPE_CHECKING:
    from nbgate.body import Fields
    from nbgate.call import Call
    from nbgate.channels import Table, Target
    from nbgate.routes import Match
    from nbgate.upstream import Connection

logger = logging.getLogger("nbgate.pins")

MAX_PINS: Final = 100_000
FILE_BYTES: Final = 16 * 1024 * 1024
# Ids as OpenAI makes them: platform.openai.com/docs/api-reference, read 2026-11.
_ID: Final = {
    "responses": re.compile(r"resp_[A-Za-z0-9_-]{1,256}"),
    "chat": re.compile(r"chatcmpl[-_][A-Za-z0-9_-]{1,256}"),
}


class Pins:
    """Ids of stored objects, with their channel and owner.

    `run_dir` holds the files shared by the workers of a node; "" = this worker
    alone.
    """

    def __init__(self, run_dir: str, slot: int, max_pins: int = MAX_PINS) -> None:
        self._pins: OrderedDict[str, tuple[str, str]] = OrderedDict()  # id -> (account, target label)
        self._max = max_pins
        self._own = f"pins-{slot}"
        self._dir = Path(run_dir) if run_dir else None
        self._read_to: dict[str, int] = {}
        self._fd = -1
        if self._dir is not None:
            self._fd = os.open(self._dir / self._own, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __len__(self) -> int:
        return len(self._pins)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def stated_id(self, match: Match, fields: Fields | None) -> str:
        """Return the id of the stored object that a call is about, or ""."""
        stated = match.params.get("id", "")
        if not stated and fields is not None and fields.previous_response_id:
            stated = fields.previous_response_id
        return stated

    def target(self, stated: str, account: str, table: Table) -> Candidates:
        """Find the one target that holds an object. Raises: GateError 404."""
        found = self._pins.get(stated)
        if found is None:
            self._read_others()
            found = self._pins.get(stated)
        # APPSEC: another account's id answers as one that does not exist.
        if found is None or found[0] != account:
            raise GateError("not_found", f"There is no object with the id {stated[:100]!r}.", param="id")
        for target in table.targets:
            if target.label == found[1]:
                return Candidates(((target,),), {target.name: ""})
        raise GateError("not_found", "The channel that held this object is gone.", param="id")

    def note(self, conn: Connection, dialect: str, target: Target, call: Call) -> None:
        """Remember who made a stored object, before the client sees its id."""
        pattern = _ID.get(dialect)
        if pattern is None or call.key is None:
            return
        stated, account = _own_id(conn, dialect), call.key.account_id
        if pattern.fullmatch(stated) is None:
            return
        known = self._pins.get(stated)
        # APPSEC: an answer may repeat what its asker wrote: an id that is another account's stays theirs.
        if known is None or known[0] == account:
            self._put(stated, account, target.label, own=True)

    def _put(self, stated: str, account: str, label: str, own: bool) -> None:
        pins = self._pins
        pins[stated] = (account, label)
        if len(pins) > self._max:
            pins.popitem(last=False)
        if own and self._fd >= 0:
            self._append(f"{stated}\t{account}\t{label}\n".encode())

    def _append(self, line: bytes) -> None:
        try:
            os.write(self._fd, line)
            if os.fstat(self._fd).st_size > FILE_BYTES:
                os.ftruncate(self._fd, 0)
        except OSError as exc:
            logger.warning("pins cannot be shared with other workers: %s", exc)

    def _read_others(self) -> None:
        """Read what any worker, this one before its restart too, has pinned."""
        if self._dir is None:
            return
        for path in self._dir.glob("pins-*"):
            try:
                self._read_file(path)
            except OSError as exc:
                logger.warning("pins of another worker cannot be read: %s", exc)

    def _read_file(self, path: Path) -> None:
        start = self._read_to.get(path.name, 0)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < start:
                start = 0  # it was begun anew
            file.seek(start)
            data = file.read(FILE_BYTES)
        whole = data.rfind(b"\n") + 1
        self._read_to[path.name] = start + whole
        for line in data[:whole].decode("utf-8", "replace").splitlines():
            parts = line.split("\t")
            if len(parts) == 3 and parts[0] not in self._pins:
                self._put(parts[0], parts[1], parts[2], own=False)


def _own_id(conn: Connection, dialect: str) -> str:
    """Read the id of an answer's own object, "" if it tells none yet.

    APPSEC: the top-level one: answers repeat what their asker wrote.
    """
    data = conn.buffered
    if conn.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        event = first_event(data)
        if event is None:
            return ""
        name, payload = fields(event)
        return DIALECTS[dialect].read_event(name, payload).id if payload is not None else ""
    scan = JsonScan()
    scan.feed(data)
    return scan.words.get(b"id", "")
