"""The daemon's files, as anybody would write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consumerd.commands.demo_parts import orders

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = """\
[kafka]
bootstrap_servers = "{bootstrap}"
# The embedded broker answers no admin calls. So the daemon cannot ask for topic ids, by which it notices a topic that
# was deleted and made again, nor look at the dead-letter topic's settings.
admin = false

[kafka.properties]
# After a SIGKILL the broker keeps the dead member for this long. A real broker takes no less than 6000 (and its static
# membership, `group_instance_id`, hands over at once; the embedded one does not).
"session.timeout.ms" = 1500
"heartbeat.interval.ms" = 300

[postgres]
dsn = "{dsn}"

[daemon]
listen = "127.0.0.1:0"              # a free port; the log says which

[log]
format = "json"
"""


def write(folder: Path, bootstrap: str, dsn: str) -> Path:
    """Write consumerd.toml and its handlers into a folder; return the path of the first."""
    (folder / "handlers").mkdir()
    for name, text in orders.HANDLERS.items():
        (folder / "handlers" / f"{name}.toml").write_text(text, encoding="utf-8")
    config = folder / "consumerd.toml"
    config.write_text(CONFIG.format(bootstrap=bootstrap, dsn=dsn), encoding="utf-8")
    return config
