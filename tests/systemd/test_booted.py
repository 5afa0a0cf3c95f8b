"""docs/install.md, typed on a machine with a real systemd, from the first installation to the removal.

The tests are one story and run in their order: each finds what the one before has left.
"""

import os
import re
import signal
import urllib.request
from pathlib import Path

import pytest

from consumerd import __version__
from tests.servers.process import wait_until
from tests.servers.sql import execute
from tests.systemd.conftest import TIMEOUT, Site, release, typed
from tests.systemd.machine import hang

pytestmark = pytest.mark.timeout(600)  # pip, on a machine that does other things, too
CONFIG = "/etc/consumerd/consumerd.toml"
STATUS = r"1 of 1 handlers running; \d+ rows/s, \d+ messages.* behind"


def test_install(site: Site) -> None:
    """What the page says installs the version that it names, with a user, folders that only it may read, and units."""
    site.type("Install")
    assert f"consumerd {__version__}" == site.machine.sh("consumerd --version").strip()
    assert "750 root consumerd" in site.machine.sh("stat --format '%a %U %G' /etc/consumerd")
    site.type("Configure", part="consumerd.toml")
    site.machine.sh(f"echo 'daemon.listen = \"{site.listen}\"' | cat - {CONFIG} > /root/c; cp /root/c {CONFIG}")


def test_check_and_start(site: Site) -> None:
    """`check` finds all in order; the unit is active once it has joined, and says how it does."""
    said = site.type("Configure", part="check")
    assert "page_views" in said
    site.type("Start")
    assert "active" == site.machine.show("consumerd", "ActiveState")
    assert re.fullmatch(STATUS, site.status()), site.status()
    site.send(100)
    site.lands()


def test_the_journal_has_the_fields(site: Site) -> None:
    """Lines are found by handler, and have their level, place in the code, and fields."""
    entries = site.journal("--unit=consumerd", "HANDLER=page_views")
    assert {"running", "starting"} & {entry["MESSAGE"].partition(": ")[2] for entry in entries}
    assert all(entry["PRIORITY"] == "6" and entry["LOGGER"].startswith("consumerd.") for entry in entries)


def test_hardened(site: Site) -> None:
    """It has no capability and no new privileges, may write nothing but its own folders, and sees /proc/stat."""
    status = Path(f"/proc/{site.machine.pid('consumerd')}/status").read_text(encoding="ascii")
    fields = dict(re.findall(r"^(\w+):\t(.*)$", status, re.MULTILINE))
    assert ("0" * 16, "0" * 16, "1", "2") == tuple(
        fields[name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
    )
    inside = "nsenter --target=$(systemctl show --property=MainPID --value consumerd) --mount --"
    for folder in ("/etc", "/etc/consumerd", "/opt/consumerd", "/usr"):
        said = site.machine.sh(f"! {inside} touch {folder}/x 2>&1")
        assert "Read-only file system" in said
    site.machine.sh(f"{inside} touch /var/lib/consumerd/x /run/consumerd/x")
    with urllib.request.urlopen(f"http://{site.listen}/metrics") as answer:
        text = answer.read().decode()
    assert float(re.findall(r"^process_start_time_seconds (\S+)$", text, re.MULTILINE)[0]) > 1.7e9


def test_a_crash(site: Site) -> None:
    """Killed under load it is started again, and nothing is lost or doubled."""
    before = site.restarts()
    site.send(5000)
    os.kill(site.machine.pid("consumerd"), signal.SIGKILL)
    site.send(5000)
    wait_until(lambda: site.restarts() == before + 1, TIMEOUT, "the restart")
    site.lands()


def test_a_second_daemon(site: Site) -> None:
    """consumerd@NAME runs beside the first, from a file and a folder of its own."""
    site.type("A second daemon")
    assert re.fullmatch(STATUS, site.status("consumerd@clicks"))
    site.send(100, "clicks")
    site.lands("clicks")


def test_a_reload(site: Site) -> None:
    """A reload takes up a new file and lets other handlers be; one with a mistake fails, and all goes on as it was."""
    process = site.machine.pid("consumerd")
    execute(site.dsn, "CREATE TABLE again (id bigint, visitor text)")
    execute(site.dsn, "ALTER TABLE again OWNER TO loader")
    folder = "/etc/consumerd/handlers"
    site.machine.sh(f"sed 's/^name = .*/name = \"again\"/' {folder}/page_views.toml > {folder}/again.toml")
    site.type("Change")
    site.says("2 of 2 handlers running")
    wait_until(lambda: site.written("again") == site.written(), TIMEOUT, "the rows of the new handler")
    (reloaded,) = site.journal("--unit=consumerd", "LOGGER=consumerd.daemon", "--grep=^reloaded")
    assert ("('again',)", "('page_views',)") == (reloaded["STARTED"], reloaded["UNCHANGED"])

    site.machine.sh(f"echo 'topicz = 1' > {folder}/mistake.toml; ! systemctl reload consumerd")
    assert "active" == site.machine.show("consumerd", "ActiveState")
    assert site.journal("--unit=consumerd", "--grep=mistake.toml:1.*topicz")
    site.machine.sh(f"rm {folder}/mistake.toml {folder}/again.toml")
    site.type("Change")
    site.says("1 of 1 handlers running")
    assert process == site.machine.pid("consumerd")
    site.send(100)
    site.lands()


def test_a_hang(site: Site) -> None:
    """A process that stands still is restarted, and so is one of whose threads the Kafka thread alone does."""
    units = {unit: (site.machine.pid(unit), site.restarts(unit)) for unit in ("consumerd", "consumerd@clicks")}
    os.kill(units["consumerd@clicks"][0], signal.SIGSTOP)
    main = units["consumerd"][0]
    comm = Path(f"/proc/{main}/comm").read_text()
    hang(main, lambda thread: int(thread.name) != main and (thread / "comm").read_text() == comm)
    for unit, (_, before) in units.items():
        wait_until(lambda: site.restarts(unit) == before + 1, TIMEOUT, f"the restart of {unit}")  # noqa: B023 - at once
        ended = site.journal(f"--unit={unit}", "_PID=1", "--grep=watchdog")
        assert ended, unit
    (line,) = site.journal("--unit=consumerd", "--grep='the Kafka thread hangs'")
    assert "page_views" == line["HANDLER"]
    assert site.journal("--unit=consumerd", "--grep='Fatal Python error: Aborted'")
    for topic in ("page_views", "clicks"):
        site.send(100, topic)
        site.lands(topic)


def test_a_missing_credential_is_waited_for(site: Site) -> None:
    """Without its credential the unit starts, and says what it waits for; it goes on once the file is there."""
    site.machine.sh("mv /etc/consumerd/credentials/pg_password /root")
    site.machine.sh("systemctl restart consumerd")
    site.says("waiting (postgres): page_views")
    site.send(100)
    site.machine.sh("mv /root/pg_password /etc/consumerd/credentials")
    site.says("1 of 1 handlers running")
    site.lands()


def test_a_rotated_credential_is_picked_up(site: Site) -> None:
    """After a password was changed the same process goes on with the new one."""
    process = site.machine.pid("consumerd")
    site.postgres.execute("ALTER ROLE loader PASSWORD 'another password'")
    site.type("Credentials")
    site.postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'loader'")
    site.send(100)
    site.lands()
    assert process == site.machine.pid("consumerd")


def test_a_mistake_is_not_tried_again(site: Site) -> None:
    """With a mistake in its file the unit fails with 78 and stays down; the journal has the line."""
    before = site.restarts()
    site.machine.sh("echo 'topicz = 1' > /etc/consumerd/handlers/mistake.toml; ! systemctl restart consumerd")
    assert ("failed", "78") == (
        site.machine.show("consumerd", "ActiveState"),
        site.machine.show("consumerd", "ExecMainStatus"),
    )
    assert before >= site.restarts()
    assert site.journal("--unit=consumerd", "--grep='mistake.toml:1: topicz'")
    site.machine.sh("rm /etc/consumerd/handlers/mistake.toml; systemctl start consumerd")


def test_a_stop_drains(site: Site) -> None:
    """A stop writes what is gathered, though it would have waited for an hour, and ends with 0."""
    handler = "/etc/consumerd/handlers/page_views.toml"
    site.machine.sh(f"echo 'batch.max_age = \"1h\"' | cat - {handler} > /root/h; cp /root/h {handler}")
    site.machine.sh("systemctl restart consumerd")
    site.send(100)
    site.says("100 messages")
    assert (
        0 == execute(site.dsn, f"SELECT count(*)::int FROM page_views WHERE id = {site.sent['page_views'] - 1}")[0][0]
    )
    site.machine.sh("systemctl stop consumerd")
    assert ("success", "0") == (
        site.machine.show("consumerd", "Result"),
        site.machine.show("consumerd", "ExecMainStatus"),
    )
    assert list(range(site.sent["page_views"])) == site.written()
    site.machine.sh(f"sed -i '/max_age/d' {handler}; systemctl start consumerd")


def test_upgrade_and_roll_back(site: Site) -> None:
    """Another version is installed beside the first, takes over with its checkpoints, and gives them back."""
    (new,) = re.findall(r"^VERSION=(.*)$", typed("Upgrade")[0], re.MULTILINE)
    site.machine.sh("mv /root/release /root/first")
    release(site.machine.root / "root" / "release", new)
    site.type("Upgrade")
    for version in (new, __version__):
        assert f"consumerd {version}" == site.machine.sh("consumerd --version").strip()
        (started,) = site.journal("--unit=consumerd", "LOGGER=consumerd.daemon", "--grep=^started", "--lines=1")
        assert version == started["VERSION"]
        for topic in ("page_views", "clicks"):
            site.send(100, topic)
            site.lands(topic)
        if version == new:
            site.type("Roll back")


def test_remove(site: Site) -> None:
    """Nothing of it runs, and no unit is left."""
    site.type("Remove")
    assert "0 loaded units listed" in site.machine.sh("systemctl list-units 'consumerd*'")
