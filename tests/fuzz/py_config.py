"""hast.conf: a ConfigError of one line that says where, or a configuration in which nothing is left open."""

from __future__ import annotations

import re

from hast.config import parse
from hast.errors import ConfigError

WHERE = re.compile(r"hast\.conf:\d+:\d+: found .+, expected .+")


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        config = parse(text, "hast.conf", ("a", "a.example"))
    except ConfigError as error:
        assert str(error).isprintable(), f"not one printable line: {error!r}"
        assert WHERE.fullmatch(str(error)), f"it does not say where: {error}"
        return
    assert config == parse(text, "hast.conf", ("a", "a.example"))
    assert config.listen and config.control.is_unix | bool(config.control.host)
    for name, resource in config.resources.items():
        assert name == resource.name and resource.provname and resource.localpath
        assert resource.timeout > 0 and resource.syncrate >= 0
        assert resource.source is None or resource.source.port == 0
