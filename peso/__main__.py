"""The `peso` command, as `python -m peso` and with it `torchrun --nproc-per-node 2 -m peso run …`."""

import signal
import sys


def main() -> None:
    """Call the command line, which takes a moment to load: Ctrl-C and SIGTERM end that like anything else."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    loaded = False
    try:
        from peso.cli.app import main as command

        loaded = True
        command()
    except (KeyboardInterrupt, SystemExit) as stopped:
        if loaded and isinstance(stopped, SystemExit):
            raise
        from peso.runtime.failures import AGAIN, HOW_STOPPED, INTERRUPTED, TERMINATED

        status = INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else TERMINATED
        print(f"\n{HOW_STOPPED[status]}; {AGAIN}", file=sys.stderr)
        sys.exit(status)
    finally:  # the work is done, and Python takes a moment to end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
