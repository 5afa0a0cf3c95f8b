"""Files are found and read, and every mistake of all of them is told at its line."""

import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from consumerd import loader
from consumerd.config import Config, HandlerConfig
from consumerd.credentials import Secret
from consumerd.errors import ConfigError
from consumerd.loader import REQUIRED, dotted, load, load_daemon
from consumerd.toml_lines import key_lines

DAEMON = """\
[kafka]
bootstrap_servers = "localhost:9092"
[postgres]
dsn = "host=db"
"""
HANDLER = """\
topics = ["orders"]
[table]
name = "orders"
write = "append"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a sound consumerd.toml and one sound handler, orders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader, "SYSTEM_FILE", tmp_path / "etc" / "consumerd.toml")
    (tmp_path / "handlers").mkdir()
    (tmp_path / "consumerd.toml").write_text(DAEMON)
    (tmp_path / "handlers" / "orders.toml").write_text(HANDLER)
    return tmp_path


def mistakes(overrides: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None) -> list[str]:
    """Give the lines that loading tells."""
    with pytest.raises(ConfigError) as caught:
        load(None, overrides=overrides or {}, environ=environ or {})
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_sound_files_become_a_config(folder: Path) -> None:
    """The daemon's file and its handlers become one config, handlers sorted by name."""
    (folder / "handlers" / "clicks.toml").write_text(HANDLER)
    config = load(None, environ={})
    assert config.path == folder / "consumerd.toml"
    assert [handler.name for handler in config.handlers] == ["clicks", "orders"]
    assert config.handlers[1].path == folder / "handlers" / "orders.toml"
    assert config.daemon.handlers == folder / "handlers"


def test_search_order(folder: Path) -> None:
    """-c wins over $CONSUMERD_CONFIG, that over ./consumerd.toml, that over /etc."""
    environ = {}
    for name in ("etc", "variable", "option"):
        (folder / name).mkdir()
        (folder / name / "handlers").symlink_to(folder / "handlers")
        (folder / name / "consumerd.toml").write_text(DAEMON)
    environ = {"CONSUMERD_CONFIG": str(folder / "variable" / "consumerd.toml")}
    option = folder / "option" / "consumerd.toml"
    assert load(option, environ=environ).path == option
    assert load(None, environ=environ).path == folder / "variable" / "consumerd.toml"
    assert load(None, environ={}).path == folder / "consumerd.toml"
    (folder / "consumerd.toml").unlink()
    assert load(None, environ={}).path == folder / "etc" / "consumerd.toml"
    (folder / "etc" / "consumerd.toml").unlink()
    assert mistakes() == [
        (
            f"no config found: neither ./consumerd.toml nor {folder}/etc/consumerd.toml; "
            "name one with -c or $CONSUMERD_CONFIG"
        )
    ]


def test_named_file_must_exist(folder: Path) -> None:
    """A file that was named is not replaced by one that lies elsewhere."""
    assert (folder / "consumerd.toml").exists()
    assert mistakes(environ={"CONSUMERD_CONFIG": "no.toml"}) == [
        "no.toml: there is no such file (named by $CONSUMERD_CONFIG)"
    ]
    with pytest.raises(ConfigError, match=r"^no\.toml: there is no such file \(named by -c\)$"):
        load(Path("no.toml"), environ={})


def test_relative_path_becomes_absolute(folder: Path) -> None:
    """A later change of the working directory moves nothing."""
    config = load(Path("consumerd.toml"), environ={})
    assert (config.path, config.daemon.handlers) == (folder / "consumerd.toml", folder / "handlers")


def test_every_mistake_of_all_files_is_told_at_once(folder: Path) -> None:
    """Mistakes of -X, of the daemon's file and of each handler come together, in the order of lines."""
    (folder / "consumerd.toml").write_text('[log]\nlevel = "loud"\n[kafka]\n[postgres]\ndsn = "host=db"\nport = 5432\n')
    (folder / "handlers" / "orders.toml").write_text(
        'topics = []\nmax_connections = "4"\n\n[table]\nname = 5\nwirte = "append"\n'
    )
    (folder / "handlers" / "bad.toml").write_text('topics = ["a"]\n[table\n')
    assert mistakes({"group.id": "x"}) == [
        "-X group.id: is the daemon's own property: write group_id in the handler's file",
        'consumerd.toml:2: log.level: must be "debug", "info", "warning" or "error"',
        'consumerd.toml:3: kafka.bootstrap_servers: is missing: put bootstrap_servers = "localhost:9092" under [kafka]',
        "consumerd.toml:6: postgres.port: unknown key; valid here: dsn, password, schema, settings",
        "handlers/bad.toml:2: is not TOML: Expected ']' at the end of a table declaration (at line 2, column 7)",
        'handlers/orders.toml:1: topics: must not be empty: write topics = ["orders"]',
        "handlers/orders.toml:2: max_connections: must be a whole number",
        'handlers/orders.toml:4: table.write: is missing: put write = "append" under [table]',
        "handlers/orders.toml:5: table.name: must be a string, in quotes",
        'handlers/orders.toml:6: table.wirte: unknown key; did you mean "write"?',
    ]


def test_empty_files_lack_their_required_keys(folder: Path) -> None:
    """An empty file tells each key that it needs, with what to write, without a line."""
    (folder / "consumerd.toml").write_text("")
    (folder / "handlers" / "orders.toml").write_text("")
    assert mistakes() == [
        'consumerd.toml: kafka.bootstrap_servers: is missing: put bootstrap_servers = "localhost:9092" under [kafka]',
        'consumerd.toml: postgres.dsn: is missing: put dsn = "postgresql://loader@db/warehouse" under [postgres]',
        'handlers/orders.toml: topics: is missing: put topics = ["orders"]',
        'handlers/orders.toml: table.name: is missing: put name = "sales.orders" under [table]',
        'handlers/orders.toml: table.write: is missing: put write = "append" under [table]',
    ]


@pytest.mark.parametrize("model", [Config, HandlerConfig])
def test_every_required_key_has_an_example(model: type[Config] | type[HandlerConfig]) -> None:
    """What has no default is in the table of examples."""

    def required(section: type[BaseModel], path: tuple[str, ...]) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for name, info in section.model_fields.items():
            key = (*path, str(info.validation_alias or name))
            inner = loader._inner(info.annotation)
            if inner and key not in {("columns",), ("dead_letter",), ("handlers",)}:
                found |= required(inner, key)
            elif info.is_required() and name not in {"path", "name" if not path else "", "group_id", "dead_letter"}:
                found.add(key)
        return found

    assert required(model, ()) <= REQUIRED.keys()
    assert ("table", "name") in required(HandlerConfig, ())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("log = 5", "log: must be a table"),
        ("log.level = 5", 'log.level: must be "debug", "info", "warning" or "error"'),
        ("kafka.admin = 1", "kafka.admin: must be true or false"),
        ("kafka.properties = 1", "kafka.properties: must be a table"),
        ("daemon.handlers = 1", "daemon.handlers: must be a string, in quotes"),
        ("postgres.schema_name = 'x'", 'postgres.schema_name: unknown key; did you mean "schema"?'),
        ("path = 'x'", "path: unknown key; valid here: daemon, kafka, log, postgres"),
        ("handlers = []", "handlers: unknown key; valid here: daemon, kafka, log, postgres"),
    ],
)
def test_wrong_types_are_told_in_plain_words(folder: Path, line: str, told: str) -> None:
    """A wrong type says what is expected, and nothing in pydantic's own words."""
    base = 'kafka.bootstrap_servers = "b"\npostgres.dsn = "host=db"\n'
    (folder / "consumerd.toml").write_text(f"{base}{line}\n")
    (found,) = mistakes()
    assert found.startswith(f"consumerd.toml:3: {told}")
    assert "Input" not in found
    assert "not valid here" not in found


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("topics = 5", 'topics: must be a list, such as ["a", "b"]'),
        ("topics = [5]", "topics[0]: must be a string, in quotes"),
        ("topics = ['a']\npoison.max_ratio = 'x'", "poison.max_ratio: must be a number"),
        ("topics = ['a']\ncolumns = 'x'", "columns: must be a table"),
        ("topics = ['a']\ncolumns.a = 5", "columns.a: must be a path as a string, or a table { from = … }"),
        ("topics = ['a']\nformat = 'avro'", 'format: must be "json"'),
        ("topics = ['a']\nname = 'x'", "name: unknown key; valid here: "),
        (
            "topics = ['a']\ncolumns.default.form = 'x'\ncolumns.default.from = 'x'",
            "columns.default.form: unknown key; did",
        ),
        ("topics = ['a']\ncolumns.'' = 'x'", 'columns."": must be a name of 1 to 63 bytes'),
    ],
)
def test_wrong_types_of_a_handler(folder: Path, line: str, told: str) -> None:
    """The same for a handler's keys; a missing table is told beside it or not at all."""
    (folder / "handlers" / "orders.toml").write_text(f"{line}\n[table]\nname = 't'\nwrite = 'append'\n")
    (found,) = mistakes()
    assert found.partition(": ")[2].startswith(told)


def test_no_password_is_told(folder: Path) -> None:
    """Passwords in every place are refused, each with what to write, and none is repeated."""
    (folder / "consumerd.toml").write_text("""\
[kafka]
bootstrap_servers = "b"
properties = { "sasl.password" = "hun${TER}2" }
[postgres]
dsn = "postgresql://u:hun${TER}2@db/x"
password = "hun${TER}2"
""")
    found = mistakes({"ssl.key.password": "hunter2"})
    assert [line.partition(": ")[0] for line in found] == [
        "-X ssl.key.password",
        *(f"consumerd.toml:{n}" for n in (3, 5, 6)),
    ]
    assert all("write" in line for line in found)
    assert not any("hun" in line or "TER" in line for line in found)


def test_password_that_comes_from_a_variable_is_refused(folder: Path) -> None:
    """A password does not become plain text by way of ${NAME} either."""
    (folder / "consumerd.toml").write_text(DAEMON.replace("host=db", "${DSN}"))
    (found,) = mistakes(environ={"DSN": "postgresql://u:hunter2@db/x"})
    assert found.startswith("consumerd.toml:4: postgres.dsn: holds a password")
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${A}", "a"),
        ("x${A}y${A}", "xaya"),
        ("${NO:-d}", "d"),
        ("${A:-d}", "a"),
        ("${EMPTY:-d}", "d"),
        ("${NO:-}x", "x"),
        ("$$", "$"),
        ("$${A}", "${A}"),
        ("$$$$", "$$"),
        ("a$", "a$"),
        ("$A $1 $-", "$A $1 $-"),
        ("${EMPTY}b", "b"),
        ("${NESTED}", "${A}"),
    ],
)
def test_variables_are_filled_in(folder: Path, text: str, filled: str) -> None:
    """${NAME}, its default and $$ are replaced once; any other dollar stays."""
    (folder / "consumerd.toml").write_text(DAEMON.replace("localhost:9092", text))
    environ = {"A": "a", "EMPTY": "", "NESTED": "${A}"}
    assert load(None, environ=environ).kafka.bootstrap_servers == filled


def test_variables_in_lists_and_inline_tables(folder: Path) -> None:
    """Strings are filled in wherever they stand, and a pattern's last dollar stays."""
    (folder / "consumerd.toml").write_text(f"{DAEMON}password = {{ env = '${{A}}' }}\n")
    (folder / "handlers" / "orders.toml").write_text(HANDLER.replace('"orders"]', '"${A}", "^o.*$"]'))
    config = load(None, environ={"A": "a"})
    assert config.handlers[0].topics == ("a", "^o.*$")
    assert config.postgres.password == Secret(env="a")


def test_unset_variable_is_told_once(folder: Path) -> None:
    """An unset name without a default is named, at its line, and nothing else is said of that key."""
    (folder / "handlers" / "orders.toml").write_text(HANDLER.replace('"orders"]', '\n"a",\n"${NO_SUCH}"]'))
    assert mistakes() == [
        (
            "handlers/orders.toml:1: topics[1]: the environment variable NO_SUCH is not set; "
            "a default is written ${NO_SUCH:-…}"
        )
    ]


def test_the_topic_in_a_tables_name_is_no_variable(folder: Path) -> None:
    """`${topic}` in `table.name` stays, whatever the environment holds; elsewhere, and others there, are filled in."""
    path = folder / "handlers" / "orders.toml"
    text = HANDLER.replace('topics = ["orders"]', 'topics = ["${topic}"]')
    path.write_text(text.replace('name = "orders"', 'name = "${SCHEMA}.${topic}"'))
    (handler,) = load(None, environ={"topic": "filled", "SCHEMA": "raw"}).handlers
    assert (handler.topics, handler.table.name) == (("filled",), "raw.${topic}")


def test_the_hosts_name_is_there_though_nobody_exports_it(folder: Path) -> None:
    """`${HOSTNAME}` is the machine's name, unless the environment has another: shells and systemd do not export it."""
    (folder / "consumerd.toml").write_text(DAEMON.replace("[kafka]", '[kafka]\ngroup_instance_id = "${HOSTNAME}-1"'))
    assert load(None, environ={}).kafka.group_instance_id == f"{socket.gethostname()}-1"
    assert load(None, environ={"HOSTNAME": "pod-7"}).kafka.group_instance_id == "pod-7-1"


@pytest.mark.parametrize("text", ["${", "${}", "${A", "${A-b}", "${1}", "${A B}"])
def test_broken_variable_is_told(folder: Path, text: str) -> None:
    """What begins like a variable and is none is a mistake, not text."""
    (folder / "consumerd.toml").write_text(DAEMON.replace("localhost:9092", text))
    assert mistakes(environ={"A": "a"}) == [
        'consumerd.toml:2: kafka.bootstrap_servers: after "${" stand a name and "}"; a dollar itself is written "$$"'
    ]


def test_overrides_win(folder: Path) -> None:
    """-X adds to [kafka.properties] and replaces what stands there."""
    (folder / "consumerd.toml").write_text(f'{DAEMON}[kafka.properties]\n"a" = "1"\n"b" = "2"\n')
    assert load(None, overrides={"b": "3", "c": "4"}, environ={}).kafka.properties == {"a": "1", "b": "3", "c": "4"}


def test_no_handlers_says_where_it_looked(folder: Path) -> None:
    """A folder without handlers, or no folder, is named."""
    (folder / "handlers" / "orders.toml").rename(folder / "handlers" / ".orders.toml")
    told = "write one file for each handler there"
    assert mistakes() == [f"consumerd.toml: daemon.handlers: no handlers: handlers holds no *.toml file; {told}"]
    (folder / "consumerd.toml").write_text(f'{DAEMON}[daemon]\nhandlers = "h"\n')
    assert mistakes() == [f"consumerd.toml:6: daemon.handlers: no handlers: h is not a folder; {told}"]
    (folder / "consumerd.toml").write_text(f'{DAEMON}[daemon]\nhandlers = "{"h" * 300}"\n')
    (found,) = mistakes()
    assert found.endswith(f"cannot be read: File name too long; {told}")


def test_what_is_no_file_is_told(folder: Path) -> None:
    """A link that leads nowhere, and a folder, are not passed over: somebody takes them for handlers."""
    (folder / "handlers" / "dir.toml").mkdir()
    (folder / "handlers" / "link.toml").symlink_to("/nowhere/link.toml")
    assert mistakes() == [
        "handlers/dir.toml: cannot be read: Is a directory",
        "handlers/link.toml: cannot be read: it is a symbolic link to nothing",
    ]


@pytest.mark.parametrize("name", ["consumerd.checkpoint", 'Consumerd."store"'])
def test_the_daemons_own_tables_are_not_written_to(folder: Path, name: str) -> None:
    """A handler does not write rows between the checkpoints."""
    (folder / "handlers" / "orders.toml").write_text(HANDLER.replace('"orders"\nwrite', f"'{name}'\nwrite"))
    told = "is a table of the daemon's own: name another"
    assert mistakes() == [f"handlers/orders.toml:3: table.name: {told}"]
    (folder / "consumerd.toml").write_text(f'{DAEMON}schema = "other"\n')
    assert len(load(None, environ={}).handlers) == 1


def test_group_ids_differ(folder: Path) -> None:
    """Two handlers of one group are a mistake, also when one has its id by default."""
    (folder / "handlers" / "z.toml").write_text(f'group_id = "consumerd.orders"\n{HANDLER}')
    assert mistakes() == [
        'handlers/z.toml:1: group_id: "consumerd.orders" is the group of handler orders already: each needs its own'
    ]


def test_dead_letters_are_not_read(folder: Path) -> None:
    """No handler lists a dead-letter topic, its own or another's; a pattern may match one."""
    text = HANDLER.replace('["orders"]', '["^.*", "consumerd.orders.dlq", "consumerd.z.dlq"]')
    (folder / "handlers" / "z.toml").write_text(text)
    assert mistakes() == [
        f'handlers/z.toml:1: topics[{index}]: "consumerd.{name}.dlq" is the dead-letter topic of handler {name}: '
        "it would read letters again"
        for index, name in ((1, "orders"), (2, "z"))
    ]
    (folder / "handlers" / "z.toml").write_text(HANDLER.replace("orders", "^.*", 1))
    assert len(load(None, environ={}).handlers) == 2


def test_unreadable_texts_are_told(folder: Path) -> None:
    """What is not UTF-8, nested without end or a number without end is told, with the line where it is known."""
    (folder / "consumerd.toml").write_bytes(b"\n\na = '\xff'\n")
    (folder / "handlers" / "a.toml").write_text("a = " + "[" * 5000)
    (folder / "handlers" / "b.toml").write_text("a = " + "1" * 5000)
    (folder / "handlers" / "c.toml").write_text("\na = '''\n\n")
    utf8, nested, number, open_string = mistakes()
    assert utf8 == "consumerd.toml:3: is not UTF-8 text"
    assert nested == "handlers/a.toml: is nested too deeply"
    assert number.startswith("handlers/b.toml: is not TOML: Exceeds the limit")
    assert open_string.startswith("handlers/c.toml:2: is not TOML: Expected")


def test_file_out_of_reach_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read is a mistake, and no reason to take another one."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    # Not by chmod: the tests may run as root, who reads everything.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "is_file", refuse)
    assert mistakes() == [
        "consumerd.toml: cannot be read: Permission denied",
        "handlers/orders.toml: cannot be read: Permission denied",
    ]


def test_path_is_shown_from_the_working_directory_where_shorter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is relative only where that is shorter."""
    assert loader._shown(folder / "a.toml") == "a.toml"
    monkeypatch.chdir(tmp_path / "handlers")
    assert loader._shown(Path("/a.toml")) == "/a.toml"


LINES = r'''# a comment with = and [
a = 1
b.c = "x # = [" # [
"d.e" = [
  1, # ]
  "]",
  [2],
]
'f "g' = { h = 1, i = [2] }

[t]
s = """
u = 1
[no]
\""" """" # " [
l = QQQ
v = 1 'QQQ # ' [
  w = 'x\'
[t.sub . "q\"r"]
k="a\\"
[[list]]
m = 2026-01-01T00:00:00Z
[b2.deep]
n = 1
[b2]
o = 1'''.replace("QQQ", "'" * 3)


def test_lines_of_keys() -> None:
    """Every way to write a key has its line; strings, comments and lists over several lines hold no keys."""
    tomllib.loads(LINES)
    assert key_lines(LINES) == {
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 3,
        ("d.e",): 4,
        ('f "g',): 9,
        ("t",): 11,
        ("t", "s"): 12,
        ("t", "l"): 16,
        ("t", "w"): 18,
        ("t", "sub"): 19,
        ("t", "sub", 'q"r'): 19,
        ("t", "sub", 'q"r', "k"): 20,
        ("list",): 21,
        ("list", "m"): 22,
        ("b2", "deep"): 23,
        ("b2", "deep", "n"): 24,
        ("b2",): 25,
        ("b2", "o"): 26,
    }


def test_lines_of_a_dos_file(folder: Path) -> None:
    """Lines may end in carriage return and newline."""
    (folder / "consumerd.toml").write_bytes((DAEMON + "x = 1\n").replace("\n", "\r\n").encode())
    assert mistakes()[0].startswith("consumerd.toml:5: postgres.x: ")


def test_key_paths_are_written_as_toml_does() -> None:
    """Names with dots are quoted and items of lists are numbered."""
    assert dotted(("kafka", "properties", "sasl.password")) == 'kafka.properties."sasl.password"'
    assert dotted(("topics", 0)) == "topics[0]"


def test_who_only_asks_needs_no_more_than_daemon(folder: Path) -> None:
    """For who asks the running daemon [daemon] alone is read: no mistake or variable elsewhere keeps them from it."""
    (folder / "consumerd.toml").write_text(
        '[kafka]\nbootstrap_servers = "${NOT_SET_HERE}"\n[nonsense]\n[daemon]\nlisten = "127.0.0.1:${PORT:-99}"\n'
    )
    (folder / "handlers" / "orders.toml").write_text("not TOML")
    assert load_daemon(None, environ={}).listen == "127.0.0.1:99"
    assert load_daemon(None, environ={"PORT": "98"}).listen_port == 98


@pytest.mark.parametrize(
    ("daemon", "told"),
    [
        ('listen = "nowhere"', "consumerd.toml:2: daemon.listen: "),
        ("lisen = 1", 'consumerd.toml:2: daemon.lisen: unknown key; did you mean "listen"?'),
        ('listen = "127.0.0.1:${PORT}"', "consumerd.toml:2: daemon.listen: the environment variable PORT is not set"),
        ("listen = ", "consumerd.toml:2: is not TOML"),
    ],
)
def test_mistakes_of_daemon_are_told(folder: Path, daemon: str, told: str) -> None:
    """Who asks the running daemon is told the mistakes of [daemon], each with its line, and no other."""
    (folder / "consumerd.toml").write_text(f"[daemon]\n{daemon}\n")
    with pytest.raises(ConfigError) as error:
        load_daemon(None, environ={})
    (problem,) = error.value.problems
    assert problem.startswith(told)
