"""The configuration: every rule of the reader, with inputs that break it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nbgate import config as c
from nbgate.config_lines import lines_of

ROOT = Path(__file__).parent.parent
OPENAI = """[channels.main]
type = "openai"
base_url = "https://api.example.com/v1/"
keys = ["sk-up-1"]
models = ["m"]
"""
KEY = "sk-" + "k" * 48


def problems(text: str, env: dict[str, str] | None = None) -> list[str]:
    """Return what is wrong with a text, as `line: message`."""
    try:
        c.parse(text, env or {}, "f.toml")
    except c.ConfigError as exc:
        return [str(problem).removeprefix("f.toml:") for problem in exc.problems]
    return []


# -- what is right


def test_config_of_an_empty_file_has_every_default() -> None:
    config = c.parse("", {})
    assert config.server.listen == ("127.0.0.1:8080",)
    assert (config.server.drain_s, config.server.drain_streams_s, config.server.max_head_kb) == (30.0, 300.0, 32)
    assert (config.streaming.keepalive_s, config.upstream.idle_s, config.router.tries) == (15.0, 55.0, 3)
    assert config.channels == {} and config.keys == () and not config.has_demo


def test_config_example_runs_as_it_is_and_shows_the_defaults() -> None:
    config = c.load(ROOT / "config.example.toml", {}, made_keys=False)
    empty = c.parse("", {})
    assert config.has_demo
    for section in ("server", "admin", "store", "redis", "limits", "billing", "streaming", "upstream", "logging"):
        assert getattr(config, section) == getattr(empty, section), section
    for section in ("site", "signup", "demo", "cors", "router"):
        assert getattr(config, section) == getattr(empty, section), section


def test_config_example_is_right_with_every_comment_taken_off() -> None:
    text = (ROOT / "config.example.toml").read_text()
    text = re.sub(r"^# (\[\[?[a-z].*|[a-z_]+ = .*)$", r"\1", text, flags=re.MULTILINE)
    env = {"NBGATE_ADMIN_KEY": "a" * 20, "OPENAI_API_KEY": "k1", "OPENAI_KEY_2": "k2", "CI_KEY": "c" * 20}
    config = c.parse(text, env)
    bare = c.parse(OPENAI, {}).channels["main"]
    shown = config.channels["openai-main"]
    for field in ("enabled", "priority", "weight", "groups", "proxy", "timeouts", "limits", "headers", "params", "tls"):
        assert getattr(shown, field) == getattr(bare, field), field
    assert [key.value for key in shown.keys] == ["k1", "k2"]
    assert config.keys[0].rpm == 60


def test_config_names_every_setting_in_the_example() -> None:
    text = (ROOT / "config.example.toml").read_text()
    sections = [c.Server, c.Channel, c.Timeouts, c.ChannelKey, c.Key, c.Model, c.Group]
    names = {name for cls in sections for name in cls.__struct_fields__} - {"tpm", "expires_at"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []


def test_config_channel_keys_may_be_strings_or_tables() -> None:
    text = OPENAI.replace('["sk-up-1"]', '["sk-up-1", { value = "sk-up-2", weight = 2, rpm = 500 }]')
    first, second = c.parse(text, {}).channels["main"].keys
    assert (first.value, first.weight, first.rpm) == ("sk-up-1", 1, 0)
    assert (second.value, second.weight, second.rpm) == ("sk-up-2", 2, 500)


def test_config_channel_derives_name_dialects_and_trims_the_url() -> None:
    channel = c.parse(OPENAI, {}).channels["main"]
    assert channel.name == "main" and channel.base_url == "https://api.example.com/v1"
    assert channel.dialects == ("chat", "responses", "embeddings", "completions", "moderations", "images")
    claude = c.parse(OPENAI.replace('"openai"', '"anthropic"'), {}).channels["main"]
    assert claude.dialects == ("messages",)


def test_config_demo_channel_needs_nothing_else() -> None:
    config = c.parse('[channels.d]\ntype = "demo"', {})
    assert config.has_demo
    assert config.channels["d"].models == c.DEMO_MODELS
    assert set(c.DIALECTS) - set(config.channels["d"].dialects) == {"gemini", "rerank"}


def test_config_disabled_demo_channel_starts_no_demo() -> None:
    assert not c.parse('[channels.d]\ntype = "demo"\nenabled = false', {}).has_demo


def test_config_key_group_may_be_one_name_or_a_list() -> None:
    head = f'[groups.a]\n[groups.b]\n[[keys]]\nkey = "{KEY}"\naccount = "x"\ngroup = '
    assert c.parse(head + '"a"', {}).keys[0].group == ("a",)
    assert c.parse(head + '["b", "a"]', {}).keys[0].group == ("b", "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"30d"', 1_000_000 + 30 * 86_400),
        ('"12h"', 1_000_000 + 12 * 3_600),
        ('"2w"', 1_000_000 + 14 * 86_400),
        ('"2030-12-31"', 1_924_905_600),
        ("2030-12-31", 1_924_905_600),
        ("2030-12-31T00:00:00Z", 1_924_905_600),
        ('"2030-12-31T01:00:00+01:00"', 1_924_905_600),
    ],
)
def test_config_key_expiry_is_a_duration_since_the_last_change_or_a_date(text: str, expected: float) -> None:
    config = c.parse(f'[[keys]]\nkey = "{KEY}"\naccount = "x"\nexpires = {text}', {}, written_at=1_000_000)
    assert config.keys[0].expires_at == expected


def test_config_is_frozen() -> None:
    config = c.parse("", {})
    with pytest.raises(AttributeError):
        config.server.workers = 3  # type: ignore[misc]


# -- unknown keys, types, bounds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\n\nworker = 2", '3: server.worker: unknown key; did you mean "workers"?'),
        ("[sever]", '1: sever: unknown section or key; did you mean "server"?'),
        ("[upstream]\nfrobnicate = 1\n", "2: upstream.frobnicate: unknown key"),
        ('[channels.a]\ntype = "demo"\ntimeouts = { connect = 5 }', "3: channels.a.timeouts.connect: unknown key"),
        ('[channels.a]\ntype = "demo"\nname = "x"', "3: channels.a.name: unknown key"),
        ('[models."gpt.4"]\nprice = { inptu = 1 }', 'models."gpt.4".price.inptu: unknown key; did you mean "input"?'),
        (f'[[keys]]\nkey = "{KEY}"\naccount = "a"\n[[keys]]\nkey = "{KEY}x"\naccount = "a"\nrmp = 3', "7: keys[1].rmp"),
        ("source = 'x'", "1: source: unknown section or key"),
    ],
)
def test_config_refuses_an_unknown_key_with_line_and_nearest_name(text: str, expected: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\nworkers = 'two'", '2: server.workers: expected a whole number from 0 to 1024, got "two"'),
        ("[server]\nworkers = -1", "2: server.workers: expected a whole number from 0 to 1024, got -1"),
        ("[server]\nworkers = true", "got true"),
        ("[server]\nworkers = 1.5", "expected a whole number from 0 to 1024, got 1.5"),
        ("[server]\ndrain_s = 0", "2: server.drain_s: expected a number above 0 to 86400, got 0"),
        ("[server]\ndrain_s = nan", "expected a number above 0 to 86400, got nan"),
        ("[server]\ndrain_s = inf", "got inf"),
        ("[server]\nallow_query_key = 1", "2: server.allow_query_key: expected true or false, got 1"),
        ("[server]\nlisten = 'x:1'", "2: server.listen: expected a list of strings, got a string"),
        ("[server]\nlisten = ['a:1',\n 3]", "3: server.listen[1]: expected a string"),
        ("server = 3", "1: server: expected a table, got a whole number"),
        ("[[channels]]", "1: channels: expected a table, got a list"),
        ("[channels]\na = 'x'", "2: channels.a: expected a table, got a string"),
        ("keys = 'x'", "1: keys: expected a list, got a string"),
        ("[redis]\non_failure = 'opne'", 'one of "local", "open", "closed", got "opne"; did you mean "open"?'),
        ("[site]\nrate = 0", "expected a number above 0"),
        ("[site]\ncurrency = ''", "expected a string of 1 to 8 characters"),
        ("[router]\ntries = 2026-01-01", "got a date or time"),
        (f"[[keys]]\nkey = '{KEY}'\naccount = 'a'\nusd = 'all'", 'expected "unlimited" or a number from 0'),
        (f"[[keys]]\nkey = '{KEY}'", "1: keys[0].account: is missing; expected a string of 1 to 128 characters"),
        ("[channels.a]\nweight = 1", "1: channels.a.type: is missing; expected one of"),
    ],
)
def test_config_refuses_a_wrong_type_or_bound_with_expected_and_got(text: str, expected: str) -> None:
    found = problems(text)
    assert any(expected in problem for problem in found), found


def test_config_names_all_problems_at_once_in_the_order_of_lines() -> None:
    text = "[server]\nworkers = 'x'\nlisten = ['nope']\n[router]\ndefault_channel = 'gone'\n[sit]\n"
    found = problems(text, {"NBGATE_ROUTER__TRIES": "0"})
    assert [problem.split(":")[0] for problem in found] == ["2", "3", "5", "6", "NBGATE_ROUTER__TRIES"]


def test_config_with_broken_toml_names_the_line() -> None:
    assert problems("[server]\nworkers = \n")[0].startswith("2: not TOML: ")
    assert problems("a = 1\na = 2\n")[0].startswith("2: not TOML: ")


# -- secrets


def test_config_reads_env_and_file_wherever_a_string_stands(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("sk-from-file\n")
    text = OPENAI.replace('["sk-up-1"]', f'["env:UP", {{ value = "file:{secret}" }}]')
    text += 'headers = { x-team = "env:TEAM" }\nparams = { set = { user = "env:TEAM", deep = [{ a = "env:UP" }] } }\n'
    channel = c.parse(text, {"UP": "sk-from-env", "TEAM": "blue"}).channels["main"]
    assert [key.value for key in channel.keys] == ["sk-from-env", "sk-from-file"]
    assert channel.headers == {"x-team": "blue"}
    assert channel.params.set == {"user": "blue", "deep": [{"a": "sk-from-env"}]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("env:NOPE", "environment variable NOPE is not set"),
        ("env:EMPTY", "environment variable EMPTY is empty"),
        ("env:", "expected env:NAME"),
        ("env:a b", "expected env:NAME"),
        ("file:relative", "expected file:/absolute/path"),
        ("file:/does/not/exist", "cannot read /does/not/exist: No such file or directory"),
        ("file:/", "cannot read /: Is a directory"),
        ("file:/dev/null", "it is empty"),
        ("file:/dev/zero", "it holds more than 65536 bytes"),
    ],
)
def test_config_says_which_secret_is_missing(value: str, expected: str) -> None:
    found = problems(f'\n[admin]\nkey = "{value}"', {"EMPTY": ""})
    assert len(found) == 1 and found[0].startswith("3: admin.key: ") and expected in found[0]


def test_config_never_shows_a_secret(tmp_path: Path) -> None:
    canary = "canary-5f2e"
    (tmp_path / "s").write_text(canary + " with space")
    text = (
        f'[admin]\nkey = "{canary} 1"\n[redis]\nurl = "{canary}"\n[store]\nurl = "{canary}"\n'
        f'[channels.a]\ntype = "openai"\nbase_url = "https://u:{canary}@h/v1"\nproxy = "{canary}"\n'
        f'keys = ["{canary}\\n", "file:{tmp_path}/s", {{ value = 3 }}]\nmodels = ["m"]\n'
        f'headers = {{ host = "{canary}", a = "{canary}\\r\\n" }}\n'
        f'[server]\nworkers = "env:S"\ndata_dir = "sk-{canary}"\nmax_headers = "sk-{canary}"\n'
        f'[[keys]]\nkey = "{canary} x"\naccount = "a"\nrpm = "env:S"\n[[keys]]\nkey = "{canary} x"\naccount = "b"\n'
    )
    found = problems(text, {"S": canary, "NBGATE_DEMO__KEY": f"{canary} y"})
    assert len(found) >= 12
    assert canary not in "\n".join(found)


def test_config_repr_masks_secrets() -> None:
    text = (
        OPENAI
        + 'proxy = "http://u:pass-9@p:1"\nheaders = { a = "pass-9" }\n[store]\nurl = "postgresql://u:pass-9@h/d"\n'
    )
    text += f'[admin]\nkey = "{KEY}"\n[demo]\nkey = "{KEY}d"\n[redis]\nurl = "redis://:pass-9@h"\n'
    text += f'[[keys]]\nkey = "{KEY}z"\naccount = "a"\n'
    shown = repr(c.parse(text, {}))
    assert "pass-9" not in shown and "sk-" not in shown
    assert "key=***" in shown and "value=***" in shown


# -- overrides


def test_config_environment_overrides_scalars_and_lists_of_strings() -> None:
    env = {
        "NBGATE_SERVER__LISTEN": "127.0.0.1:9, unix:/x",
        "NBGATE_SERVER__DRAIN_S": "1.5",
        "NBGATE_SERVER__ALLOW_QUERY_KEY": "false",
        "NBGATE_ROUTER__DEFAULT_MODELS__IMAGES": "i",
        "NBGATE_CHANNELS__MAIN__WEIGHT": "7",
        "NBGATE_ADMIN__KEY": "env:REAL",
        "REAL": "real-admin-key",
        "NBGATE_ADMIN_KEY": "no double underscore, so no override",
        "NBGATE_CONFIG": "neither",
    }
    config = c.parse("[server]\nworkers = 2\n" + OPENAI, env)
    assert config.server.listen == ("127.0.0.1:9", "unix:/x")
    assert (config.server.drain_s, config.server.workers, config.server.allow_query_key) == (1.5, 2, False)
    assert config.router.default_models.images == "i"
    assert config.channels["main"].weight == 7
    assert config.admin.key == "real-admin-key"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NBGATE_SERVER__LISEN", "x", 'no such setting; did you mean "NBGATE_SERVER__LISTEN"?'),
        ("NBGATE_SEVER__LISTEN", "x", 'did you mean "NBGATE_SERVER"?'),
        ("NBGATE_SERVER__WORKERS", "two", 'expected a whole number from 0 to 1024, got "two"'),
        ("NBGATE_SERVER__WORKERS", "٥", "expected a whole number"),
        ("NBGATE_SERVER__WORKERS", "1_0", "expected a whole number"),
        ("NBGATE_SERVER__ALLOW_QUERY_KEY", "maybe", 'expected true or false, got "maybe"'),
        ("NBGATE_SERVER__LISTEN", "nope", "expected host:port"),
        ("NBGATE_SERVER", "x", ""),
        ("NBGATE_CHANNELS__GONE__WEIGHT", "1", "no such setting"),
        ("NBGATE_CHANNELS__MAIN__KEYS", "a", "only plain values can be set by the environment"),
        ("NBGATE_CHANNELS__MAIN", "a", ""),
    ],
)
def test_config_refuses_a_wrong_override_by_its_name(name: str, value: str, expected: str) -> None:
    found = problems(OPENAI, {name: value})
    if "__" not in name:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(f"{name}: ") and expected in found[0]


# -- cross checks


@pytest.mark.parametrize("text", ["127.0.0.1:80", ":8080", "[::1]:8080", "localhost:0", "unix:/a/b.sock", "a-b.c:1"])
def test_config_takes_listen_address(text: str) -> None:
    assert problems(f'[server]\nlisten = ["{text}"]') == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "8080", "h:", "h:x", "h:65536", "h:-1", "h:+80", "h:٥", "::1:80", "[::1]", "[h]:80", "h h:80"),
        *("http://h:80", "unix:", "unix:rel", "unix:/", "unix:/" + "x" * 120),
    ],
)
def test_config_refuses_listen_address(text: str) -> None:
    found = problems(f'[server]\nlisten = ["{text}"]')
    assert len(found) == 1 and found[0].startswith("2: server.listen[0]: ")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "ftp://h/v1",
            "h/v1",
            "https://",
            "https://u:p@h/v1",
            "https://u@h",
            "https://h/v1?key=1",
            "https://h/v1?",
        ),
        *("https://h/v1#x", "https://h:99999/", "https://h:x/", "https://a b/", "https://[::1/", "https://h/\u00e9"),
    ],
)
def test_config_refuses_base_url(url: str) -> None:
    found = problems(OPENAI.replace("https://api.example.com/v1/", url))
    assert len(found) == 1 and found[0].startswith(("3: channels.main.base_url: ",)), found


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "https://[::1]:9", "https://h.example/a/b/", "http://h_x:1"])
def test_config_takes_base_url(url: str) -> None:
    assert problems(OPENAI.replace("https://api.example.com/v1/", url)) == []


@pytest.mark.parametrize("glob", ["gpt-*", "*", "a?", "[ab]c", "[!a]", "[]]", "org/model:x@1"])
def test_config_takes_glob(glob: str) -> None:
    assert problems(OPENAI.replace('["m"]', f'["{glob}"]')) == []


@pytest.mark.parametrize("glob", ["", "a[b", "[]", "[!]", "a b", "a\\n", "x" * 300])
def test_config_refuses_glob(glob: str) -> None:
    found = problems(OPENAI.replace('["m"]', f'["m", "{glob}"]'))
    assert len(found) == 1 and found[0].startswith("5: channels.main.models[1]: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[router]\ndefault_channel = 'mian'\n" + OPENAI, '2: router.default_channel: unknown channel "mian"; did you'),
        ("[groups.vip]\nchannels = ['mian']\n" + OPENAI, '2: groups.vip.channels[0]: unknown channel "mian"; did you'),
        (OPENAI + "groups = ['vop']\n[groups.vip]", '6: channels.main.groups[0]: unknown group "vop"; did you mean'),
        (OPENAI + "dialects = ['caht']", 'unknown dialect "caht"; did you mean "chat"?'),
        (OPENAI + "dialects = ['chat', 'chat']", 'dialect "chat" stands twice'),
        (OPENAI.replace('["sk-up-1"]', '["sk-up-1", "sk-up-1"]'), "4: channels.main.keys[1].value: this key"),
        (OPENAI.replace('keys = ["sk-up-1"]\n', ""), '1: channels.main.keys: is missing; a channel of type'),
        (OPENAI.replace("main", '"a b"'), "expected a channel name"),
        (OPENAI + "headers = { 'a b' = 'c' }", "expected a header name"),
        (OPENAI + "headers = { Host = 'c' }", "belongs to the connection"),
        (OPENAI + 'headers = { a = "b\\r\\nc: d" }', "expected a header value on one line"),
        (OPENAI + "proxy = 'ftp://x'", "expected a URL that begins with http:// or socks5:// or socks5h://"),
        (OPENAI + "timeouts = { total_s = 10 }", "expected total_s to be at least"),
        ("[server]\nlisten = ['h:1', 'h:1']", '2: server.listen[1]: "h:1" stands twice'),
        ("[server]\nlisten = []", "2: server.listen: expected at least one address"),
        ("[admin]\nlisten = '127.0.0.1:9'", "2: admin.listen: this version has no separate listener"),
        ("[server]\ntrusted_proxies = ['10.0.0.1/8']", "bits are set beyond the prefix"),
        ("[server]\ntrusted_proxies = ['10.0.0.0/8', 'x']", '2: server.trusted_proxies[1]: expected a network such as'),
        ("[server]\ntrusted_proxies = ['unix:', 'x']", '2: server.trusted_proxies[1]: expected a network such as'),
        ("[server]\ndrain_s = 400", "expected at most drain_streams_s (300)"),
        ("[server]\nmax_line_kb = 63\n", "expected at most max_head_kb (32)"),
        ("[store]\nurl = 'mysql://h/d'", "expected a URL that begins with sqlite:// or postgresql://"),
        ("[redis]\nurl = 'h:6379'", "expected a URL that begins with redis://"),
        ("[billing]\ntime_zone = 'Europe/Nowhere'", "expected a time zone"),
        ("[billing]\ntime_zone = '../../etc/passwd'", "expected a time zone"),
        ("[models.a]\nfallbacks = ['a']", "a model cannot fall back on itself"),
        ("[models.a]\nprice = { tiers = [{ over_input = 9 }, { over_input = 3 }] }", "rising over_input"),
        ("[cors]\norigins = ['example.com']", 'expected "*" or an origin'),
        ("[site]\npublic_url = 'javascript:x'", "expected a URL that begins with http"),
        ("[site]\ncontacts = [{ label = 'x', url = 'javascript:x' }]", "2: site.contacts[0].url: expected a URL"),
        (f"[[keys]]\nkey = '{KEY}'\naccount = 'a'\nexpires = 'soon'", "4: keys[0].expires: expected a duration"),
        (f"[[keys]]\nkey = '{KEY}'\naccount = 'a'\nmodels = ['[']", "4: keys[0].models[0]"),
        (f"[[keys]]\nkey = '{KEY}'\naccount = 'a'\ngroup = 'x'", 'unknown group "x"'),
        ("[[keys]]\nkey = 'short'\naccount = 'a'", "2: keys[0].key: expected 8 to 512 printable characters"),
        (f"[[keys]]\nkey = '{KEY}'\naccount = 'a'\n" * 2, "5: keys[1].key: the same key as keys[0]"),
        (f"[admin]\nkey = '{KEY}'\n[[keys]]\nkey = '{KEY}'\naccount = 'a'", "2: admin.key: the same key as keys[0]"),
        (f"[admin]\nkey = '{KEY}'\n[demo]\nkey = '{KEY}'", "4: demo.key: the same key is in use elsewhere"),
    ],
)  # fmt: skip
def test_config_compares_settings_with_each_other(text: str, expected: str) -> None:
    found = problems(text)
    assert len(found) == 1 and expected in found[0], found


def test_config_does_not_blame_references_to_a_channel_that_has_its_own_fault() -> None:
    text = "[router]\ndefault_channel = 'main'\n" + OPENAI.replace('"openai"', '"opnai"')
    assert len(problems(text)) == 1


# -- lines


def test_config_lines_follow_every_form_of_toml() -> None:
    text = (
        'a = 1 # [x]\n"b.c" = """\n[no]\nd = 2\n"""\ne.f."g h" = [\n  1, # one\n  { i = \'\'\'\n\n\'\'\', j = 2 },\n]\n'
        "k = 1979-05-27 07:32:00\n[l . m]\nn = 'x # y'\n[[o]]\np = 1\n[[o]]\np = 2\n"
        '[o.q]\nr = 3\n[[o.s]]\nt = 4\r\nu = "\\"]"\n'
    )
    lines = lines_of(text)
    expected = {
        ("a",): 1, ("b.c",): 2, ("e", "f", "g h"): 6, ("e", "f", "g h", 1, "i"): 8, ("e", "f", "g h", 1, "j"): 10,
        ("k",): 12, ("l", "m"): 13, ("l", "m", "n"): 14, ("o", 0, "p"): 16, ("o", 1, "p"): 18, ("o", 1, "q", "r"): 20,
        ("o", 1, "s", 0, "t"): 22, ("o", 1, "s", 0, "u"): 23,
    }  # fmt: skip
    assert {path: lines.get(path) for path in expected} == expected


# -- files


def test_config_load_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert [str(p) for p in c.check(tmp_path / "no.toml", {})] == [
        f"{tmp_path}/no.toml: cannot read this file: No such file or directory"
    ]
    (tmp_path / "bad.toml").write_bytes(b"a = 1\nb = '\xff'\n")
    assert [str(p) for p in c.check(tmp_path / "bad.toml", {})] == [f"{tmp_path}/bad.toml:2: not UTF-8 text"]


def test_config_load_fills_made_keys_from_data_dir(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[server]\ndata_dir = "{tmp_path}"\n[channels.d]\ntype = "demo"\n')
    assert (c.load(file, {}).demo.key, c.load(file, {}).admin.key) == ("", "")
    (tmp_path / "demo.key").write_text("sk-made-demo\n")
    (tmp_path / "admin.key").write_text("sk-made-admin\n")
    assert (c.load(file, {}).demo.key, c.load(file, {}).admin.key) == ("sk-made-demo", "sk-made-admin")
    assert c.load(file, {}, made_keys=False).demo.key == ""
    assert c.load(file, {"NBGATE_DEMO__KEY": "sk-written"}).demo.key == "sk-written"


def test_config_load_counts_durations_from_the_last_change(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[[keys]]\nkey = "{KEY}"\naccount = "a"\nexpires = "1d"\n')
    os.utime(file, (5_000, 5_000))
    assert c.load(file, {}).keys[0].expires_at == 5_000 + 86_400


def test_config_names_what_only_a_restart_changes() -> None:
    old = c.parse("", {})
    text = "[server]\nlisten = [':1']\nworkers = 3\nmax_body_mb = 1\n[store]\nurl = 'sqlite:///b.db'\n"
    new = c.parse(text + OPENAI, {})
    assert c.restart_only_changes(old, new) == ["server.listen", "server.workers", "store.url"]
    assert c.restart_only_changes(old, c.parse(OPENAI, {})) == []
