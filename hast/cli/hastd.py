"""The command hastd. What it does is in hast/daemon.py; see hastd(8)."""

from __future__ import annotations

import getopt
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from hast.errors import HastError, UsageError

USAGE = "usage: hastd [-dFht] [-c config] [-P pidfile]"


@dataclass(frozen=True)
class Options:
    """The command line. `config` is an absolute path, so that it means the same in the background."""

    config: str
    pidfile: str | None = None
    foreground: bool = False
    debug: int = 0
    help: bool = False
    test: bool = False


def parse_options(arguments: list[str]) -> Options:
    """Raises UsageError."""
    from hast.config import DEFAULT_PATH

    try:
        given, rest = getopt.getopt(arguments, "c:dFhP:t")
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg} ({USAGE})") from None
    if rest:
        raise UsageError(f"unexpected argument '{rest[0]}' ({USAGE})")
    values = dict(given)
    pidfile = values.get("-P")
    return Options(
        config=str(Path(values.get("-c", DEFAULT_PATH)).absolute()),
        pidfile=str(Path(pidfile).absolute()) if pidfile is not None else None,
        foreground="-F" in values,
        debug=sum(option == "-d" for option, _ in given),
        help="-h" in values,
        test="-t" in values,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run hastd; the exit code (sysexits)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse_options(arguments)
        if options.help:
            print(USAGE, file=sys.stderr)
            return os.EX_USAGE
        return run(options, arguments)
    except HastError as error:
        complain(error, False)
        return error.exit_code


def run(options: Options, arguments: list[str]) -> int:
    """Read the configuration, take the pidfile, go to the background, be hastd. Raises HastError."""
    from setproctitle import setproctitle

    from hast import again, background, config, daemon, log, reload
    from hast.pidfile import PidFile

    executed = again.was_executed()
    log.setup(foreground=options.foreground or not executed, debug=options.debug)
    configuration = config.load(options.config)
    if options.test:
        reload.check(configuration)
        for module in ("hast.worker", "hast.events"):  # what hastd's processes are made of can be loaded
            importlib.import_module(module)
        return os.EX_OK
    pidfile = PidFile(options.pidfile or configuration.pidfile)
    pidfile.acquire()
    report = (lambda code: None) if options.foreground or executed else background.daemonise()
    if executed and not options.foreground:
        os.chdir("/")
    setproctitle(" ".join(["hastd", *arguments]))

    def started() -> None:
        if not options.foreground:
            log.setup(foreground=False, debug=options.debug)
        report(os.EX_OK)

    code, restarting = os.EX_OK, False
    try:
        pidfile.write()
        restarting = daemon.main(configuration, options.foreground, options.debug, started)
        if restarting:
            again.execute()  # the pidfile stays: so does the process
    except HastError as error:
        complain(error, executed)
        code = error.exit_code
    finally:
        pidfile.remove()
    report(code)
    return code


def complain(error: HastError, log_too: bool) -> None:
    """Say on stderr why hastd ends; it may be /dev/null by now, then only the log is left."""
    print(f"hastd: {error}", file=sys.stderr)
    if log_too:
        import logging

        logging.getLogger(__name__).error("%s", error)
